"""Weight updates of a real vLLM server on the CPU: what verification finds, and what updates cost in the long run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_orz.config import DType, FleetConfig, SamplingConfig, TransportKind
from megatron_orz.rollout import transport
from megatron_orz.rollout.servers import InferenceServer, ServerError
from megatron_orz.rollout.transports import SERVER_ARGUMENTS, build_transport
from megatron_orz.rollout.verification import WeightMismatch
from megatron_orz.rollout.vllm_client import VLLMClient
from megatron_orz.rollout.vllm_server import vllm_launch
from megatron_orz.rollout.weight_sender import WeightSender
from megatron_orz.types import NamedWeights
from tests.rollout.conftest import (
    CHARACTERS,
    EOS_ID,
    PAD_ID,
    character_tokenizer,
    log_prob_error,
    make_prompts,
    model_config,
    named_weights,
    tiny_model,
)
from tests.rollout.test_vllm_fleet import ask

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

KINDS: list[TransportKind] = ["ipc", "gloo", "disk"]
SAMPLING = SamplingConfig(max_response_tokens=24, stop=())
FAULTY = ("--worker-extension-cls", "tests.rollout.faulty_worker.FaultyExtension")
QKV = "model.layers.1.self_attn.{}_proj.weight"


@dataclass(frozen=True)
class Running:
    client: VLLMClient
    server: InferenceServer
    folder: Path

    @contextmanager
    def sender(self, kind: TransportKind = "ipc", **options: object) -> Iterator[WeightSender]:
        half = build_transport(kind, folder=self.folder)
        arguments = {"timeout_s": 60, "verification": "full", **options}
        sender = WeightSender([self.client], half, **arguments)  # type: ignore[arg-type]
        with closing(sender):
            sender.connect()
            yield sender

    def plant(self, fault: str) -> None:
        self.client.post("/collective_rpc", {"method": "plant", "args": [fault]})

    def log_prob_error(self, model: PreTrainedModel) -> float:
        return log_prob_error(model, ask(self.client.url, make_prompts(6), SAMPLING), SAMPLING)

    @property
    def version(self) -> str:
        return self.client.get("/weight_info")["weight_version"]


def moe_model(*, seed: int) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=len(CHARACTERS),
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
    )
    model = Qwen3MoeForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def checkpoint_weights(model: PreTrainedModel, folder: Path) -> NamedWeights:
    """Under the names of checkpoints, which are not those of transformers' parameters where experts are fused."""
    model.save_pretrained(folder)
    return iter(sorted(load_file(folder / "model.safetensors").items()))


def run_server(checkpoint: Path, folder: Path, *, tp: int = 1, dtype: DType = "float32") -> Iterator[Running]:
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(transport, "BUCKET_BYTES", 4096)  # so small that layers straddle buckets
        config = FleetConfig(max_model_tokens=512, kv_cache_gib=0.25, server_tp=tp, dtype=dtype)
        launch = vllm_launch(model_config(checkpoint), config, index=0, transfer_arguments=[*SERVER_ARGUMENTS, *FAULTY])
        server = InferenceServer(launch, start_timeout_s=300, log_path=folder / "vllm.log")
        stack.enter_context(server)
        server.wait_until_healthy()
        client = stack.enter_context(VLLMClient(server.url, request_timeout_s=60))
        yield Running(client, server, folder / "weights")


