"""Benchmarks packing: the tensors of a step's micro-batches, beside other ways to lay sequences out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from megatron_orz.benchmark import workload
from megatron_orz.benchmark.group import OURS
from megatron_orz.benchmark.host_work import HostTask
from megatron_orz.benchmark.measure import Run
from megatron_orz.benchmark.options import check_positive
from megatron_orz.benchmark.workload import Lengths
from megatron_orz.data.packing import pack
from megatron_orz.types import Rollout

IN_ORDER, PADDED, TRL = "in order, tensor by tensor", "padded", "TRL, best fit"
VOCABULARY = 150_000


@dataclass(frozen=True)
class Arguments:
    """Times the way from rollouts to the tensors of a step's micro-batches: planned and laid out as here; packed in the
    order they come, tensor by tensor; padded; and TRL's best-fit packing, which lays out token ids alone.

    How much of the micro-batches is padding, or room that is left, stands beside it.
    """

    num_sequences: int = 2048
    """Rollouts of the step."""
    prompt_tokens: int = 150
    """Length of every prompt."""
    max_response_tokens: int = 4000
    """The longest response; the median is a sixteenth."""
    max_pack_tokens: int = 8192
    """Of a pack."""
    padded_rows: int = 8
    """Sequences in a padded micro-batch."""
    repeats: int = 5
    """Timed runs of each implementation, after one to warm up."""
    output: Path | None = None
    """Where the figures go; by default bench/results/<device>-packing.json."""

    def __post_init__(self) -> None:
        check_positive(self, "num_sequences", "prompt_tokens", "max_response_tokens", "padded_rows", "repeats")
        if self.prompt_tokens + self.max_response_tokens > self.max_pack_tokens:
            raise ValueError(f"max_pack_tokens {self.max_pack_tokens} is less than the longest sequence; raise it")


def run(arguments: Arguments, console: Console | None = None) -> Path:
    """Prints the table; returns the path of the results file."""
    task = host_task(arguments)
    times = task.measure(arguments.repeats)
    return task.publish(times, asdict(arguments), arguments.output, console or Console())


def host_task(arguments: Arguments) -> HostTask:
    """All implementations, on the same rollouts."""
    lengths = Lengths(
        num_sequences=arguments.num_sequences,
        prompt_tokens=arguments.prompt_tokens,
        max_response_tokens=arguments.max_response_tokens,
    )
    rollouts = workload.random_rollouts(lengths, vocab_size=VOCABULARY, seed=0)
    num_tokens = sum(rollout.num_tokens for rollout in rollouts)
    budget, num_rows = arguments.max_pack_tokens, arguments.padded_rows
    runs: dict[str, Run] = {
        OURS: partial(pack, rollouts, max_pack_tokens=budget),
        IN_ORDER: partial(packed_in_order, rollouts, budget),
        PADDED: partial(padded, rollouts, num_rows),
    }
    notes = {
        OURS: _note(num_tokens, budget * len(runs[OURS]()), "left"),
        IN_ORDER: _note(num_tokens, budget * len(runs[IN_ORDER]()), "left"),
        PADDED: _note(num_tokens, sum(batch["tokens"].numel() for batch in runs[PADDED]()), "padding"),
    }
    try:
        runs[TRL] = trl_best_fit(rollouts, budget)
        notes[TRL] = _note(num_tokens, budget * len(runs[TRL]()), "left") + ", token ids alone"
    except ImportError:
        notes[TRL] = "not installed: pip install megatron_orz[benchmark]"
    return HostTask(
        task="packing",
        shape=f"{len(rollouts)} rollouts of up to {arguments.max_response_tokens} tokens, packs of {budget}",
        num_items=num_tokens,
        unit="tokens",
        runs=runs,
        notes=notes,
        baselines=(IN_ORDER, PADDED),
    )


def _note(num_tokens: int, num_places: int, what: str) -> str:
    return f"{1 - num_tokens / num_places:.1%} {what}"


def packed_in_order(rollouts: Sequence[Rollout], budget: int) -> list[dict[str, Tensor]]:
    """Packs that are closed when the next sequence does not fit, each field concatenated from a tensor a sequence."""
    packs: list[list[Rollout]] = [[]]
    used = 0
    for rollout in rollouts:
        if used + rollout.num_tokens > budget:
            packs.append([])
            used = 0
        packs[-1].append(rollout)
        used += rollout.num_tokens
    return [{name: torch.cat(tensors) for name, tensors in _fields_of(members).items()} for members in packs if members]


def padded(rollouts: Sequence[Rollout], num_rows: int) -> list[dict[str, Tensor]]:
    """Micro-batches of `num_rows` rollouts in their order, each field padded to the longest."""
    return [
        {
            name: torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
            for name, tensors in _fields_of(rollouts[first : first + num_rows]).items()
        }
        for first in range(0, len(rollouts), num_rows)
    ]


def _fields_of(rollouts: Sequence[Rollout]) -> dict[str, list[Tensor]]:
    """A tensor of each field for each rollout."""
    fields: dict[str, list[Tensor]] = {
        "tokens": [], "targets": [], "position_ids": [], "loss_mask": [], "rewards": [], "log_probs": []
    }  # fmt: skip
    for rollout in rollouts:
        token_ids = torch.tensor([*rollout.prompt.token_ids, *rollout.response_ids])
        num_prompt, num_response = len(rollout.prompt.token_ids) - 1, len(rollout.response_ids)
        rewards = torch.zeros(rollout.num_tokens)
        rewards[-1] = rollout.grade.reward if rollout.grade else 0.0
        fields["tokens"].append(token_ids[:-1])
        fields["targets"].append(token_ids[1:])
        fields["position_ids"].append(torch.arange(rollout.num_tokens))
        fields["loss_mask"].append(torch.arange(rollout.num_tokens) >= num_prompt)
        fields["rewards"].append(rewards)
        log_probs = torch.tensor(rollout.rollout_log_probs)
        fields["log_probs"].append(torch.nn.functional.pad(log_probs, (num_prompt, 0)))
        assert num_prompt + num_response == rollout.num_tokens
    return fields


def trl_best_fit(rollouts: Sequence[Rollout], budget: int) -> Run:
    """TRL's packing of a data set of token ids. Raises ImportError where it is not installed."""
    import datasets
    from trl import pack_dataset

    logging.getLogger("datasets").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    datasets.disable_caching()
    ids = [list(chain(rollout.prompt.token_ids, rollout.response_ids))[:-1] for rollout in rollouts]

    def run() -> Any:
        return pack_dataset(datasets.Dataset.from_dict({"input_ids": ids}), seq_length=budget, strategy="bfd")

    return run
