"""How fast a run is: tokens a second and MFU of each phase of a step, from its spans and its rollouts.

    perf/step_s                             from one record to the next, without evaluation
    perf/tokens_per_s_per_gpu, perf/mfu     of the whole step: all tokens of the rollouts, and all operations that the
                                            trainer's GPUs do, generation among them where it is theirs
    perf/<phase>_tokens_per_s_per_gpu       generate: response tokens; infer, critic, policy: all tokens
    perf/<phase>_mfu                        as a share of `perf/peak_tflops`, the rate of one GPU

The formula is in `engine/flops.py`. Recomputation does not count, and neither does padding, if there is any.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from megatron_orz.config import Config
from megatron_orz.engine.architecture import read_architecture
from megatron_orz.engine.dtypes import TORCH_DTYPES
from megatron_orz.engine.flops import Flops, model_flops
from megatron_orz.engine.peak_flops import peak_flops
from megatron_orz.types import Metrics, Rollout

RecordRollouts = Callable[[int, Sequence[Rollout]], Metrics]


class PerformanceMeter:
    """Listens to the spans of a log and looks at the rollouts of each step."""

    def __init__(self, config: Config, *, needs_old_log_probs: bool, world_size: int, device: torch.device) -> None:
        """needs_old_log_probs: of the algorithm; else the policy's only update finds them.

        world_size: GPUs of the trainer, or processes on CPUs.
        """
        self._needs_old_log_probs = needs_old_log_probs
        self._policy = read_architecture(config.policy.path)
        self._critic = None
        if config.critic is not None and config.ppo.uses_critic:
            self._critic = read_architecture(config.critic.path)
        self._has_reference = config.kl.coefficient > 0
        self._num_trainers = world_size
        self._num_generators = _num_generators(config, world_size)
        self._trainer_generates = config.fleet.kind == "local" or config.fleet.colocated
        self._peak = peak_flops(device, TORCH_DTYPES[config.policy.dtype]).rate
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._lengths: list[int] = []
        self._num_response_tokens = 0
        self._last_record: float | None = None

    def on_span(self, name: str, start: float, end: float) -> None:
        """Takes the times of a span, in seconds of `time.perf_counter`."""
        if self._last_record is None:
            self._last_record = start
        self._seconds[name] += end - start

    def observing(self, record: RecordRollouts) -> RecordRollouts:
        """`record`, which shows its rollouts to the meter too."""

        def record_and_observe(step: int, rollouts: Sequence[Rollout]) -> Metrics:
            self._lengths = [rollout.num_tokens for rollout in rollouts]
            self._num_response_tokens = sum(len(rollout.response_ids) for rollout in rollouts)
            return record(step, rollouts)

        return record_and_observe

    def metrics(self) -> Metrics:
        """Of the step that ends; nothing where it had no rollouts."""
        now = time.perf_counter()
        seconds, lengths, start = self._seconds, self._lengths, self._last_record
        self._seconds, self._lengths, self._last_record = defaultdict(float), [], now
        if not lengths or start is None:
            return {}
        num_tokens, num_response_tokens = sum(lengths), self._num_response_tokens
        tokens = {"generate": num_response_tokens, "infer": num_tokens, "critic": num_tokens, "policy": num_tokens}
        policy_infers = self._needs_old_log_probs or seconds["policy"] == 0
        flops = self._phase_flops(lengths, num_response_tokens, policy_infers=policy_infers)
        metrics: Metrics = {}
        for phase in flops:
            if seconds[phase] > 0 and flops[phase] > 0:
                num_gpus = self._num_generators if phase == "generate" else self._num_trainers
                metrics[f"perf/{phase}_tokens_per_s_per_gpu"] = tokens[phase] / seconds[phase] / num_gpus
                metrics[f"perf/{phase}_mfu"] = flops[phase] / seconds[phase] / (num_gpus * self._peak)
        step_s = now - start - seconds["evaluate"]
        of_trainer = [phase for phase in flops if phase != "generate" or self._trainer_generates]
        done = sum(flops[phase] for phase in of_trainer if seconds[phase] > 0)
        return metrics | {
            "perf/step_s": step_s,
            "perf/tokens_per_s_per_gpu": num_tokens / step_s / self._num_trainers,
            "perf/mfu": done / step_s / (self._num_trainers * self._peak),
            "perf/peak_tflops": self._peak / 1e12,
        }

    def _phase_flops(self, lengths: Sequence[int], num_response_tokens: int, *, policy_infers: bool) -> dict[str, int]:
        policy = model_flops(self._policy, lengths, num_head_tokens=num_response_tokens)
        critic = Flops(layers=0, attention=0, head=0)
        if self._critic is not None:
            critic = model_flops(self._critic, lengths, num_head_tokens=num_response_tokens, value_head=True)
        num_inferring = policy_infers + self._has_reference
        return {
            "generate": policy.forward,
            "infer": num_inferring * policy.forward + critic.forward,
            "critic": critic.training,
            "policy": policy.training,
        }


def _num_generators(config: Config, world_size: int) -> int:
    """GPUs that generate."""
    if config.fleet.kind == "local":
        return world_size
    return (len(config.fleet.urls) or config.fleet.num_servers) * config.fleet.server_tp
