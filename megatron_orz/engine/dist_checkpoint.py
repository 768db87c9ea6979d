"""Live models from distributed checkpoints through megatron-core: what one layout saves, any other loads."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state

from megatron_orz.engine.architecture import Architecture
from megatron_orz.engine.model import HeadlessGPTModel
from megatron_orz.engine.torch_dist import CONTENT, TorchDistCheckpoint
from megatron_orz.engine.weight_table import weight_table


def load_torch_dist(
    chunks: Sequence[HeadlessGPTModel], path: Path, architecture: Architecture, *, value_head: bool
) -> None:
    """Fills this rank's parameters. A collective over all ranks.

    value_head: the model is a critic; its head keeps its own weights where the checkpoint is a policy's.

    Raises ValueError when the checkpoint does not hold exactly what the architecture asks for.
    """
    checkpoint = TorchDistCheckpoint(path)
    if checkpoint.has_value_head and not value_head:
        raise ValueError(f"{path} holds a critic; name the checkpoint of a policy")
    checkpoint.check_names(weight_table(architecture, value_head=checkpoint.has_value_head), architecture)
    states = sharded_states(chunks)
    keeps_head = value_head and not checkpoint.has_value_head
    if keeps_head:
        # megatron-core lets the rows of this tensor differ: it would read a row of the language-model head.
        for state in states.values():
            state.pop("output_layer.weight", None)
    fill(chunks, load_sharded(states, path), may_lack=["output_layer.weight"] if keeps_head else [])


def load_sharded(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """What a checkpoint holds for `state`. Collective. Its metadata must be harmless: see `checkpoint_metadata.py`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # megatron-core calls PyTorch by an older name
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(path))
    return loaded


def fill(chunks: Sequence[HeadlessGPTModel], loaded: dict[str, Any], *, may_lack: Sequence[str] = ()) -> None:
    """Hands what was loaded for `sharded_states(chunks)` to the chunks."""
    for index, chunk in enumerate(chunks):
        missing, unexpected = chunk.load_state_dict(loaded[f"chunk{index}"], strict=False)
        left_out = [key for key in missing if not key.endswith("_extra_state")]
        assert set(left_out) <= set(may_lack), left_out
        assert not unexpected, unexpected


def sharded_states(chunks: Sequence[HeadlessGPTModel]) -> dict[str, dict[str, Any]]:
    """The weights of each chunk, live, with their places in the whole model."""
    metadata = {**CONTENT, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    states = [chunk.sharded_state_dict(metadata=metadata) for chunk in chunks]
    # The extra state of a layer is its scaling in 8-bit floats, of which there are none.
    return {
        f"chunk{index}": {key: value for key, value in state.items() if not key.endswith("_extra_state")}
        for index, state in enumerate(states)
    }
