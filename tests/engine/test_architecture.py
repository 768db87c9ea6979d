"""A checkpoint or a layout that cannot work is refused by name, before any model is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
        (ParallelConfig(pp=5), r"4 layers cannot fill pp\*vpp = 5\*1 chunks"),
        (ParallelConfig(pp=2, vpp=3), r"4 layers cannot fill pp\*vpp = 2\*3 chunks"),
        (ParallelConfig(pp=2, chunk_layers=(2, 3)), "chunk_layers .* adds up to 5, but the model has 4 layers"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(model_dir: Path, parallel: ParallelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_architecture(model_dir).check_layout(parallel)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cp": 0}, "parallel.cp 0 is not at least 1"),
        ({"vpp": 2}, "parallel.vpp 2 interleaves .* it needs parallel.pp > 1"),
        ({"pp": 2, "chunk_layers": (4,)}, r"chunk_layers has 1 entries, but pp\*vpp = 2\*1 chunks need one each"),
        ({"pp": 2, "chunk_layers": (4, 0)}, r"chunk_layers \(4, 0\) leaves a chunk without a layer"),
        ({"sequence_parallel": True}, "it needs parallel.tp > 1"),
    ],
)
def test_grids_that_contradict_themselves_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**fields)


@pytest.mark.parametrize(
    ("parallel", "world_size", "message"),
    [
        (ParallelConfig(tp=2), 3, r"world size 3 is not a multiple of tp\*pp\*cp = 2\*1\*1"),
        (ParallelConfig(tp=2, cp=3), 8, r"world size 8 is not a multiple of tp\*pp\*cp = 2\*1\*3"),
        (ParallelConfig(pp=2, ep=4), 4, "parallel.ep 4 does not divide the 2 ranks of a pipeline stage"),
    ],
)
def test_world_size_must_fit_the_grid(parallel: ParallelConfig, world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parallel.check_world_size(world_size)
