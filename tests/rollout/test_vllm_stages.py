"""A real vLLM server of a trainer with two pipeline stages, each of which sends its weights."""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from megatron_orz.config import FleetConfig, ParallelConfig, SamplingConfig, TransportKind
from megatron_orz.rollout import transport
from megatron_orz.rollout.fleet import ServerFleet, open_fleet
from megatron_orz.rollout.stage_senders import StageSenders
from megatron_orz.rollout.token import TOKEN_VARIABLE, server_token
from megatron_orz.types import NamedWeights, RepeatableWeights
from tests.launch import run_ranks
from tests.rollout.conftest import log_prob_error, make_prompts, model_config, tiny_model
from tests.rollout.test_vllm_fleet import processes_of
from tests.rollout.test_vllm_weights import run_server

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

SAMPLING = SamplingConfig(max_response_tokens=24, stop=())
NUM_TENSORS = {True: 26, False: 27}
"""With tied embeddings, and with an output head."""


def _train(folder: Path, fleet_config: FleetConfig, tied: bool, dies: bool) -> None:
    """dies: the server, amid the second update."""
    from megatron_orz.engine.megatron_engine import PolicyEngine
    from megatron_orz.engine.parallel import open_mesh

    os.environ["OMP_NUM_THREADS"] = "1"
    transport.BUCKET_BYTES = 4096  # so small that layers straddle buckets, and buckets of two stages alternate
    model = model_config(folder / "0")
    with (
        open_mesh(ParallelConfig(pp=2, timeout_s=300), seed=0) as mesh,
        open_fleet(fleet_config, SAMPLING, model, run_dir=folder, stage=mesh.pp_rank) as fleet,
    ):
        assert isinstance(fleet, ServerFleet)
        assert isinstance(fleet._senders, StageSenders)
        for version in range(2):
            policy = PolicyEngine(model_config(folder / str(version)), mesh, is_frozen=True)
            weights = policy.hf_weights()
            if dies and version == 1 and mesh.pp_rank == 0:
                weights = _killing_once(fleet, weights)
            fleet.update_weights(weights, version)
            rollouts = fleet.generate(make_prompts(6), num_responses=2, seed=version)
            assert log_prob_error(tiny_model(tied=tied, seed=version), rollouts, SAMPLING) < 1e-4
            if mesh.rank == 0:
                assert fleet.metrics()["sync/verified_tensors"] == NUM_TENSORS[tied]
                assert fleet.metrics()["fleet/restarts"] == (dies and version == 1)


def _killing_once(fleet: ServerFleet, weights: RepeatableWeights) -> RepeatableWeights:
    """The server dies amid the first try at sending them."""
    victims = processes_of(fleet, 0)[1:2]

    def gathered() -> NamedWeights:
        for index, item in enumerate(weights.of_stage()):
            if index == 5 and victims:
                victims.pop().kill()
            yield item

    return RepeatableWeights(gathered, gather_stage=gathered)


def save(folder: Path, tied: bool, checkpoint: Path) -> None:
    """Checkpoints of two versions; that of the servers' start is the first."""
    for version in range(2):
        tiny_model(tied=tied, seed=version).save_pretrained(folder / str(version))
        for file in checkpoint.glob("*token*"):
            (folder / str(version) / file.name).write_bytes(file.read_bytes())


def test_two_stages_send_and_the_update_is_repeated_after_the_server_died(
    tied_checkpoint: Path, tmp_path: Path
) -> None:
    save(tmp_path, True, tied_checkpoint)
    config = FleetConfig(max_model_tokens=512, kv_cache_gib=0.25, transport="gloo", verification="full")
    run_ranks(2, partial(_train, tied=True, dies=True), tmp_path, config)


@pytest.mark.parametrize("kind", ["gloo", "disk"])
def test_two_stages_send_to_a_server_given_by_its_url(
    untied_checkpoint: Path, tmp_path: Path, kind: TransportKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, False, untied_checkpoint)
    monkeypatch.setenv(TOKEN_VARIABLE, server_token())
    with contextmanager(run_server)(untied_checkpoint, tmp_path, tp=2) as running:
        config = FleetConfig(urls=(running.client.url,), transport=kind, verification="full")
        run_ranks(2, partial(_train, tied=False, dies=False), tmp_path, config)
