"""Rotary position embedding: the angle by which each pair of a head's features turns from one position to the next."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LlamaScaling:
    """Llama 3.1's stretch of the slow rotations, for contexts longer than those of the first training."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, kw_only=True)
class Rope:
    """theta ** (-2i / head_dim) radians for pair i, scaled or not."""

    theta: float
    head_dim: int
    scaling: LlamaScaling | None = None

    def frequencies(self) -> Tensor:
        """[head_dim / 2] float32, radians for each position.

        Scaled, a frequency f that makes r = original_max_position * f / (2 pi) turns in the original context becomes

            f * (s + (1 - s) / factor),  s = clip((r - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
        """
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        frequencies = 1.0 / self.theta**exponents
        if self.scaling is None:
            return frequencies
        low, high = self.scaling.low_freq_factor, self.scaling.high_freq_factor
        turns = self.scaling.original_max_position * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * kept + frequencies / self.scaling.factor * (1 - kept)
