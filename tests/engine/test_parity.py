"""Every layout computes what a single Hugging Face model computes: log-probs, entropies, values, losses, updates.

The reference runs one sequence at a time through transformers, takes the losses from their formulas and the steps
from torch.optim.AdamW. AdamW's eps is 1e-4, because at 1e-8 an update near a zero gradient is its sign: noise.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_orz.config import CriticConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_orz.types import Experience, LossOutput, NamedWeights, PolicyOutput
from tests.engine import tiny
from tests.launch import run_ranks

OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_steps=2, eps=1e-4, weight_decay=0.1, clip_grad=0.5)
NUM_STEPS = 3
TEMPERATURE = 0.7
CLIP_EPS = 0.2
VALUE_HEAD_SEED = 11


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one case spreads the same work."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    dp: int = 1
    chunk_layers: tuple[int, ...] = ()
    overlap: bool = False
    sequence_parallel: bool = False
    num_packs: int = 3
    recompute: str = "none"
    distributed_optimizer: bool = True

    def __str__(self) -> str:
        return "-".join(f"{name}{value}" for name, value in dataclasses.asdict(self).items())


def policy_loss(output: PolicyOutput, experience: Experience) -> LossOutput:
    ratio = (output.log_probs - experience.old_log_probs).exp()
    clipped = ratio.clamp(1 - CLIP_EPS, 1 + CLIP_EPS)
    surrogate = torch.minimum(ratio * experience.advantages, clipped * experience.advantages)
    return LossOutput(per_token=-surrogate - 0.01 * output.entropy, metrics={"policy/entropy": output.entropy})


def value_loss(values: Tensor, experience: Experience) -> LossOutput:
    return LossOutput(per_token=0.5 * (values - experience.returns) ** 2, metrics={"critic/value": values})


def packs_of_rank(sequences: list[Experience], layout: Layout, dp_rank: int) -> list[Experience]:
    """The sequences dealt over dp x num_packs packs, and an empty pack where there are several ranks."""
    multiple = layout.tp if layout.sequence_parallel else 1
    mine = sequences[dp_rank :: layout.dp]
    packs = [tiny.concatenate(mine[i :: layout.num_packs], multiple=multiple) for i in range(layout.num_packs)]
    return packs + [tiny.empty_pack()] * (layout.dp > 1)


def copy_of(weights: NamedWeights) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in weights}


def run_layout(layout: Layout, path: Path, output: Path, loss_mean: str) -> None:
    """What one rank does: inference, updates, inference and export; rank 0 writes the results."""
    from megatron_orz.engine.megatron_engine import CriticEngine, PolicyEngine
    from megatron_orz.engine.parallel import open_mesh

    sequences = tiny.random_sequences(12)
    parallel = ParallelConfig(
        tp=layout.tp,
        pp=layout.pp,
        vpp=layout.vpp,
        cp=layout.cp,
        chunk_layers=layout.chunk_layers,
        overlap=layout.overlap,
        sequence_parallel=layout.sequence_parallel,
        timeout_s=60,
    )
    optimizer = dataclasses.replace(OPTIMIZER, distributed=layout.distributed_optimizer)
    with open_mesh(parallel, seed=0) as mesh:
        packs = packs_of_rank(sequences, layout, mesh.dp_rank)
        common: dict[str, Any] = {"path": path, "optimizer": optimizer, "recompute": layout.recompute}
        policy = PolicyEngine(ModelConfig(**common), mesh, loss_mean=loss_mean, temperature=TEMPERATURE)
        critic = CriticEngine(CriticConfig(**common), mesh, loss_mean=loss_mean, seed=VALUE_HEAD_SEED)
        results: dict[str, Any] = {"weights_before": copy_of(policy.hf_weights())}
        results["log_probs"], results["values"] = policy.infer(packs), critic.infer(packs)
        results["policy_metrics"] = [policy.step(packs, policy_loss) for _ in range(NUM_STEPS)]
        results["critic_metrics"] = [critic.step(packs, value_loss) for _ in range(NUM_STEPS)]
        results["log_probs_after"], results["values_after"] = policy.infer(packs), critic.infer(packs)
        results["weights_after"] = copy_of(policy.hf_weights())
        if mesh.rank == 0:
            torch.save(results, output)


class Reference:
    """Policy and critic as Hugging Face models in one process, one sequence at a time."""

    def __init__(self, path: Path, sequences: list[Experience], loss_mean: str, num_packs: int) -> None:
        self.sequences, self.loss_mean, self.num_packs = sequences, loss_mean, num_packs
        self.policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.body = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).model
        generator = torch.Generator().manual_seed(VALUE_HEAD_SEED)
        self.value_head = torch.nn.Parameter(torch.empty(1, 64).normal_(std=(1 / 65) ** 0.5, generator=generator))

    def policy_output(self, sequence: Experience) -> PolicyOutput:
        log_p = torch.log_softmax(self.policy(sequence.tokens[None]).logits[0] / TEMPERATURE, dim=-1)
        return PolicyOutput(
            log_probs=log_p.gather(1, sequence.targets[:, None])[:, 0], entropy=-(log_p.exp() * log_p).sum(-1)
        )

    def values(self, sequence: Experience) -> Tensor:
        return (self.body(sequence.tokens[None]).last_hidden_state[0] @ self.value_head.t())[:, 0]

    def mean(self, per_token: list[Tensor]) -> Tensor:
        """The loss over all sequences, averaged as `loss_mean` says, written out."""
        kept = [x[sequence.loss_mask] for x, sequence in zip(per_token, self.sequences, strict=True)]
        if self.loss_mean == "token":
            return torch.cat(kept).mean()
        if self.loss_mean == "sequence":
            return torch.stack([x.mean() for x in kept]).mean()
        return torch.stack([torch.cat(kept[i :: self.num_packs]).mean() for i in range(self.num_packs)]).mean()

    def train(self, parameters: dict[str, Tensor], loss: Any) -> list[dict[str, float]]:
        decayed = [p for name, p in parameters.items() if p.ndim > 1]
        spared = [p for name, p in parameters.items() if p.ndim == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=OPTIMIZER.eps)
        metrics = []
        for step in range(NUM_STEPS):
            for group in optimizer.param_groups:
                group["lr"] = OPTIMIZER.lr * min(1.0, (step + 1) / OPTIMIZER.warmup_steps)
            optimizer.zero_grad()
            total = loss()
            total.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), OPTIMIZER.clip_grad)
            optimizer.step()
            metrics.append({"loss": float(total), "grad_norm": float(norm), "lr": optimizer.param_groups[0]["lr"]})
        return metrics

    def train_policy(self) -> list[dict[str, float]]:
        def loss() -> Tensor:
            outputs = [self.policy_output(sequence) for sequence in self.sequences]
            return self.mean([policy_loss(o, s).per_token for o, s in zip(outputs, self.sequences, strict=True)])

        return self.train(dict(self.policy.named_parameters()), loss)

    def train_critic(self) -> list[dict[str, float]]:
        def loss() -> Tensor:
            return self.mean([value_loss(self.values(s), s).per_token for s in self.sequences])

        return self.train({**dict(self.body.named_parameters()), "value_head": self.value_head}, loss)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    assert error < tolerance, f"{what}: relative error {error:.1e}"


def masked(packs: list[Experience], flat: list[Tensor]) -> Tensor:
    return torch.cat([x[pack.loss_mask] for pack, x in zip(packs, flat, strict=True)])


def check_layout(layout: Layout, tmp_path: Path, *, family: str, tied: bool, loss_mean: str) -> None:
    tiny.save_model(tmp_path / "model", family=family, tied=tied)
    run_ranks(
        layout.tp * layout.pp * layout.cp * layout.dp,
        run_layout,
        layout,
        tmp_path / "model",
        tmp_path / "results.pt",
        loss_mean,
    )
    results = torch.load(tmp_path / "results.pt")
    sequences = tiny.random_sequences(12)
    packs = packs_of_rank(sequences, layout, dp_rank=0)
    # Rank 0's packs hold these sequences in this order.
    order = [s for i in range(layout.num_packs) for s in sequences[:: layout.dp][i :: layout.num_packs]]
    reference = Reference(tmp_path / "model", sequences, loss_mean, layout.num_packs)

    def expected(output: Any) -> Tensor:
        with torch.no_grad():
            return torch.cat([output(s)[s.loss_mask] for s in order])

    for name, weight in results["weights_before"].items():
        assert torch.equal(weight, reference.policy.state_dict()[name]), name
    log_probs = lambda s: reference.policy_output(s).log_probs  # noqa: E731
    assert_close(masked(packs, results["log_probs"]), expected(log_probs), 1e-5, "log_probs")
    assert_close(masked(packs, results["values"]), expected(reference.values), 1e-5, "values")
    for name, metrics in (("policy", reference.train_policy()), ("critic", reference.train_critic())):
        for actual, wanted in zip(results[f"{name}_metrics"], metrics, strict=True):
            for metric, value in wanted.items():
                assert actual[f"{name}/{metric}"] == pytest.approx(value, rel=2e-4), f"{name}/{metric}"
    assert_close(masked(packs, results["log_probs_after"]), expected(log_probs), 2e-4, "log_probs after the updates")
    assert_close(masked(packs, results["values_after"]), expected(reference.values), 2e-4, "values after the updates")
    parameters = dict(reference.policy.named_parameters())
    assert set(results["weights_after"]) == set(parameters)
    for name, weight in results["weights_after"].items():
        assert_close(weight, parameters[name].detach(), 2e-4, name)


@pytest.mark.parametrize(
    ("layout", "tied"),
    [
        (Layout(), False),
        (Layout(), True),
        (Layout(tp=2), True),
        (Layout(pp=2), True),
        (Layout(dp=2), False),
        (Layout(pp=2, vpp=2), True),
        (Layout(pp=2, vpp=2), False),
        (Layout(pp=2, chunk_layers=(1, 3)), False),
        (Layout(cp=2), False),
        (Layout(recompute="selective"), False),
        (Layout(dp=2, overlap=True), False),
        (Layout(tp=2, sequence_parallel=True), False),
    ],
    ids=str,
)
def test_layout_equals_one_hugging_face_model(layout: Layout, tied: bool, tmp_path: Path) -> None:
    check_layout(layout, tmp_path, family="qwen2", tied=tied, loss_mean="token")


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(num_packs=1),
        Layout(recompute="full"),
        Layout(tp=2),
        Layout(pp=2),
        Layout(pp=4),
        Layout(dp=2, distributed_optimizer=False),
        Layout(tp=2, pp=2),
        Layout(tp=2, dp=2),
        Layout(pp=2, dp=2),
        Layout(tp=2, pp=2, sequence_parallel=True, recompute="full"),
    ],
    ids=str,
)
def test_more_layouts_equal_one_hugging_face_model(layout: Layout, tied: bool, tmp_path: Path) -> None:
    check_layout(layout, tmp_path, family="llama", tied=tied, loss_mean="token")


@pytest.mark.parametrize("loss_mean", ["pack", "sequence"])
def test_loss_mean_equals_its_formula(loss_mean: str, tmp_path: Path) -> None:
    check_layout(Layout(), tmp_path, family="llama", tied=False, loss_mean=loss_mean)
