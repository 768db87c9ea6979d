"""The baseline of training: the same loss on the same tokens with transformers, PyTorch's AdamW and nothing of ours.

    packed      one row a pack; a block-diagonal mask that transformers builds from the positions, or on CUDA in 16 bits
                FlashAttention over sequences of different lengths
    padded      rows of one sequence each, padded to the longest of their micro-batch

The head is applied where it must be: to the response tokens of a pack, to all columns that hold any of padded rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AutoModel, AutoModelForCausalLM

from megatron_orz.config import OptimizerConfig
from megatron_orz.engine.attention import PackLayout, varlen_attention
from megatron_orz.types import Experience, LossOutput, PolicyOutput

Kind = Literal["policy", "critic"]
VARLEN = "varlen"
"""The `attn_implementation` of packs on CUDA."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A micro-batch: B rows of n positions, flattened in `experience`."""

    experience: Experience
    shape: tuple[int, int]
    attention_mask: Tensor | None
    """[B, n] bool, False on padding; None where the row is a pack."""

    def to(self, device: torch.device) -> Rows:
        """The same micro-batch on another device."""
        mask = None if self.attention_mask is None else self.attention_mask.to(device)
        return replace(self, experience=self.experience.to(device), attention_mask=mask)


def packed_rows(experience: Sequence[Experience]) -> list[Rows]:
    """Each pack as one row."""
    return [Rows(experience=e, shape=(1, e.tokens.shape[0]), attention_mask=None) for e in experience]


def padded_rows(experience: Sequence[Experience], num_rows: int, *, by_length: bool = False) -> list[Rows]:
    """The sequences of all packs, `num_rows` at a time in their order, or from the longest to the shortest."""
    whole = _concatenate(experience)
    sequences = list(itertools.pairwise(whole.cu_seqlens.tolist()))
    if by_length:
        sequences.sort(key=lambda sequence: sequence[0] - sequence[1])
    batches = []
    for first in range(0, len(sequences), num_rows):
        members = torch.tensor(sequences[first : first + num_rows])
        starts, lengths = members[:, :1], members.diff()
        column = torch.arange(int(lengths.max()))
        is_token = column < lengths
        rows = whole.select(torch.where(is_token, starts + column, 0).flatten())
        rows = replace(rows, loss_mask=rows.loss_mask & is_token.flatten())
        batches.append(Rows(experience=rows, shape=(len(members), len(column)), attention_mask=is_token))
    return batches


def _concatenate(experience: Sequence[Experience]) -> Experience:
    joined: dict[str, Any] = {
        name: torch.cat([getattr(e, name) for e in experience]) for name in experience[0].token_arrays()
    }
    lengths = torch.cat([e.cu_seqlens.diff() for e in experience])
    boundaries = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return Experience(**joined, cu_seqlens=boundaries, max_seqlen=int(lengths.max()))


class TransformersTrainer:
    """A policy or a critic of transformers, with its optimizer."""

    def __init__(
        self,
        path: Path,
        kind: Kind,
        optimizer: OptimizerConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        value_head: Tensor | None = None,
    ) -> None:
        """value_head: [1, H], of a critic."""
        auto = AutoModelForCausalLM if kind == "policy" else AutoModel
        options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
        self.model = auto.from_pretrained(path, trust_remote_code=False, **options).to(device)
        self.parameters: list[Tensor] = list(self.model.parameters())
        self._kind = kind
        self._head: torch.nn.Linear | None = None
        if value_head is not None:
            self._head = torch.nn.Linear(value_head.shape[1], 1, bias=False, device=device, dtype=dtype)
            with torch.no_grad():
                self._head.weight.copy_(value_head)
            self.parameters += self._head.parameters()
        self._has_kernel = device.type == "cuda" and dtype.itemsize == 2
        self._clip_grad = optimizer.clip_grad
        self._optimizer = torch.optim.AdamW(
            self.parameters,
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )

    @torch.no_grad()
    def infer(self, batches: Sequence[Rows]) -> dict[str, Tensor]:
        """{outputs}: log-probabilities or values of all response tokens, on the CPU."""
        self.model.eval()
        return {"outputs": torch.cat([self._outputs(rows).float().cpu() for rows in batches])}

    def step(self, batches: Sequence[Rows], loss: Callable[..., LossOutput]) -> dict[str, Tensor]:
        """One optimizer step; the loss is the mean over all response tokens. Returns {loss, grad_norm}."""
        self.model.train()
        num_tokens = sum(int(rows.experience.loss_mask.sum()) for rows in batches)
        self._optimizer.zero_grad()
        total = torch.zeros((), device=self.parameters[0].device)
        for rows in batches:
            mask = rows.experience.loss_mask
            outputs = self._outputs(rows).float()
            of_policy = PolicyOutput(log_probs=outputs, entropy=torch.zeros_like(outputs))
            given = of_policy if self._kind == "policy" else outputs
            kept = rows.experience.select(mask.nonzero().squeeze(1))
            mean = loss(given, kept).per_token.sum() / num_tokens
            mean.backward()
            total += mean.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self._clip_grad)
        self._optimizer.step()
        return {"loss": total.cpu(), "grad_norm": grad_norm.cpu()}

    def resident_bytes(self) -> dict[str, int]:
        """What it holds between steps, by part."""
        states = [value for state in self._optimizer.state.values() for value in state.values()]
        return {
            "weights": sum(parameter.nbytes for parameter in self.parameters),
            "gradients": sum(parameter.grad.nbytes for parameter in self.parameters if parameter.grad is not None),
            "main weights": 0,
            "optimizer": sum(value.nbytes for value in states),
        }

    def _outputs(self, rows: Rows) -> Tensor:
        """[n] of the response tokens, in the order of the rows."""
        e, mask = rows.experience, rows.experience.loss_mask
        inputs: dict[str, Any] = {"input_ids": e.tokens.view(rows.shape), "use_cache": False}
        if rows.attention_mask is None:
            inputs["position_ids"] = e.position_ids.view(rows.shape)
        else:
            inputs["attention_mask"] = rows.attention_mask
        uses_kernel = rows.attention_mask is None and self._has_kernel
        self.model.set_attn_implementation(VARLEN if uses_kernel else "sdpa")
        if uses_kernel:
            inputs["layout"] = PackLayout(
                cu_seqlens_q=e.cu_seqlens,
                cu_seqlens_kv=e.cu_seqlens,
                max_seqlen_q=e.max_seqlen,
                max_seqlen_kv=e.max_seqlen,
            )
        if self._head is not None:
            hidden = self.model(**inputs).last_hidden_state.flatten(0, 1)
            return self._head(hidden[mask]).squeeze(1)
        if rows.attention_mask is None:
            index = mask.nonzero().squeeze(1)
            logits = self.model(**inputs, logits_to_keep=index).logits[0]
            return -F.cross_entropy(logits.float(), e.targets[index], reduction="none")
        kept = mask.view(rows.shape).any(0).nonzero().squeeze(1)
        logits = self.model(**inputs, logits_to_keep=kept).logits
        targets = e.targets.view(rows.shape)[:, kept]
        log_probs = -F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return log_probs[mask.view(rows.shape)[:, kept].flatten()]


def _varlen(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """FlashAttention over a pack, with transformers' signature: [1, heads, T, d] -> [1, T, heads, d]."""
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return varlen_attention(q, k, v, options["layout"], options["scaling"])[None], None


AttentionInterface.register(VARLEN, _varlen)
