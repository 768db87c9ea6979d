"""Every model family computes what transformers computes, forward and backward, whole and cut.

Tolerances: logits 1e-4 as an absolute difference (they are of order 1); gradients 1e-4 of a tensor's largest entry.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_orz.config import CriticConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_orz.engine.architecture import read_architecture
from megatron_orz.types import Experience, LossOutput, PolicyOutput
from tests.engine import tiny
from tests.launch import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-4
OPTIMIZER = OptimizerConfig(
    lr=1e-3, clip_grad=0.0, distributed=False
)  # whole gradients, as the backward pass left them
VALUE_HEAD_SEED = 11
HIDDEN = 64

TP2 = ParallelConfig(tp=2, sequence_parallel=True, timeout_s=300)  # experts need it, and it does no harm to the rest
PP2 = ParallelConfig(pp=2, timeout_s=300)
EP2 = ParallelConfig(ep=2, timeout_s=300)
WITH_EXPERTS = tuple(name for name in tiny.FAMILIES if "moe" in name or name == "mixtral")


def policy_loss(output: PolicyOutput, experience: Experience) -> LossOutput:
    return LossOutput(per_token=-output.log_probs * experience.advantages, metrics={})


def value_loss(values: Tensor, experience: Experience) -> LossOutput:
    return LossOutput(per_token=(values - experience.returns) ** 2, metrics={})


def sequences() -> list[Experience]:
    return tiny.random_sequences(6)


def run_families(root: Path, families: tuple[str, ...], parallel: ParallelConfig) -> None:
    """What one rank does: inference and one update of policy and critic of each family; every rank writes a file."""
    from megatron_orz.engine.megatron_engine import CriticEngine, PolicyEngine
    from megatron_orz.engine.parallel import open_mesh

    with open_mesh(parallel, seed=0) as mesh:
        # Data-parallel ranks (of ep 2) hold half of the sequences each.
        pack = tiny.concatenate(sequences()[mesh.dp_rank :: mesh.dp_size], multiple=parallel.tp)
        for family in families:
            options: dict[str, Any] = {"path": root / family, "optimizer": OPTIMIZER}
            policy = PolicyEngine(ModelConfig(**options), mesh)
            critic = CriticEngine(CriticConfig(**options), mesh, seed=VALUE_HEAD_SEED)
            hidden: list[Tensor] = []
            hook = policy.model.register_forward_hook(lambda *call, hidden=hidden: hidden.append(call[-1].detach()))
            policy.infer([pack])
            hook.remove()
            results = {
                "hidden": hidden[0][:, 0],
                "weights": {name: weight.clone() for name, weight in policy.hf_weights()},
                "critic_weights": {name: weight.clone() for name, weight in critic.hf_weights()},
                "values": critic.infer([pack])[0],
            }
            policy.step([pack], policy_loss)
            critic.step([pack], value_loss)
            results["gradients"] = {"policy": gradients(policy.chunks), "critic": gradients(critic.chunks)}
            torch.save(results, root / f"{family}.{mesh.rank}.pt")


def gradients(chunks: Any) -> dict[str, Tensor]:
    from megatron_orz.engine.weights import global_parameters

    return {name: parameter.main_grad.clone() for name, parameter in global_parameters(chunks).items()}


class Reference:
    """A family's policy and critic in transformers."""

    def __init__(self, path: Path) -> None:
        self.policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.critic = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        generator = torch.Generator().manual_seed(VALUE_HEAD_SEED)
        self.value_head = torch.nn.Parameter(
            torch.empty(1, HIDDEN).normal_(std=(1 / (HIDDEN + 1)) ** 0.5, generator=generator)
        )

    def logits(self, experience: Experience) -> Tensor:
        return self.policy(experience.tokens[None]).logits[0]

    def values(self, experience: Experience) -> Tensor:
        hidden = self.critic.model(experience.tokens[None]).last_hidden_state[0]
        return (hidden @ self.value_head.t())[:, 0]

    def policy_gradients(self) -> dict[str, Tensor]:
        losses = []
        for experience in sequences():
            log_probs = self.logits(experience).log_softmax(-1).gather(1, experience.targets[:, None])[:, 0]
            losses.append((-log_probs * experience.advantages)[experience.loss_mask])
        torch.cat(losses).mean().backward()
        return hub_gradients(self.policy)

    def critic_gradients(self) -> dict[str, Tensor]:
        losses = [((self.values(x) - x.returns) ** 2)[x.loss_mask] for x in sequences()]
        torch.cat(losses).mean().backward()
        assert self.value_head.grad is not None
        return {**hub_gradients(self.critic), "score.weight": self.value_head.grad}


