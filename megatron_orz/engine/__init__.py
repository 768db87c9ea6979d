"""The only package that imports megatron-core."""

import warnings

# megatron-core tells of every optional accelerator that is missing, and of calls that newer torch renames.
for message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
    r"`torch\.distributed\.\w+` is deprecated",
):
    warnings.filterwarnings("ignore", message=message)
