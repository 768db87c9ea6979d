"""Which layers lie on which pipeline stage."""

from __future__ import annotations

from itertools import accumulate, pairwise

from megatron_orz.config import ParallelConfig


def layers_of_chunks(num_layers: int, parallel: ParallelConfig) -> list[range]:
    """The layers of each model chunk, in the order of the layers. Chunk i lies on stage i % pp.

    Where the layers do not divide evenly the first chunks hold one more each: the last one has the head besides.
    7 layers on pp 2, vpp 2:

        stage 0     0 1     4 5
        stage 1         2 3     6

    Raises ValueError when a chunk would be empty, or when `chunk_layers` does not add up.
    """
    num_chunks = parallel.pp * parallel.vpp
    if num_layers < num_chunks:
        raise ValueError(
            f"the model's {num_layers} layers cannot fill pp*vpp = {parallel.pp}*{parallel.vpp} chunks; "
            "lower parallel.pp or parallel.vpp"
        )
    sizes = parallel.chunk_layers or tuple(
        num_layers // num_chunks + (chunk < num_layers % num_chunks) for chunk in range(num_chunks)
    )
    if sum(sizes) != num_layers:
        raise ValueError(
            f"parallel.chunk_layers {sizes} adds up to {sum(sizes)}, but the model has {num_layers} layers; "
            "change them, or leave them out"
        )
    return [range(start, end) for start, end in pairwise(accumulate(sizes, initial=0))]


def stage_of_layer(layer: int, num_layers: int, parallel: ParallelConfig) -> int:
    """The pipeline stage that holds a layer, both counted from 0."""
    chunks = layers_of_chunks(num_layers, parallel)
    return next(index for index, layers in enumerate(chunks) if layer in layers) % parallel.pp
