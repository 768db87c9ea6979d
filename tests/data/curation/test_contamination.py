"""Copies of evaluation problems are found wherever they stand; other problems stay."""

from megatron_orz.data.curation.contamination import Decontamination
from megatron_orz.data.curation.text import tokens
from tests.data.curation.rows import candidates, ignore, published, reasons, texts


def test_planted_copies_are_found_and_nothing_else() -> None:
    evaluation = published("math500.json") + published("aime2024.json")
    training = published("gsm8k_train.jsonl")[:2000]
    planted = [problem.text for problem in evaluation[::7]]
    disguised = [
        disguise(text)
        for text, disguise in zip(
            planted,
            [
                lambda text: text,
                lambda text: f"Solve the problem below, and box your answer.\n\n{text}\n\nThink step by step.",
                lambda text: text.upper().replace(" ", "  \n"),
                lambda text: text.replace("$", "").replace("\\left", "").replace("\\frac", "\\dfrac"),
                lambda text: text[: len(text) * 3 // 4] if len(text) > 200 else text,
            ]
            * 20,
            strict=False,
        )
    ]
    rows = texts(*(problem.text for problem in training), *disguised)
    found = reasons(Decontamination().judge(rows, ignore, evaluation=evaluation))
    assert found == [None] * len(training) + ["contaminated"] * len(disguised)


def test_evaluation_sets_do_not_overlap_each_other() -> None:
    """Competition problems share their phrases with one another, and are different problems nonetheless."""
    rows = candidates(published("aime2024.json"))
    assert set(reasons(Decontamination().judge(rows, ignore, evaluation=published("math500.json")))) == {None}


def test_short_evaluation_problems_count_only_where_they_are_all_there_is() -> None:
    evaluation = published("gsm8k_test.jsonl")[:1]
    short = [problem for problem in published("math500.json") if len(tokens(problem.text)) < 8]
    assert short
    rows = texts(short[0].text, f"{short[0].text} And then add 1 to it. What do you get?", "Compute $1+2$.")
    found = Decontamination().judge(rows, ignore, evaluation=[*evaluation, short[0]])
    assert reasons(found) == ["contaminated", None, None]
    assert found[0].detail == f"1.00 of the 8-grams of {short[0].place}"


def test_overlap_is_the_share_of_the_evaluation_problems_ngrams() -> None:
    """Ten words hold three 8-grams; nine of them in a row hold two."""
    words = [f"word{letter}" for letter in "abcdefghij"]
    [problem] = published("math500.json")[:1]
    evaluation = [type(problem)(text=" ".join(words), answer="1", place="eval.json: item 1")]
    rows = texts(" ".join(words[:9]), " ".join(words[:8]), " ".join(words[::-1]))
    verdicts = Decontamination().judge(rows, ignore, evaluation=evaluation)
    assert [verdict.detail[:4] for verdict in verdicts] == ["0.67", "0.33", ""]
    assert reasons(verdicts) == ["contaminated", None, None]
