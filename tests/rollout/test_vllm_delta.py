"""Real vLLM servers on the CPU that rebuild their weights from what has changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_orz.config import FleetConfig, ModelConfig, OptimizerConfig, SamplingConfig, TransportKind
from megatron_orz.rollout.fleet import ServerFleet, open_fleet
from megatron_orz.types import RepeatableWeights, Rollout
from tests.rollout.conftest import make_prompts, tiny_model
from tests.rollout.test_process import wait_for
from tests.rollout.test_vllm_fleet import processes_of

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

SAMPLING = SamplingConfig(max_response_tokens=24, stop=())
LR = 1e-5
"""Moves as many of the tiny model's large weights as 1e-6 does of a trained model's: one in twenty-five."""
NUM_UPDATES = 6


def trained(version: int) -> RepeatableWeights:
    model = tiny_model(tied=True, seed=3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(version):
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).sign(), alpha=LR)
    return RepeatableWeights(lambda: iter(list(model.named_parameters())))


def served(
    checkpoint: Path, run_dir: Path, *, delta: bool, transport: TransportKind, kills: bool
) -> list[list[Rollout]]:
    """The responses after each update. kills: the server, between two of them."""
    fleet_config = FleetConfig(
        max_model_tokens=512,
        kv_cache_gib=0.25,
        dtype="bfloat16",
        transport=transport,
        delta=delta,
        verification="full",
    )
    model = ModelConfig(path=checkpoint, optimizer=OptimizerConfig(lr=LR))
    answers = []
    with open_fleet(fleet_config, SAMPLING, model, run_dir=run_dir) as fleet:
        assert isinstance(fleet, ServerFleet)
        assert fleet._servers is not None
        (replica,) = fleet._servers._replicas
        size = sum(2 * weight.numel() for _, weight in trained(0)) / 2**30
        for version in range(NUM_UPDATES):
            is_killed = kills and version == 3
            if is_killed:
                processes_of(fleet, 0)[1].kill()
                wait_for(lambda: not replica.is_up, timeout_s=60)
                wait_for(lambda: replica.is_up, timeout_s=300)
            fleet.update_weights(trained(version), version)
            metrics = fleet.metrics()
            assert metrics["sync/verified_tensors"] == 26
            is_whole = not delta or version == 0 or is_killed
            assert metrics["sync/gib"] == size if is_whole else 0 < metrics["sync/gib"] < 0.1 * size
            answers.append(fleet.generate(make_prompts(6), num_responses=2, seed=0))
    return answers


def largest_difference(ours: list[Rollout], theirs: list[Rollout]) -> float:
    """Of log-probabilities; one, where two responses part."""
    worst = 0.0
    for one, other in zip(ours, theirs, strict=True):
        pairs = zip(one.response_ids, one.rollout_log_probs, other.response_ids, other.rollout_log_probs, strict=False)
        for token, log_prob, other_token, other_log_prob in pairs:
            if token != other_token:
                worst = max(worst, 1.0)
                break
            worst = max(worst, abs(log_prob - other_log_prob))
    return worst


@pytest.fixture(scope="module", autouse=True)
def _one_thread_each() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def whole(tied_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[Rollout]]:
    """The responses to updates that are sent whole."""
    return served(tied_checkpoint, tmp_path_factory.mktemp("whole"), delta=False, transport="gloo", kills=False)


@pytest.mark.parametrize("transport", ["gloo", "disk"])
def test_a_server_answers_as_if_all_weights_were_sent_also_after_it_was_killed(
    whole: list[list[Rollout]], tied_checkpoint: Path, tmp_path: Path, transport: TransportKind
) -> None:
    changed = served(tied_checkpoint, tmp_path, delta=True, transport=transport, kills=True)
    for version in range(NUM_UPDATES):
        assert {rollout.policy_version for rollout in changed[version]} == {version}
        assert largest_difference(changed[version], whole[version]) < 1e-3
    assert largest_difference(whole[-1], whole[0]) > 1e-3, "the updates change nothing that could be seen"
