"""Whatever a model writes: an answer is found in it or not, in bounded time, and nothing breaks."""

from __future__ import annotations

from hypothesis import strategies as st

from megatron_orz.metrics.traits import reflection_patterns
from megatron_orz.rewards.math_answer import MAX_ANSWER_CHARS, extract_answer, quick_verdict
from tests.fuzz.inputs import fuzz, sizes

PIECES = st.sampled_from(
    [
        *(
            "<answer>",
            "</answer>",
            "<answer",
            "\\boxed{",
            "\\\\boxed{",
            "boxed",
            "{",
            "}",
            "\\{",
            "\\}",
            "\\",
            "$",
            "\\$",
        ),
        *(
            "7",
            "-",
            ".",
            ",",
            "1,000",
            "1,00",
            "0" * 400,
            "9" * MAX_ANSWER_CHARS,
            "1e9",
            "\\frac12",
            "\\dfrac",
            "\\text{",
        ),
        *(
            "\\left(",
            "\\right)",
            "\\!",
            "\\ ",
            " ",
            "\n",
            "\t",
            "\0",
            "\u200b",
            "\ud800",
            "\u202e",
            "\uff17",
            "x" * 9000,
        ),
        *("\\input{/etc/passwd}", "$(ls)", "`ls`", "Wait,", "\u0130" * 50),
    ]
)
hostile_texts = st.lists(PIECES | st.text(max_size=6), max_size=30).map("".join)


@sizes(slow=40_000)
def test_extraction(num_inputs: int) -> None:
    fuzz(hostile_texts, check_extraction, num_inputs=num_inputs)


def check_extraction(response: str) -> None:
    answer = extract_answer(response)
    if answer is not None:
        assert answer
        assert answer == answer.strip()
        assert answer in response
        assert "<answer>" in response
        assert quick_verdict(answer, answer) is True
    reflection_patterns(response)


@sizes(slow=20_000)
def test_quick_verdicts(num_inputs: int) -> None:
    fuzz(st.tuples(hostile_texts, hostile_texts), check_quick_verdict, num_inputs=num_inputs)


def check_quick_verdict(pair: tuple[str, str]) -> None:
    answer, reference = pair
    verdict = quick_verdict(answer, reference)
    assert verdict in (True, False, None)
    if answer == reference:
        assert verdict is True
    elif len(answer) > MAX_ANSWER_CHARS:
        assert verdict is False
