"""Pass rates: thresholds, chunks that are kept, and a real model through the local fleet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from megatron_orz.config import FleetConfig, SamplingConfig
from megatron_orz.data.curation.difficulty import Difficulty, Sampler, fleet_sampler
from megatron_orz.data.curation.embeddings import Embedder
from megatron_orz.data.curation.stage import Candidate, Verdict
from megatron_orz.data.curation.store import Store
from megatron_orz.data.synthetic import build_tokenizer
from megatron_orz.ranks import Ranks
from megatron_orz.rewards.grading import ResponseGrader
from megatron_orz.rewards.verifiers import AnswerVerifier
from megatron_orz.rollout.fleet import open_fleet
from tests.data.curation.rows import candidates, ignore, reasons
from tests.engine import tiny
from tests.rollout.conftest import model_config

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = Difficulty(num_responses=8, min_right=1, max_pass_rate=0.75, hard_below=2, chunk_problems=3)


class Recorded:
    """A sampler of which row n has n right responses, and row 9 a prompt that is too long."""

    def __init__(self) -> None:
        self.opened = 0
        self.asked: list[tuple[list[int], int]] = []
        self.dies_at: int | None = None

    @contextmanager
    def open(self) -> Iterator[Sampler]:
        self.opened += 1
        yield self.sample

    def sample(self, rows: Sequence[Candidate], seed: int, on_response: Callable[[], None]) -> list[int | None]:
        if len(self.asked) == self.dies_at:
            raise RuntimeError("the server died")
        self.asked.append(([row.row for row in rows], seed))
        return [None if row.row == 9 else row.row for row in rows]

    def judge(self, store: Store, settings: Difficulty = SETTINGS, rows: int = 10) -> list[Verdict]:
        problems = candidates([(f"{n}+{n}", str(2 * n)) for n in range(rows)])
        return settings.judge(problems, ignore, open_sampler=self.open, store=store, identity="recorded")


def test_problems_are_neither_impossible_nor_too_easy(tmp_path: Path) -> None:
    verdicts = Recorded().judge(Store(tmp_path))
    # 6 of 8 is 0.75, the limit.
    assert reasons(verdicts) == ["never_right", *[None] * 6, "too_easy", "too_easy", "long_prompt"]
    assert [verdict.num_right for verdict in verdicts] == [*range(9), None]
    assert verdicts[5].detail == "5 of 8 responses are right"
    assert [SETTINGS.is_hard(verdict.num_right) for verdict in verdicts] == [True, True, *[False] * 8]


def test_recipes_annealing_set_is_fewer_than_4_of_64() -> None:
    assert [count for count in (None, *range(65)) if Difficulty().is_hard(count)] == [0, 1, 2, 3]


def test_an_interrupted_sampling_goes_on_after_the_last_chunk(tmp_path: Path) -> None:
    sampler = Recorded()
    sampler.dies_at = 2
    with pytest.raises(RuntimeError, match="the server died"):
        sampler.judge(Store(tmp_path))
    sampler.dies_at = None
    verdicts = sampler.judge(Store(tmp_path))
    assert verdicts == Recorded().judge(Store(tmp_path / "other"))
    assert [rows for rows, _ in sampler.asked] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert len({seed for _, seed in sampler.asked}) == 4
    assert sampler.opened == 2
    assert sampler.judge(Store(tmp_path)) == verdicts
    assert sampler.opened == 2, "where all chunks are there, no fleet is started"


def test_other_settings_are_sampled_anew_and_other_thresholds_are_not(tmp_path: Path) -> None:
    sampler, store = Recorded(), Store(tmp_path)
    sampler.judge(store)
    sampler.judge(store, Difficulty(num_responses=8, min_right=2, max_pass_rate=0.5, hard_below=3, chunk_problems=3))
    assert len(sampler.asked) == 4
    sampler.judge(store, Difficulty(num_responses=8, max_pass_rate=0.75, chunk_problems=3, seed=1))
    assert len(sampler.asked) == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_responses": 0}, "difficulty.num_responses 0 is not at least 1"),
        ({"seed": -1}, "difficulty.seed -1 is negative; set it to 0 or more"),
        ({"num_responses": 3}, r"difficulty.hard_below 4 is outside \[0, num_responses = 3\]"),
        ({"min_right": 65}, r"difficulty.min_right 65 is outside \[0, num_responses = 64\]"),
        ({"min_right": 32, "max_pass_rate": 0.25}, r"max_pass_rate 0.25 is outside \[min_right/num_responses = 32/64"),
    ],
)
def test_thresholds_that_contradict_each_other_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Difficulty(**settings)  # type: ignore[arg-type]


def teach(directory: Path, lessons: Sequence[tuple[str, str]]) -> None:
    """A checkpoint of a tiny model that answers each prompt as it was taught, all its answers equally often."""
    tokenizer = build_tokenizer()
    tiny.save_model(directory, family="qwen2", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    batch = tokenizer([prompt + response for prompt, response in lessons], padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(directory)


def test_a_real_model_is_sampled_and_graded(tmp_path: Path) -> None:
    """Taught the right answer to one problem, a wrong one to another, and to a third the right one half of the time."""
    torch.manual_seed(0)
    right, wrong, mixed = "1+2", "3+4", "5+5"
    lessons = [(right, "3"), (right, "3"), (wrong, "8"), (wrong, "8"), (mixed, "10"), (mixed, "11")]
    teach(tmp_path / "hf", [(f"{problem}=", f"<answer>\\boxed{{{answer}}}</answer>") for problem, answer in lessons])
    settings = Difficulty(template="{problem}=", num_responses=16, max_prompt_tokens=10)
    fleet_config, sampling = FleetConfig(kind="local"), SamplingConfig(max_response_tokens=20)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")

    @contextmanager
    def open_sampler() -> Iterator[Sampler]:
        with (
            open_fleet(fleet_config, sampling, model_config(tmp_path / "hf"), run_dir=tmp_path) as fleet,
            AnswerVerifier(timeout_s=120) as verifier,
        ):
            yield fleet_sampler(settings, tokenizer, fleet, ResponseGrader(verifier, tokenizer, Ranks()))

    rows = candidates([(right, "3"), ("a problem of many tokens", "1"), (wrong, "7"), (mixed, "10")])
    done: list[int] = []
    verdicts = settings.judge(
        rows, done.append, open_sampler=open_sampler, store=Store(tmp_path / "stages"), identity="taught"
    )
    assert reasons(verdicts) == ["too_easy", "long_prompt", "never_right", None]
    assert verdicts[0].num_right == 16
    assert verdicts[3].num_right is not None
    assert 3 <= verdicts[3].num_right <= 13, "8 plus or minus 2 standard deviations and a half"
    assert sum(done) == 3 * 16


def test_vectors_are_means_of_hidden_states_and_are_kept(tmp_path: Path) -> None:
    """Against the model run on each text alone, without padding."""
    tokenizer = build_tokenizer()
    tiny.save_model(tmp_path / "hf", family="qwen2", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "hf")
    rows = candidates([(f"{'word ' * (number % 7)}and {number}", "1") for number in range(70)])
    store = Store(tmp_path / "stages")
    vectors = Embedder(tmp_path / "hf", store, identity="tiny")(rows, ignore)

    model = AutoModel.from_pretrained(tmp_path / "hf").eval()
    for row, vector in zip(rows, vectors, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(row.text, return_tensors="pt")).last_hidden_state[0]
        expected = states.mean(0) / states.mean(0).norm()
        torch.testing.assert_close(vector, expected, rtol=0, atol=1e-5)  # other batch shapes, float32
    again = Embedder(tmp_path / "absent", store, identity="tiny")(rows, ignore)
    assert torch.equal(again, vectors), "kept vectors need no model"
