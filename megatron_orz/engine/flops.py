"""Floating-point operations of a model on given sequences: what the benchmarks and the metrics of a run divide by time.

A product of [m, k] and [k, n] counts 2 m k n. Of a model whose layers hold N weights in matrices (the experts a token
runs through, not the others), on sequences of n positions, of which h go through the head:

    layers      2 N  sum n
    attention   2 heads head_dim  sum n (n + 1)     in each layer: scores and weighted values of n (n + 1) / 2 pairs
    head        2 V H h                             of a policy; 2 H h of a critic

That is the forward pass. The backward pass takes twice as much, so that a training step takes three times: the 6 N D of
Kaplan et al. (2020, section 2.1), with attention beside it. Norms, activations, rotary angles and the softmax are left
out, and so are embeddings, which are looked up. What recomputation adds is counted apart: it is work of the hardware,
not of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_orz.config import Recompute
from megatron_orz.engine.architecture import Architecture
from megatron_orz.engine.weight_table import Entry, weight_table

BACKWARD = 2
"""Operations of the backward pass, as multiples of the forward pass: gradients of inputs and of weights."""


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Of a forward pass of the undivided model over some sequences."""

    layers: int
    attention: int
    head: int

    @property
    def forward(self) -> int:
        return self.layers + self.attention + self.head

    @property
    def training(self) -> int:
        """Forward and backward pass, each once."""
        return (1 + BACKWARD) * self.forward

    def recomputed(self, recompute: Recompute) -> int:
        """What the backward pass computes a second time, beyond `training`."""
        return {"none": 0, "selective": self.attention, "full": self.layers + self.attention}[recompute]


def model_flops(
    architecture: Architecture, lengths: Sequence[int], *, num_head_tokens: int, value_head: bool = False
) -> Flops:
    """lengths: positions of each sequence. num_head_tokens: positions that go through the head, in all."""
    a = architecture
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return Flops(
        layers=2 * weights_per_token(a) * sum(lengths),
        attention=attention_flops(a, pairs),
        head=2 * a.hidden_size * (1 if value_head else a.vocab_size) * num_head_tokens,
    )


def attention_flops(architecture: Architecture, num_pairs: int) -> int:
    """Of all layers, forward. num_pairs: queries with each of the keys they see, in one head of one layer."""
    a = architecture
    return 4 * a.num_layers * a.num_heads * a.head_dim * num_pairs


def weights_per_token(architecture: Architecture) -> int:
    """N: elements of the layers' matrices that one token is multiplied with."""
    return sum(
        _num_matrix_elements(entry, architecture)
        for entry in weight_table(architecture, value_head=True)
        if entry.layer is not None
    )


def _num_matrix_elements(entry: Entry, architecture: Architecture) -> int:
    if entry.expert is not None:
        assert architecture.experts is not None
        if entry.expert >= architecture.experts.experts_per_token:  # as large as those a token does run through
            return 0
    return sum(math.prod(shape) for shape in entry.hf.values() if len(shape) == 2)
