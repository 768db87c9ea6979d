"""A checkpoint or a layout that cannot work is refused by name, before any model is built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_orz.config import ParallelConfig
from megatron_orz.engine.architecture import read_architecture
from tests.engine import tiny


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny.save_model(path)
    return path


def edited(model_dir: Path, target: Path, **changes: object) -> Path:
    config = json.loads((model_dir / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_architecture_reads_the_config(model_dir: Path) -> None:
    architecture = read_architecture(model_dir)
    assert architecture.num_layers == 4
    assert architecture.head_dim == 16
    assert architecture.qkv_bias
    assert not architecture.tied_embeddings
    assert architecture.padded_vocab_size(2) == 132
    assert architecture.padded_vocab_size(1) == 131


def test_missing_and_malformed_configs_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="model_type None is not one of"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type 'bert' is not one of"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_type = 'yarn'"),
    ],
)
def test_unsupported_options_are_named(
    model_dir: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_architecture(edited(model_dir, tmp_path, **changes))


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (ParallelConfig(tp=3), "parallel.tp 3 does not divide the model's 4 attention heads"),
        (ParallelConfig(tp=4), "parallel.tp 4 does not divide the model's 2 key-value heads"),
        (ParallelConfig(pp=3), "parallel.pp 3 does not divide the model's 4 layers"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(model_dir: Path, parallel: ParallelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_architecture(model_dir).check_layout(parallel)


def test_world_size_must_be_a_multiple_of_the_layout() -> None:
    with pytest.raises(ValueError, match="world size 3 is not a multiple of tp\\*pp = 2\\*1"):
        ParallelConfig(tp=2).check_world_size(3)
