"""A tiny model whose responses have lengths known before: it counts down from the number its prompt ends with.

Every number has two spellings, between which each step chooses at random, and the last one is an answer that is right
or wrong. So responses are really sampled and graded, yet everything that generates with these weights, in-process or in
a server, makes exactly as many tokens.

How: a number n has a code e_n, a random unit vector, as its embedding; the output row of n is e_(n+1), scaled so that
nothing else is ever sampled. The layers compute what layers compute, with output projections too small to matter.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HIDDEN_SIZE = 96
FFN_SIZE = 256
NUM_LAYERS = 2
NUM_HEADS = 4
CERTAINTY = 4.0
"""The next number's logit is this times sqrt(HIDDEN_SIZE), those of others are normal with this as their spread."""

PAD, EOS = "<pad>", "<eos>"
ANSWER = "1"
SPELLINGS = 2
MAX_NUMBER = 543
"""The longest response, in tokens. With two spellings each, and two special tokens: 1088 words, 0.43 M parameters."""


def save_model(path: Path, *, seed: int = 0) -> None:
    """Writes a Hugging Face checkpoint with its tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = [PAD, EOS, *(word(n, s) for n in range(1, MAX_NUMBER + 1) for s in range(SPELLINGS))]
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=HIDDEN_SIZE,
            intermediate_size=FFN_SIZE,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=NUM_HEADS,
            num_key_value_heads=NUM_HEADS,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=vocabulary.index(EOS),
            pad_token_id=vocabulary.index(PAD),
        )
    )
    codes = torch.nn.functional.normalize(torch.randn(MAX_NUMBER + 2, HIDDEN_SIZE, generator=generator))
    with torch.no_grad():
        embedding, output = model.model.embed_tokens.weight, model.lm_head.weight
        output.zero_()
        output[vocabulary.index(EOS)] = CERTAINTY * codes[1]
        for n in range(1, MAX_NUMBER + 1):
            rows = slice(2 + SPELLINGS * (n - 1), 2 + SPELLINGS * n)
            embedding[rows], output[rows] = codes[n], CERTAINTY * codes[n + 1]
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 0.01
            layer.mlp.down_proj.weight *= 0.01
    model.save_pretrained(path)
    words = Tokenizer(WordLevel({text: index for index, text in enumerate(vocabulary)}, unk_token=PAD))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=EOS, pad_token=PAD).save_pretrained(path)


def word(number: int, spelling: int) -> str:
    """The text of a token. The last number of a response is its answer, right in one of its spellings."""
    if number == 1:
        return rf"<answer>\boxed{{{spelling}}}</answer>"
    return f"{number}{'ab'[spelling]}"


def write_prompts(path: Path, response_lengths: Sequence[int], *, prompt_tokens: int, seed: int = 0) -> None:
    """A prompt for each response length (tokens, the end-of-sequence token among them) as lines of JSON."""
    rng = random.Random(seed)
    lines = []
    for length in response_lengths:
        filler = [word(rng.randint(2, 9), 0) for _ in range(prompt_tokens - 1)]
        lines.append(json.dumps({"question": " ".join([*filler, word(length, 0)]), "answer": ANSWER}) + "\n")
    path.write_text("".join(lines))
