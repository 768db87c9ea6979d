"""A run that generates ahead, killed at any instant and started again: every response is trained on once, in time."""

from __future__ import annotations

import json
import random
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megatron_orz.answers import SavedAnswers
from megatron_orz.data.stream import EpochStream
from megatron_orz.generations import Generation, generations_file, read_generations
from megatron_orz.rollout.sampling import prompt_seed
from tests.faults.tiny_run import NUM_STEPS, write_recipe
from tests.faults.zygote import NEVER, POINTS, Plan, Zygote, random_plan
from tests.rollout import stand_in

NUM_PROMPTS, NUM_RESPONSES, NUM_PROBLEMS = 3, 2, 7
"""Of the recipe: prompts of a step, responses to each, and prompts of an epoch."""
PACE = {"delay_s": 0.02, "slow_s": 0.4}
"""Of the stand-ins, so that a checkpoint meets prompts that are answered and others that are not."""


class Place(NamedTuple):
    """A prompt of a step."""

    step: int
    place: int


@dataclass(frozen=True)
class Mode:
    """How far ahead a run generates."""

    max_staleness: int
    swaps: bool = False

    def __str__(self) -> str:
        return f"{self.max_staleness} ahead{', swaps' * self.swaps}"

    @property
    def arguments(self) -> list[str]:
        """Of the command line. Two prompts are asked at a time, so that others wait."""
        return [
            *("--fleet.kind", "vllm", "--fleet.max-rollouts-in-flight", str(2 * NUM_RESPONSES)),
            *("--ppo.max-staleness", str(self.max_staleness), "--checkpoint.interval", "1"),
            *(["--fleet.swaps-within-responses"] if self.swaps else []),
        ]


ONE_AHEAD, TWO_AHEAD, TWO_AHEAD_AND_SWAPS = Mode(1), Mode(2), Mode(2, swaps=True)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as running:
        yield running


