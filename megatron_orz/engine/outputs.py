"""What a model computes for one text, from a checkpoint of either form, in this process alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from megatron_orz.config import DType, ParallelConfig
from megatron_orz.engine import platform
from megatron_orz.engine.architecture import read_architecture
from megatron_orz.engine.attention import pack_layout
from megatron_orz.engine.dtypes import TORCH_DTYPES
from megatron_orz.engine.hf_checkpoint import HFCheckpoint
from megatron_orz.engine.model import ValueHead, build_model
from megatron_orz.engine.parallel import open_mesh
from megatron_orz.engine.torch_dist import TorchDistCheckpoint, is_torch_dist
from megatron_orz.engine.weights import load


def transformers_outputs(path: Path, token_ids: list[int], dtype: DType) -> Tensor:
    """Logits [T, V], or values [T, 1] of a critic, by transformers from a Hugging Face checkpoint; float32."""
    auto = AutoModelForTokenClassification if HFCheckpoint(path).has_value_head else AutoModelForCausalLM
    model = auto.from_pretrained(path, dtype=TORCH_DTYPES[dtype], local_files_only=True, trust_remote_code=False).eval()
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].float()


def megatron_outputs(path: Path, token_ids: list[int], dtype: DType) -> Tensor:
    """Logits [T, V], or values [T, 1] of a critic, by megatron-core from a checkpoint of either form; float32."""
    architecture = read_architecture(path)
    checkpoint = TorchDistCheckpoint(path) if is_torch_dist(path) else HFCheckpoint(path)
    head = ValueHead(architecture.hidden_size, init="normal", seed=0) if checkpoint.has_value_head else None
    with open_mesh(ParallelConfig(), seed=0) as mesh, platform.megatron_calls(), torch.no_grad():
        chunks = build_model(architecture, mesh, dtype=dtype, recompute="none", value_head=head)
        load(chunks, path, architecture, mesh, value_head=head is not None)
        model = chunks[0].eval()
        num_tokens = len(token_ids)
        cu_seqlens = torch.tensor([0, num_tokens], dtype=torch.int32, device=mesh.device)
        hidden = model(
            input_ids=torch.tensor([token_ids], device=mesh.device),
            position_ids=torch.arange(num_tokens, device=mesh.device)[None],
            attention_mask=None,
            packed_seq_params=pack_layout(cu_seqlens, num_tokens, dtype=TORCH_DTYPES[dtype]),
        ).squeeze(1)
        if head is not None:
            return head(hidden)[:, None].cpu()
        return (hidden @ model.output_weight.t()).float().cpu()
