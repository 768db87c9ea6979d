"""Every layout computes what a single Hugging Face model computes, for policy and critic.

Compared: log-probabilities, entropies, values, advantages, losses, gradient norms, every gradient, and three updates.
Tolerances are of the largest entry of a tensor: float32 sums in another order.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_orz.config import DType, ModelConfig, OptimizerConfig
from tests.engine import faults, tiny
from tests.engine.layouts import NUM_SEQUENCES, Layout, order_on_rank_0, packs_of_rank, policy_loss, run_layout
from tests.engine.reference import Reference, megatron_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
# A bfloat16 model against the float32 reference from the same (rounded) weights: 8 bits of every activation, and a
# clipped loss that decides the other way for some tokens.
BF16_TOLERANCE = 1e-1

MAIN = [
    Layout(),
    Layout(tied=True, num_packs=1, distributed=False, recompute="full"),
    Layout(loss_mean="pack"),
    Layout(loss_mean="sequence", recompute="selective", family="llama"),
    Layout(tp=2, tied=True),
    Layout(tp=2, sp=True),
    Layout(pp=2, tied=True, chunk_layers=(1, 3)),
    Layout(pp=2, vpp=2, tied=True),
    Layout(cp=2),
    Layout(cp=2, loss_mean="sequence", tied=True, recompute="full"),
    Layout(dp=2),
    Layout(dp=2, overlap=True),
    Layout(dp=2, distributed=False, overlap=True, tied=True),
    Layout(dp=2, ep=2, family="qwen3_moe"),
    Layout(tp=2, sp=True, ep=2, family="mixtral"),
    Layout(dtype="bfloat16"),
    Layout(tp=2, sp=True, dtype="bfloat16", overlap=True),
]

MORE = [
    replace(layout, family="llama", tied=tied)
    for tied in (False, True)
    for layout in (
        Layout(num_packs=1),
        Layout(num_packs=5, recompute="full"),
        Layout(recompute="selective", distributed=False),
        Layout(tp=2, recompute="full"),
        Layout(pp=2, loss_mean="sequence"),
        Layout(pp=2, vpp=2, recompute="full", num_packs=1),
        Layout(pp=4),
        Layout(pp=3, chunk_layers=(2, 1, 1)),
        Layout(cp=2, num_packs=1, loss_mean="pack"),
        Layout(cp=4),
        Layout(cp=2, recompute="selective", distributed=False),
        Layout(dp=2, distributed=False),
        Layout(dp=3, num_packs=2),
        Layout(dp=4, num_packs=2, overlap=True),
        Layout(tp=2, pp=2),
        Layout(tp=2, pp=2, sp=True, recompute="full"),
        Layout(tp=2, pp=2, vpp=2, sp=True),
        Layout(tp=2, cp=2, sp=True),
        Layout(tp=2, dp=2, sp=True, overlap=True),
        Layout(pp=2, cp=2, recompute="selective"),
        Layout(pp=2, vpp=2, cp=2),
        Layout(pp=2, dp=2, num_packs=4),
        Layout(pp=2, vpp=2, dp=2, overlap=True),
        Layout(cp=2, dp=2, overlap=True),
        Layout(tp=2, pp=2, cp=2, sp=True),
    )
] + [
    replace(layout, family=family)
    for family in ("qwen3_moe", "mixtral")
    for layout in (
        Layout(recompute="full"),
        Layout(tp=2, sp=True),
        Layout(pp=2, vpp=2, recompute="selective"),
        Layout(cp=2, ep=2),
        Layout(dp=2),
        Layout(dp=2, ep=2, distributed=False),
        Layout(dp=2, ep=2, overlap=True),
        Layout(dp=4, ep=2, overlap=True),
        Layout(tp=2, sp=True, dp=2, ep=2),
        Layout(pp=2, dp=2, ep=2),
        Layout(tp=2, sp=True, pp=2, ep=2),
    )
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool, DType], Path]:
    @lru_cache
    def saved(family: str, tied: bool, dtype: DType) -> Path:
        path = tmp_path_factory.mktemp(family)
        model = tiny.save_model(path, family=family, tied=tied)
        if dtype == "bfloat16":  # weights that it can represent
            model.bfloat16().float().save_pretrained(path)
        return path

    return saved


@lru_cache
def reference(path: Path, loss_mean: Any, num_packs: int) -> Reference:
    return Reference(path, loss_mean, num_packs)


class Comparison:
    """The largest relative errors of a layout, by what was compared."""

    def __init__(self, dtype: DType) -> None:
        self.dtype = dtype
        self.worst: dict[str, tuple[float, str]] = {}

    def add(self, what: str, actual: Tensor, expected: Tensor, name: str = "") -> None:
        assert actual.shape == expected.shape, f"{what} {name}: {list(actual.shape)} is not {list(expected.shape)}"
        # A mean is a sum of terms of order 1, and may itself be close to 0.
        scale = max(float(expected.abs().max()), 0.1 if expected.ndim == 0 else 1e-6)
        error = float((actual - expected).abs().max()) / scale
        self.worst[what] = max(self.worst.get(what, (0.0, "")), (error, name))

    def tolerance(self, what: str) -> float:
        if self.dtype == "bfloat16":
            return BF16_TOLERANCE
        return GRADIENT_TOLERANCE if "gradient" in what else TOLERANCE

    def check(self) -> None:
        for what, (error, name) in self.worst.items():
            assert error < self.tolerance(what), f"{what} {name}: relative error {error:.1e}"


def compare(layout: Layout, results: dict[str, Any], path: Path) -> Comparison:
    """Holds what rank 0 saved against the reference. Raises AssertionError where shapes or names differ."""
    comparison = Comparison(layout.dtype)
    # Only the mean over packs depends on which sequences share one.
    expected = reference(path, layout.loss_mean, layout.num_packs if layout.loss_mean == "pack" else 0)
    order = order_on_rank_0(layout)
    packs = packs_of_rank(expected.sequences, layout, dp_rank=0)

    def outputs(name: str, by_sequence: dict[str, list[Tensor]], key: str) -> None:
        actual = torch.cat([x[pack.loss_mask] for pack, x in zip(packs, results[name], strict=True)])
        wanted = torch.cat([by_sequence[key][i][expected.sequences[i].loss_mask] for i in order])
        comparison.add(name, actual, wanted)

    for name, weight in results["weights_before"].items():
        comparison.add("weights_before", weight, expected.weights_before[name], name)
    for name in ("log_probs", "values", "advantages"):
        outputs(name, expected.before, name)
    after, training = expected.after
    for name in ("log_probs", "values"):
        outputs(f"{name}_after", after, name)
    joined = {
        "policy_gradients": training["policy"]["gradients"],
        "critic_gradients": training["critic"]["gradients"],
        "policy_after": expected.weights_after("policy"),
        "critic_after": expected.weights_after("critic"),
    }
    for what, tensors in joined.items():
        wanted = megatron_tensors(tensors, num_kv_heads=expected.policy.config.num_key_value_heads)
        actual = results[what]
        assert set(wanted) <= set(actual), what
        assert set(actual) - set(wanted) <= {"output_layer.weight"}, what  # a tied weight's copy on the last stage
        for name, tensor in wanted.items():
            comparison.add(what, actual[name][: len(tensor)], tensor, name)
    assert set(results["weights_after"]) == set(expected.weights_before)
    for name, tensor in expected.weights_after("policy").items():
        if name in results["weights_after"]:  # experts have names of their own in checkpoints
            comparison.add("weights_after", results["weights_after"][name], tensor, name)
    for model in ("policy", "critic"):
        for actual, wanted in zip(results[f"{model}_metrics"], training[model]["metrics"], strict=True):
            assert actual[f"{model}/skipped_updates"] == 0
            for metric, value in wanted.items():
                comparison.add(metric, torch.tensor(actual[metric]), torch.tensor(value))
    return comparison


def run_and_compare(
    layout: Layout, launch: Any, path: Path, tmp_path: Path, plant: Callable[[], Any] | None = None
) -> Comparison:
    launch(layout.world_size, run_layout, layout, path, tmp_path / "results.pt", plant)
    return compare(layout, torch.load(tmp_path / "results.pt"), path)


@pytest.mark.parametrize("layout", MAIN, ids=str)
def test_layout_equals_one_hugging_face_model(layout: Layout, launch: Any, models: Any, tmp_path: Path) -> None:
    run_and_compare(layout, launch, models(*layout.model), tmp_path).check()


@pytest.mark.slow
@pytest.mark.parametrize("layout", MORE, ids=str)
def test_more_layouts_equal_one_hugging_face_model(layout: Layout, launch: Any, models: Any, tmp_path: Path) -> None:
    run_and_compare(layout, launch, models(*layout.model), tmp_path).check()


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_many_small_buckets_change_nothing(recompute: Any, launch: Any, models: Any, tmp_path: Path) -> None:
    layout = Layout(dp=2, overlap=True, recompute=recompute)
    run_and_compare(layout, launch, models(*layout.model), tmp_path, faults.small_buckets).check()


def test_bfloat16_updates_accumulate_in_float32(models: Any) -> None:
    """Each update is a tenth of the step between two bfloat16 numbers; sixty of them are several such steps."""
    from megatron_orz.engine.megatron_engine import PolicyEngine
    from megatron_orz.engine.parallel import open_mesh

    packs = packs_of_rank(tiny.random_sequences(NUM_SEQUENCES), Layout(), dp_rank=0)
    optimizer = OptimizerConfig(lr=2e-5, eps=1e-8, beta1=0.0, beta2=0.0)  # the sign of the gradient, times the rate
    path = models("qwen2", False, "bfloat16")
    with open_mesh(Layout().parallel, seed=0) as mesh:
        policy = PolicyEngine(ModelConfig(path=path, optimizer=optimizer, dtype="bfloat16"), mesh)

        def weight() -> Tensor:
            return dict(policy.hf_weights())["model.layers.0.mlp.up_proj.weight"].float().clone()

        before = weight()
        policy.step(packs, policy_loss)
        after_one = (weight() - before).abs().mean()
        for _ in range(59):
            policy.step(packs, policy_loss)
        after_sixty = (weight() - before).abs().mean()
    assert after_one < 2e-5
    assert after_sixty > 20 * 2e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", MAIN[:-2] + MORE, ids=str)
def test_layouts_under_nccl_equal_one_hugging_face_model(
    layout: Layout, dtype: DType, launch: Any, models: Any, tmp_path: Path
) -> None:
    if layout.world_size > torch.cuda.device_count():
        pytest.skip(f"needs {layout.world_size} GPUs")
    layout = replace(layout, dtype=dtype)
    run_and_compare(layout, launch, models(*layout.model), tmp_path).check()


@pytest.mark.parametrize(
    ("fault", "layout", "found_in"),
    [
        (faults.wrong_shift, Layout(), "log_probs"),
        (faults.gae_across_boundaries, Layout(), "advantages"),
        (faults.attention_across_boundaries, Layout(), "log_probs"),
        (faults.decayed_norms, Layout(), "critic_after"),
        (faults.unreduced_norm, Layout(tp=2), "policy/grad_norm"),
        (faults.swapped_tp_slices, Layout(tp=2), "weights_before"),
        (faults.separate_norm_gradients, Layout(tp=2, sp=True), "policy_gradients decoder.*norm"),
        (faults.separate_tied_embeddings, Layout(pp=2, tied=True), "policy_gradients embedding"),
        (faults.local_positions, Layout(cp=2), "log_probs"),
        (faults.stale_parameters, Layout(dp=2, overlap=True), "weights_after"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_planted_faults_are_found(
    fault: Any, layout: Layout, found_in: str, launch: Any, models: Any, tmp_path: Path
) -> None:
    comparison = run_and_compare(layout, launch, models(*layout.model), tmp_path, fault)
    tolerances = {what: comparison.tolerance(what) for what in comparison.worst}
    found = [f"{what} {name}" for what, (error, name) in comparison.worst.items() if error > 10 * tolerances[what]]
    assert any(re.match(found_in, line) for line in found), found


@pytest.mark.parametrize(
    ("fault", "layout"),
    [(faults.divided_by_micro_batches, Layout()), (faults.context_factor, Layout(cp=2))],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_loss_that_is_scaled_after_its_gradient_is_an_error(
    fault: Any, layout: Layout, launch: Any, models: Any, tmp_path: Path
) -> None:
    """A head that is fused with its loss has added to `main_grad` before megatron-core sees the loss."""
    with pytest.raises((RuntimeError, AssertionError), match="cannot be scaled any more"):
        run_and_compare(layout, launch, models(*layout.model), tmp_path, fault)
