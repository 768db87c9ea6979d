"""How much memory a run takes: the peak of each phase of a step, and what every part of every model holds.

    memory/<phase>_peak_gib      the most that existed at once from the end of the last phase to the end of this one
    memory/<phase>_beyond_gib    the peak less what there is at the end: activations, logits, all that is temporary
    memory/<model>_<part>_gib    weights, gradients, main_weights (float32, of a bfloat16 model), optimizer (moments)
    memory/host_gib              resident memory of the process at the end of the step

Of the rank that has most. Peaks are allocated bytes of a GPU or, where there is none, resident ones of the process,
whose allocator keeps small tensors that are freed: what is beyond is then less than was needed.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import Protocol

import torch

from megatron_orz.engine.high_water import forget_peak, held_bytes, peak_bytes, resident_bytes
from megatron_orz.ranks import Ranks
from megatron_orz.types import Metrics

GIB = 2**30

logger = logging.getLogger(__name__)


class Resident(Protocol):
    """A model that knows what it holds."""

    def resident_bytes(self) -> dict[str, int]:
        """What this rank holds of it between steps, by part."""
        ...


class MemoryMeter:
    """Listens to the spans of a log, on every rank. Without peaks where the kernel does not let one begin anew."""

    def __init__(self, models: Mapping[str, Resident], *, ranks: Ranks, device: torch.device) -> None:
        self._models = models
        self._ranks = ranks
        self._device = device
        self._peaks: defaultdict[str, int] = defaultdict(int)
        self._has_peaks = True
        try:
            forget_peak(device)
        except OSError as error:
            self._has_peaks = False
            logger.warning("the memory of each phase is not measured: %s", error)

    def on_span(self, name: str, start: float, end: float) -> None:
        """Takes the peak since the last span."""
        if not self._has_peaks:
            return
        peak, held = peak_bytes(self._device), held_bytes(self._device)
        forget_peak(self._device)
        self._peaks[f"{name}_peak"] = max(self._peaks[f"{name}_peak"], peak)
        self._peaks[f"{name}_beyond"] = max(self._peaks[f"{name}_beyond"], peak - held)

    def metrics(self) -> Metrics:
        """Of the step that ends, the same on every rank. Collective."""
        mine = {**self._peaks, "host": resident_bytes()}
        for name, model in self._models.items():
            parts = model.resident_bytes().items()
            mine |= {f"{name}_{part.replace(' ', '_')}": size for part, size in parts if size}
        self._peaks.clear()
        most: dict[str, int] = {}
        for of_rank in self._ranks.gather(mine):
            most |= {what: max(size, most.get(what, 0)) for what, size in of_rank.items()}
        return {f"memory/{what}_gib": size / GIB for what, size in most.items()}
