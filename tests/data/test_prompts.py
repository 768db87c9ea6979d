"""Templates, tokenising and the endless order of prompts."""

import json
from collections import Counter
from pathlib import Path

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_orz.data.prompts import PromptStream, check_vocabulary, load_prompts, render
from megatron_orz.data.synthetic import build_tokenizer
from megatron_orz.types import Prompt

TOKENIZER = build_tokenizer()

ORZ_GOLDEN = (
    "<s>A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The "
    "Assistant first thinks about the reasoning process in the mind and then provides the User with the answer. The "
    "reasoning process is enclosed within <think> </think> and answer is enclosed within <answer> </answer> tags, "
    "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. User: You must put "
    "your answer inside <answer> </answer> tags, i.e., <answer> answer here </answer>. And your final answer will be "
    "extracted automatically by the \\boxed{} tag.\nThis is the problem:\nWhat is $\\frac{6}{2}$?\nAssistant: <think>"
)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_orz_template_is_the_recipes_byte_for_byte() -> None:
    assert render("orz", "What is $\\frac{6}{2}$?", bos_token="<s>") == ORZ_GOLDEN
    assert render("orz", "What is $\\frac{6}{2}$?", bos_token=None) == ORZ_GOLDEN.removeprefix("<s>")


@given(problem=st.text(max_size=30), ending=st.sampled_from(["", "\n", "\n\n", "{problem}", "{bos_token}", "{{x}}"]))
def test_orz_template_equals_the_two_layers_of_the_template_engine(problem: str, ending: str) -> None:
    instruction, conversation = ORZ_GOLDEN.split("User: You must")
    instruction, conversation = "You must" + conversation, instruction.replace("<s>", "{{bos_token}}") + "User: "
    # Each layer ends in a newline in the source, which the engine drops; the problem's own newlines stay.
    inner = instruction.split("What is")[0] + "{{problem}}\n"
    outer = conversation + "{{instruction}}\nAssistant: <think>\n"
    text = problem.replace("\r", "") + ending
    rendered = jinja2.Template(inner).render(problem=text)
    assert render("orz", text, bos_token="<s>") == jinja2.Template(outer).render(bos_token="<s>", instruction=rendered)


def test_short_and_custom_templates() -> None:
    assert render("short", "1+2", bos_token="<s>") == "User: 1+2\nAssistant: <think>"
    assert render("Q {problem} A", "{bos_token}") == "Q {bos_token} A"
    with pytest.raises(ValueError, match=r"'shrot' is neither a built-in name \(orz, short\)"):
        render("shrot", "1+2")


def test_prompts_keep_their_ids_when_long_ones_are_dropped(tmp_path: Path) -> None:
    rows = [{"question": "1" * length, "answer": str(length)} for length in (1, 30, 2)]
    paths = [write(tmp_path / f"{name}.jsonl", "\n".join(map(json.dumps, rows))) for name in "ab"]
    prompts, report = load_prompts(paths, TOKENIZER, template="short", max_prompt_tokens=20)
    assert [(prompt.prompt_id, prompt.answer, prompt.source) for prompt in prompts] == [
        (0, "1", "a.jsonl"),
        (2, "2", "a.jsonl"),
        (3, "1", "b.jsonl"),
        (5, "2", "b.jsonl"),
    ]
    assert (report.num_read, report.num_kept, report.num_too_long) == (6, 4, 2)
    assert TOKENIZER.decode(prompts[1].token_ids) == "User: 11\nAssistant: <think>"

    first, _ = load_prompts(paths, TOKENIZER, template="short", max_prompt_tokens=20, max_prompts=1)
    assert [prompt.source for prompt in first] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(ValueError, match=r"none of the 6 rows .* fits max_prompt_tokens 3; raise"):
        load_prompts(paths, TOKENIZER, template="short", max_prompt_tokens=3)


def test_tokenizer_larger_than_the_model_is_refused() -> None:
    check_vocabulary(TOKENIZER, 264)
    with pytest.raises(ValueError, match="largest token id 263 is not below the model's vocabulary size 263"):
        check_vocabulary(TOKENIZER, 263)


def numbered(count: int) -> list[Prompt]:
    return [Prompt(prompt_id=number, token_ids=[number], answer="", source="") for number in range(count)]


@given(
    size=st.integers(1, 12), takes=st.lists(st.integers(0, 30), max_size=6), cut=st.integers(0, 6), seed=st.integers(0)
)
def test_stream_resumes_exactly_and_visits_every_prompt_once_an_epoch(
    size: int, takes: list[int], cut: int, seed: int
) -> None:
    prompts = numbered(size)
    whole = PromptStream(prompts, seed=seed)
    ids = [prompt.prompt_id for count in takes for prompt in whole.take(count)]
    for start in range(0, len(ids) - size + 1, size):
        assert Counter(ids[start : start + size]) == Counter(range(size))

    before = PromptStream(prompts, seed=seed)
    resumed_ids = [prompt.prompt_id for count in takes[:cut] for prompt in before.take(count)]
    after = PromptStream(prompts, seed=seed, cursor=before.cursor)
    resumed_ids += [prompt.prompt_id for count in takes[cut:] for prompt in after.take(count)]
    assert resumed_ids == ids
    assert after.cursor == whole.cursor == sum(takes)


def test_stream_order_differs_by_epoch_and_by_seed() -> None:
    prompts = numbered(50)
    stream = PromptStream(prompts, seed=0)
    first, second = stream.take(50), stream.take(50)
    other = PromptStream(prompts, seed=1).take(50)
    orders = {tuple(prompt.prompt_id for prompt in order) for order in (prompts, first, second, other)}
    assert len(orders) == 4


def test_stream_resumes_far_along_without_replaying() -> None:
    stream = PromptStream(numbered(7), seed=3, cursor=7 * 10**12 + 5)
    assert Counter(prompt.prompt_id for prompt in stream.take(9)).most_common(1)[0][1] == 2