@pytest.fixture(scope="module")
def tied(tied_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from run_server(tied_checkpoint, tmp_path_factory.mktemp("tied-weights"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_transport_brings_the_weights(tied: Running, kind: TransportKind) -> None:
    with tied.sender(kind) as sender:
        for version in range(2):
            model = tiny_model(tied=True, seed=30 + version)
            sender.send(named_weights(model), version)
            assert tied.log_prob_error(model) < 1e-4


@pytest.mark.parametrize("is_begun", [False, True], ids=["nothing loaded", "a part of a layer loaded"])
def test_a_trainer_that_is_gone_amid_an_update_leaves_a_server_for_the_next(tied: Running, is_begun: bool) -> None:
    tied.client.post("/pause", query={"mode": "keep", "clear_cache": "false"})
    tied.client.post("/start_weight_update")
    old = dict(named_weights(tiny_model(tied=True, seed=49)))
    if is_begun:
        name = QKV.format("q")
        tied.client.post("/collective_rpc", {"method": "load", "args": [name, old[name].tolist()]})
    model = tiny_model(tied=True, seed=50)
    with tied.sender() as sender:
        sender.send(named_weights(model), 7)
    assert tied.log_prob_error(model) < 1e-4


FAULTS = {
    "stale packs": "model.embed_tokens.weight: other values in lm_head.weight",
    "flip model.norm": "model.norm.weight: other values in model.norm.weight",
    "flip model.embed_tokens": "model.embed_tokens.weight: other values in model.embed_tokens.weight",
    # The flipped bit is in row 5 of fused projections, which is of q and of gate.
    "flip model.layers.1.self_attn.qkv_proj": f"{QKV.format('q')}: other values in ",
    "flip model.layers.0.mlp.gate_up_proj": "model.layers.0.mlp.gate_proj.weight: other values in ",
    "flip model.layers.0.mlp.down_proj": "model.layers.0.mlp.down_proj.weight: other values in ",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_server_is_found_and_named(tied: Running, fault: str) -> None:
    message = re.escape(f"1 of 26 verified tensors differ ({FAULTS[fault]}")
    with tied.sender() as sender:
        sender.send(named_weights(tiny_model(tied=True, seed=1)), 1)
        tied.plant(fault)
        with pytest.raises(WeightMismatch, match=message):
            sender.send(named_weights(tiny_model(tied=True, seed=2)), 2)
        assert tied.version == "1"
        tied.plant("")
        sender.send(named_weights(tiny_model(tied=True, seed=2)), 2)
    assert tied.version == "2"
    assert tied.log_prob_error(tiny_model(tied=True, seed=2)) < 1e-4


def test_fifty_updates_in_a_row_leave_no_mismatch(tied: Running) -> None:
    """As in training: every update changes all weights a little, and some prompts are in the prefix cache."""
    model = tiny_model(tied=True, seed=3)
    with tied.sender(verification="sampled") as sender:
        for version in range(50):
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
            sender.send(named_weights(model), version)
            assert tied.log_prob_error(model) < 1e-3


def test_two_hundred_updates_leak_nothing(tied: Running) -> None:
    model = tiny_model(tied=True, seed=3)
    supervisor = psutil.Process(tied.server.pid)
    processes = [psutil.Process(os.getpid()), *supervisor.children(recursive=True)]

    def usage() -> list[tuple[int, float]]:
        return [(process.num_fds(), process.memory_info().rss / 2**20) for process in processes]

    with tied.sender(verification="sampled") as sender:
        for version in range(200):
            if version == 40:  # allocators have settled
                before = usage()
            sender.send(named_weights(model), version)
        after = usage()
    print(f"\nfile descriptors and MiB of each process after 40 updates {before}, after 200 {after}")
    for (files, mib), (files_after, mib_after) in zip(before, after, strict=True):
        assert files_after <= files + 2  # idle connections come and go
        assert mib_after < mib + 8


def test_tensor_parallel_workers_hold_their_parts(
    tied_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each worker holds a part of most tensors, and both hold the one head of keys and values."""
    with contextmanager(run_server)(tied_checkpoint, tmp_path_factory.mktemp("tp"), tp=2) as parallel:
        for kind in KINDS:
            with parallel.sender(kind) as sender:
                for version in range(2):
                    model = tiny_model(tied=True, seed=50 + version)
                    sender.send(named_weights(model), version)
                    assert parallel.log_prob_error(model) < 1e-4
                parallel.plant("flip model.layers.0.mlp.down_proj")
                with pytest.raises(
                    WeightMismatch, match=r"1 of 26 .* \(model\.layers\.0\.mlp\.down_proj\.weight: other"
                ):
                    sender.send(named_weights(model), 2)
                parallel.plant("")


def test_a_bfloat16_server_of_a_float32_trainer_holds_the_rounded_weights(
    untied_checkpoint: Path, tmp_path: Path
) -> None:
    with (
        contextmanager(run_server)(untied_checkpoint, tmp_path, dtype="bfloat16") as half,
        half.sender() as sender,
    ):
        model = tiny_model(tied=False, seed=70)
        sender.send(named_weights(model), 0)
        num_elements = sum(parameter.numel() for parameter in model.parameters())
        assert sender.metrics()["sync/gib"] * 2**30 == 2 * num_elements
        # The activations are rounded as well: tenths of a nat, where other weights are off by more than one.
        assert half.log_prob_error(model) < 1


def test_experts_are_packed_anew_and_read_back(tmp_path: Path) -> None:
    moe_model(seed=0).save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    with contextmanager(run_server)(tmp_path, tmp_path) as experts, experts.sender() as sender:
        for version in range(2):
            model = moe_model(seed=60 + version)
            sender.send(checkpoint_weights(model, tmp_path / str(version)), version)
            assert experts.log_prob_error(model) < 1e-4
        experts.plant("stale packs")
        # Two layers of four experts, of three matrices each.
        with pytest.raises(
            WeightMismatch, match=r"24 of \d+ verified tensors differ \(model\.layers\.0\.mlp\.experts\.0"
        ):
            sender.send(checkpoint_weights(moe_model(seed=2), tmp_path / "2"), 2)


@pytest.fixture(scope="module")
def untied(untied_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    yield from run_server(untied_checkpoint, tmp_path_factory.mktemp("untied-weights"))


def test_weights_of_an_untied_model_are_verified(untied: Running) -> None:
    with untied.sender() as sender:
        for version in range(2):
            model = tiny_model(tied=False, seed=40 + version)
            sender.send(named_weights(model), version)
            assert untied.log_prob_error(model) < 1e-4
        untied.plant("flip lm_head")
        with pytest.raises(WeightMismatch, match=r"1 of 27 .* \(lm_head\.weight: other values in lm_head\.weight\)"):
            sender.send(named_weights(tiny_model(tied=False, seed=2)), 2)
        untied.plant("")


def test_a_lost_part_of_a_fused_parameter_is_named(untied: Running) -> None:
    """The last test of this server: vLLM itself misses nothing, and would load what happens to be in memory."""
    lost = QKV.format("k")
    untied.plant(f"lose {lost}")
    with untied.sender() as sender, pytest.raises(ServerError, match=r"answered 500"):
        sender.send(named_weights(tiny_model(tied=False, seed=1)), 9)
    assert f"1 tensors got no new weight, among them {lost}" in untied.server.log_path.read_text()
