"""Problems as unit vectors: the mean of a model's last hidden states over their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
import torch

from megatron_orz.data.curation.stage import Advance, Candidate
from megatron_orz.data.curation.store import Store, digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CHUNK = 4096
"""Problems whose vectors are kept together on disk."""
_BATCH = 64
MAX_TOKENS = 512
"""What of a longer problem is seen."""


class Embedder:
    """Vectors of problems by an encoder or a language model, kept in a store."""

    def __init__(self, path: Path, store: Store, *, identity: Any) -> None:
        """path: a Hugging Face checkpoint with a tokenizer. identity: JSON that says which one it is."""
        self._path = path
        self._store = store
        self._identity = identity
        self._parts: tuple[PreTrainedModel, PreTrainedTokenizerBase, torch.device] | None = None

    def __call__(self, candidates: Sequence[Candidate], advance: Advance) -> torch.Tensor:
        """[n, H] float32 of length 1 each. The model is loaded when the first chunk is not in the store."""
        chunks = []
        for start in range(0, len(candidates), _CHUNK):
            texts = [candidate.text for candidate in candidates[start : start + _CHUNK]]
            name, key = f"embeddings/{start:09d}", digest(self._identity, texts)
            if (table := self._store.read(name, key)) is None:
                vectors = self._embed(texts, advance)
                flat = pyarrow.array(vectors.ravel())
                table = pyarrow.table({"vector": pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])})
                self._store.write(name, key, table)
            else:
                advance(len(texts))
            column = table["vector"].combine_chunks()
            chunks.append(torch.from_numpy(column.flatten().to_numpy().reshape(len(texts), -1).copy()))
        return torch.cat(chunks) if chunks else torch.zeros(0, 1)

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str], advance: Advance) -> np.ndarray[Any, np.dtype[np.float32]]:
        model, tokenizer, device = self._load()
        token_ids = tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
        order = sorted(range(len(texts)), key=lambda index: len(token_ids[index]))
        vectors = np.empty((len(texts), model.config.hidden_size), np.float32)
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            padded = tokenizer.pad({"input_ids": [token_ids[index] for index in batch]}, return_tensors="pt").to(device)
            mask = padded["attention_mask"]
            states = model(input_ids=padded["input_ids"], attention_mask=mask).last_hidden_state  # [B, T, H]
            mean = (states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            vectors[batch] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
            advance(len(batch))
        return vectors

    def _load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, torch.device]:
        if self._parts is None:
            from transformers import AutoModel, AutoTokenizer

            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            tokenizer = AutoTokenizer.from_pretrained(self._path, local_files_only=True, trust_remote_code=False)
            tokenizer.padding_side = "right"
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            model = (
                AutoModel.from_pretrained(self._path, dtype=dtype, local_files_only=True, trust_remote_code=False)
                .to(device)
                .eval()
            )
            self._parts = model, tokenizer, device
        return self._parts