@dataclass
class Story:
    """The same command, started again and again in one place."""

    place: Path
    mode: Mode
    kept: dict[Place, list[list[int]]] = field(default_factory=dict)
    """Token ids of the answers that checkpoints held as runs went on from them."""
    num_requests: int = 0
    """Of the runs so far."""

    def run(self, zygote: Zygote, recipe: Path, plan: Plan, *, more: Sequence[str] = (), **options: Any) -> bool:
        """Returns whether the run ended before it was done. more: arguments of the command line."""
        self.kept |= saved_answers(self.place / "run" / "checkpoints")
        end = zygote.run(recipe, self.place, plan, arguments=[*self.mode.arguments, *more], **options)
        requests = self.requests()[self.num_requests :]
        self.num_requests += len(requests)
        assert max(Counter(requests).values(), default=1) == 1, "a request was asked twice, though no server failed"
        assert not self.kept.keys() & set(requests), "what a checkpoint holds the answer to was asked again"
        assert end.was_killed or set(end.exit_codes) <= {0, 75}, end.said
        return set(end.exit_codes) != {0}

    def requests(self) -> list[Place]:
        """What was asked of the servers, in order."""
        file = self.place / "requests.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        ids = [json.loads(line)[0].split("-") for line in lines]
        return [Place(int(step.removeprefix("s")), int(place.removeprefix("p"))) for _, step, place in ids]

    def generations(self) -> dict[int, list[Generation]]:
        """What each step was trained on."""
        return {step: list(read_generations(generations_file(self.place / "run", step))) for step in range(NUM_STEPS)}

    def check(self) -> None:
        """Every step has its own prompts, and its own responses to them, of versions within the bound."""
        lines = (self.place / "run" / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["step"] for row in rows] == list(range(NUM_STEPS + 1)), "a gap or a duplicate"
        assert max(row["staleness/max"] for row in rows[:-1]) <= self.mode.max_staleness
        stream = EpochStream(range(NUM_PROBLEMS), seed=0)
        for step, trained in self.generations().items():
            assert [row.prompt_id for row in trained] == [
                i for i in stream.take(NUM_PROMPTS) for _ in range(NUM_RESPONSES)
            ]
            for index, row in enumerate(trained):
                versions = [row.policy_version, *(swap.version for swap in row.swaps)]
                assert step - self.mode.max_staleness <= min(versions)
                assert max(versions) <= step
                assert self.mode.swaps or not row.swaps
                place = Place(step, index // NUM_RESPONSES)
                if place in self.kept:
                    assert row.response_ids == self.kept[place][index % NUM_RESPONSES], "an answer was lost"

    def check_stand_ins(self) -> None:
        """Every response is the stand-ins' own to this prompt of this step."""
        for step, trained in self.generations().items():
            for index, row in enumerate(trained):
                place, sibling = divmod(index, NUM_RESPONSES)
                seed = 0 if self.mode.swaps else prompt_seed(step, place)
                bounds = [*(swap.token for swap in row.swaps), stand_in.NUM_TOKENS]
                versions = [row.policy_version, *(swap.version for swap in row.swaps)]
                expected: list[int] = []
                for version, end in zip(versions, bounds, strict=True):
                    expected += stand_in.response(row.prompt_ids, seed, sibling, version)[len(expected) : end]
                assert row.response_ids == expected


def saved_answers(checkpoints: Path) -> dict[Place, list[list[int]]]:
    """The answers that the newest checkpoint holds, as token ids of the siblings."""
    found: dict[Place, list[list[int]]] = {}
    for directory in sorted(checkpoints.glob("step-*"))[-1:]:
        for file in (directory / "ahead").glob("*.npz"):
            saved = SavedAnswers.read(file)
            ends = [0, *saved.rollouts.ends.tolist()]
            ids = [saved.rollouts.token_ids[begin:end].tolist() for begin, end in pairwise(ends)]
            for index, place in enumerate(saved.places):
                found[Place(int(file.stem), place)] = ids[index * NUM_RESPONSES : (index + 1) * NUM_RESPONSES]
    return found


def tell(zygote: Zygote, recipe: Path, place: Path, mode: Mode, plans: Sequence[Plan]) -> tuple[int, Story]:
    """Starts the same command again after each kill, and at last without one. Returns the number of kills."""
    story = Story(place, mode)
    num_kills = sum(story.run(zygote, recipe, plan, stand_ins=PACE) for plan in plans)
    assert not story.run(zygote, recipe, NEVER, stand_ins=PACE)
    story.check()
    story.check_stand_ins()
    return num_kills, story


@pytest.mark.parametrize(
    ("mode", "plans"),
    [
        (ONE_AHEAD, [Plan("policy:start", 3), Plan("snapshot:end", 3)]),
        (TWO_AHEAD_AND_SWAPS, [Plan("generate:start", 3), Plan("sync:start", 2, signal=signal.SIGTERM)]),
    ],
    ids=["one ahead", "two ahead, swaps"],
)
def test_a_run_that_generates_ahead_loses_nothing(
    recipe: Path, zygote: Zygote, tmp_path: Path, mode: Mode, plans: list[Plan]
) -> None:
    num_kills, story = tell(zygote, recipe, tmp_path, mode, plans)
    assert num_kills == len(plans)
    assert story.kept, "no checkpoint met an answer that waits"


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(POINTS), 6))
@pytest.mark.parametrize("mode", [ONE_AHEAD, TWO_AHEAD_AND_SWAPS], ids=str)
def test_kills_at_every_point_lose_nothing(
    recipe: Path, zygote: Zygote, tmp_path: Path, mode: Mode, first: int
) -> None:
    """In turns at the first and at the second time that a run comes there, so that it gets on."""
    points = POINTS[first : first + 6]
    plans = [Plan(point, 1 + index % 2) for index, point in enumerate(points)]
    num_kills, _ = tell(zygote, recipe, tmp_path, mode, [Plan("sync:start", 3), *plans])
    assert num_kills >= 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mode", [ONE_AHEAD, TWO_AHEAD, TWO_AHEAD_AND_SWAPS], ids=str)
def test_kills_at_any_moment_lose_nothing(recipe: Path, zygote: Zygote, tmp_path: Path, mode: Mode, seed: int) -> None:
    generator = random.Random(seed)
    plans = [random_plan(generator, 5.0, 1) for _ in range(5)]
    plans.insert(2, Plan("infer:start", 2, signal=signal.SIGTERM))
    tell(zygote, recipe, tmp_path, mode, plans)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", [ONE_AHEAD, TWO_AHEAD_AND_SWAPS], ids=str)
def test_a_run_with_a_real_server_loses_nothing(zygote: Zygote, tmp_path: Path, mode: Mode) -> None:
    """Long responses, no two of which are alike."""
    pytest.importorskip("vllm")
    recipe = write_recipe(tmp_path, family="qwen3")
    long = ["--sampling.stop", "--sampling.max-response-tokens", "400", "--fleet.max-model-tokens", "512"]
    pack = ["--data.max-pack-tokens", "1024", "--fleet.kv-cache-gib", "0.25"]
    story = Story(tmp_path, mode)
    for plan in (Plan("policy:start", 4), Plan("sync:start", 2, signal=signal.SIGTERM), Plan("generate:start", 1)):
        assert story.run(zygote, recipe, plan, more=[*long, *pack])
    assert not story.run(zygote, recipe, NEVER, more=[*long, *pack])
    story.check()
    assert story.kept, "no checkpoint met an answer that waits"
    rows = [row for trained in story.generations().values() for row in trained]
    responses = [tuple(row.response_ids) for row in rows if len(row.response_ids) >= 10]  # others are alike by chance
    assert len(set(responses)) == len(responses) > 0, "a response was trained on twice"
    assert any(row.swaps for row in rows) == mode.swaps
