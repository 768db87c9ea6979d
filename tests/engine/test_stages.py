"""Layers on pipeline chunks: every layer once, in order, as even as can be."""

from __future__ import annotations

import pytest

from megatron_orz.config import ParallelConfig
from megatron_orz.engine.stages import layers_of_chunks, stage_of_layer


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (2, 1), (3, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("num_layers", [8, 9, 15, 28])
def test_chunks_hold_every_layer_once_in_order(num_layers: int, pp: int, vpp: int) -> None:
    chunks = layers_of_chunks(num_layers, ParallelConfig(pp=pp, vpp=vpp))
    assert len(chunks) == pp * vpp
    assert [layer for chunk in chunks for layer in chunk] == list(range(num_layers))
    sizes = [len(chunk) for chunk in chunks]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


def test_stages_take_turns() -> None:
    parallel = ParallelConfig(pp=2, vpp=2)
    assert layers_of_chunks(7, parallel) == [range(2), range(2, 4), range(4, 6), range(6, 7)]
    assert [stage_of_layer(layer, 7, parallel) for layer in range(7)] == [0, 0, 1, 1, 0, 0, 1]


def test_given_layers_are_obeyed() -> None:
    parallel = ParallelConfig(pp=3, chunk_layers=(1, 4, 2))
    assert layers_of_chunks(7, parallel) == [range(1), range(1, 5), range(5, 7)]
    assert [stage_of_layer(layer, 7, parallel) for layer in range(7)] == [0, 1, 1, 1, 1, 2, 2]
