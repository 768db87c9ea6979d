"""A distributed checkpoint belongs to no layout: what the converter or any layout writes, every layout loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_orz.config import CriticConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_orz.conversion.convert import plan_hf_to_megatron, plan_megatron_to_hf
from tests.conversion.checkpoints import assert_same_tensors, run, save_critic, save_policy, tensors_of
from tests.engine import tiny
from tests.launch import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZER = OptimizerConfig(lr=1e-3)
LAYOUTS = {
    "one": ParallelConfig(),
    "tp2": ParallelConfig(tp=2, sequence_parallel=True, timeout_s=300),
    "pp2": ParallelConfig(pp=2, timeout_s=300),
    "ep2": ParallelConfig(ep=2, timeout_s=300),
}
SOME = ("qwen2", "qwen3", "qwen3_moe")  # biases and padded rows; tied embeddings; experts and a dense layer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Policy and critic of every family in both forms: {family}/{model}/hf and megatron."""
    path = tmp_path_factory.mktemp("families")
    for family in tiny.FAMILIES:
        for model, save in (("policy", save_policy), ("critic", save_critic)):
            source = save(path / family / model / "hf", family)
            run(plan_hf_to_megatron(source, path / family / model / "megatron"))
    return path


def engine_of(model: str, path: Path, mesh: Any) -> Any:
    from megatron_orz.engine.megatron_engine import CriticEngine, PolicyEngine

    if model == "policy":
        return PolicyEngine(ModelConfig(path=path, optimizer=OPTIMIZER), mesh)
    return CriticEngine(CriticConfig(path=path, optimizer=OPTIMIZER), mesh, seed=5)


def weights_of(engine: Any) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in engine.hf_weights()}


def assert_equal(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    expected = {name: tensor for name, tensor in expected.items() if name != "score.bias"}
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


def load_and_save(root: Path, families: tuple[str, ...], layout: str, form: str, save: bool) -> None:
    """What one rank does: loads every model of a form, compares it with its source, and saves it again."""
    from megatron.core import dist_checkpointing

    from megatron_orz.engine import platform
    from megatron_orz.engine.dist_checkpoint import sharded_states
    from megatron_orz.engine.parallel import open_mesh
    from megatron_orz.engine.torch_dist import CONTENT

    with open_mesh(LAYOUTS[layout], seed=0) as mesh:
        for path in (root / family / model for family in families for model in ("policy", "critic")):
            engine = engine_of(path.name, path / form, mesh)
            assert_equal(weights_of(engine), tensors_of(path / "hf"))
            if save:
                (path / layout).mkdir(exist_ok=True)
                with platform.megatron_calls():
                    states = sharded_states(engine.chunks)
                    dist_checkpointing.save(states, str(path / layout), content_metadata=CONTENT)
                (path / layout / "config.json").write_text((path / "hf" / "config.json").read_text())


def test_every_family_is_loaded_from_a_converted_checkpoint(root: Path) -> None:
    load_and_save(root, tuple(tiny.FAMILIES), "one", "megatron", save=False)


def test_a_critic_starts_from_the_checkpoint_of_a_policy_in_either_form(root: Path) -> None:
    from megatron_orz.engine.parallel import open_mesh

    with open_mesh(ParallelConfig(), seed=0) as mesh:
        for family in ("qwen2", "qwen3"):
            path = root / family / "policy"
            from_hf, from_megatron = (weights_of(engine_of("critic", path / form, mesh)) for form in ("hf", "megatron"))
            assert_equal(from_megatron, from_hf)
            assert from_megatron["score.weight"].abs().sum() > 0
            body = tensors_of(path / "hf")
            body.pop("lm_head.weight", None)
            assert from_hf.keys() == body.keys() | {"score.weight"}


def test_a_policy_does_not_start_from_a_critic(root: Path) -> None:
    from megatron_orz.engine.parallel import open_mesh

    path = root / "qwen2" / "critic"
    with open_mesh(ParallelConfig(), seed=0) as mesh:
        with pytest.raises(ValueError, match="megatron holds a critic; name the checkpoint of a policy"):
            engine_of("policy", path / "megatron", mesh)
        with pytest.raises(ValueError, match=r"does not account for, e\.g\. score\.bias"):
            engine_of("policy", path / "hf", mesh)


def check_way(root: Path, families: tuple[str, ...], saved_by: str, loaded_by: str) -> None:
    """Converter -> one layout -> another layout, and -> Hugging Face."""
    for form, layout, save in (("megatron", saved_by, True), (saved_by, loaded_by, False)):
        world_size = 1 if layout == "one" else 2
        if form != layout:
            run_ranks(world_size, load_and_save, root, families, layout, form, save)
    for path in (root / family / model for family in families for model in ("policy", "critic")):
        run(plan_megatron_to_hf(path / saved_by, path / f"from_{saved_by}_{loaded_by}"))
        assert_same_tensors(path / "hf", path / f"from_{saved_by}_{loaded_by}")


def test_what_tensor_parallel_ranks_save_becomes_a_hugging_face_checkpoint(root: Path) -> None:
    check_way(root, ("qwen2", "qwen3_moe"), "tp2", "tp2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved_by", "loaded_by", "families"),
    [
        ("one", "tp2", SOME),
        ("one", "pp2", SOME),
        ("tp2", "pp2", tuple(tiny.FAMILIES)),
        ("pp2", "tp2", tuple(tiny.FAMILIES)),
        ("tp2", "one", SOME),
        ("pp2", "one", SOME),
        ("ep2", "pp2", ("qwen3_moe", "mixtral")),
        ("pp2", "ep2", ("qwen3_moe", "mixtral")),
    ],
)
def test_any_layout_loads_what_any_other_saves(
    root: Path, saved_by: str, loaded_by: str, families: tuple[str, ...]
) -> None:
    check_way(root, families, saved_by, loaded_by)