def hub_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """Gradients under the names of the checkpoint: transformers stacks the experts of a layer in memory."""
    is_mixtral = model.config.model_type == "mixtral"
    result = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:  # the critic has no use for the language-model head
            continue
        if is_mixtral:
            name = name.replace(".mlp.", ".block_sparse_moe.")
        if ".experts." not in name:
            result[name] = parameter.grad
            continue
        prefix, kind = name.rsplit(".", 1)
        gate, up, down = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
        for expert, gradient in enumerate(parameter.grad):
            if kind == "down_proj":
                result[f"{prefix}.{expert}.{down}.weight"] = gradient
            else:
                for half, part in zip((gate, up), gradient.chunk(2), strict=True):
                    result[f"{prefix}.{expert}.{half}.weight"] = part
    return result


def whole_gradients(ranks: list[dict[str, Tensor]], path: Path, tp: int, *, value_head: bool) -> dict[str, Tensor]:
    """Gradients of Megatron shards -> gradients under Hugging Face names; a tied head's is the embedding's."""
    from megatron_orz.engine.weight_table import Replicated, weight_table

    result = {}
    for entry in weight_table(read_architecture(path), value_head=value_head):
        shards = [rank[entry.megatron_name] for rank in ranks if entry.megatron_name in rank]
        if not shards:
            assert entry.megatron_name == "output_layer.weight"
            continue
        if entry.expert is not None or type(entry.layout) is Replicated:
            whole = shards[0]
            assert all(torch.equal(shard, whole) for shard in shards), f"ranks differ in {entry.megatron_name}"
        else:
            whole = entry.layout.unshard(shards[:tp])
        result.update(zip(entry.hf, entry.layout.split(whole), strict=True))
    return result


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    assert error < TOLERANCE, f"{what}: relative error {error:.1e}"


def check_family(root: Path, family: str, parallel: ParallelConfig, world_size: int) -> None:
    ranks = [torch.load(root / f"{family}.{rank}.pt") for rank in range(world_size)]
    stage = ranks[-parallel.tp :] if parallel.pp > 1 else ranks[: parallel.tp]
    dp_size = world_size // (parallel.tp * parallel.pp)
    reference = Reference(root / family)
    shared = sequences()[::dp_size]
    num_tokens = sum(len(x.tokens) for x in shared)
    with torch.no_grad():
        logits = torch.cat([reference.logits(x) for x in shared])
        values = torch.cat([reference.values(x) for x in shared])
    head = reference.policy.lm_head.weight.detach()
    hidden = torch.cat([rank["hidden"] for rank in stage])[:num_tokens]
    assert (hidden @ head.t() - logits).abs().max() < TOLERANCE
    assert_close(stage[0]["values"][:num_tokens], values, "values")

    saved = saved_tensors(root / family)
    for rank in ranks:
        assert rank["weights"].keys() == saved.keys()
        assert rank["critic_weights"].keys() == saved.keys() - {"lm_head.weight"} | {"score.weight"}
        for name, weight in (rank["critic_weights"] | rank["weights"]).items():
            assert torch.equal(weight, saved.get(name, reference.value_head.detach())), name

    for model, expected in (("policy", reference.policy_gradients()), ("critic", reference.critic_gradients())):
        shards = [rank["gradients"][model] for rank in ranks]
        actual = whole_gradients(shards, root / family, parallel.tp, value_head=model == "critic")
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_close(actual[name], gradient, f"{model} gradient of {name}")


def saved_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("families")
    for family in tiny.FAMILIES:
        tiny.save_model(path / family, family=family, tied=family in ("llama3", "qwen3"))
    return path


def test_families_equal_transformers(root: Path) -> None:
    run_families(root, tuple(tiny.FAMILIES), ParallelConfig())
    for family in tiny.FAMILIES:
        check_family(root, family, ParallelConfig(), 1)


def test_shards_equal_transformers(root: Path) -> None:
    """Norms of queries and keys on tensor-parallel ranks, and experts on ranks with different tokens."""
    run_ranks(2, run_families, root, ("qwen3_moe",), TP2)
    check_family(root, "qwen3_moe", TP2, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "families"),
    [(TP2, tuple(tiny.FAMILIES)), (PP2, tuple(tiny.FAMILIES)), (EP2, WITH_EXPERTS)],
    ids=["tp2", "pp2", "ep2"],
)
def test_layouts_of_families_equal_transformers(
    root: Path, parallel: ParallelConfig, families: tuple[str, ...]
) -> None:
    run_ranks(2, run_families, root, families, parallel)
    for family in families:
        check_family(root, family, parallel, 2)
