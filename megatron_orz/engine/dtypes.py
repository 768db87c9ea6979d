"""Types of weights, by their names in a config and in safetensors files."""

from __future__ import annotations

import torch

from megatron_orz.config import DType

TORCH_DTYPES: dict[DType, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Those a model may be trained in."""

SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Those a checkpoint may hold."""
