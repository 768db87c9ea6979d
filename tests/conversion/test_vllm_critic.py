"""vLLM reads a converted critic as a reward model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForTokenClassification

from megatron_orz.conversion.convert import plan_hf_to_megatron, plan_megatron_to_hf
from megatron_orz.data.synthetic import build_tokenizer
from tests.conversion.checkpoints import COMPANIONS, run, save_critic

SERVE = """
import json, sys
from vllm import LLM, PoolingParams, TokensPrompt

if __name__ == "__main__":
    path, prompt = sys.argv[1], TokensPrompt(prompt_token_ids=json.loads(sys.argv[2]))
    model = LLM(path, runner="pooling", dtype="float32", max_model_len=128, enforce_eager=True)
    options = {"pooling_task": "token_classify", "pooling_params": PoolingParams(use_activation=False)}
    (output,) = model.encode([prompt], **options)
    print("values", json.dumps(output.outputs.data[:, 0].tolist()))
"""


@pytest.mark.slow
def test_vllm_gives_the_values_of_a_critic(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    tokenizer = build_tokenizer()
    source = save_critic(tmp_path / "hf", "qwen3", vocab_size=len(tokenizer))  # vLLM's CPU kernels want heads of 32
    for name in COMPANIONS:
        (source / name).unlink()
    tokenizer.save_pretrained(source)
    run(plan_hf_to_megatron(source, tmp_path / "megatron"))
    run(plan_megatron_to_hf(tmp_path / "megatron", tmp_path / "critic"))
    ids = tokenizer("3 + 4 = 7")["input_ids"]

    (tmp_path / "serve.py").write_text(SERVE)
    command = [sys.executable, str(tmp_path / "serve.py"), str(tmp_path / "critic"), json.dumps(ids)]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    output = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    (line,) = [line for line in output.stdout.splitlines() if line.startswith("values ")] or [output.stderr]
    values = torch.tensor(json.loads(line.removeprefix("values ")))

    with torch.no_grad():
        expected = AutoModelForTokenClassification.from_pretrained(source).eval()(torch.tensor([ids])).logits[0, :, 0]
    assert torch.allclose(values, expected, atol=1e-4)
