"""An exported policy is chatted with as it was trained: transformers and vLLM write the training prompt's token ids."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_orz.checkpoint.hf_export import export_hf
from megatron_orz.config import FleetConfig, ModelConfig, OptimizerConfig
from megatron_orz.data.chat_template import chat_template
from megatron_orz.data.prompts import load_prompts
from megatron_orz.data.synthetic import build_tokenizer
from megatron_orz.rollout.servers import MODEL_NAME, InferenceServer
from megatron_orz.rollout.token import server_token
from megatron_orz.rollout.vllm_server import vllm_launch
from megatron_orz.types import Prompt
from tests.engine import tiny

PROBLEMS = ["7+8-3+9", 'What is $\\frac{1}{2}$ of "{x | x > 1}"?\n\n{% raw %} ünï😀 ', "User: {problem}"]


def export(place: Path, template: str, *, family: str = "qwen2") -> Path:
    """A policy as a run on this prompt exports it, from a base whose tokenizer chats otherwise."""
    tokenizer = build_tokenizer()
    model = tiny.save_model(place / "base", family=family, tied=True, vocab_size=len(tokenizer))
    tokenizer.chat_template = "{% for m in messages %}another way{% endfor %}"
    tokenizer.save_pretrained(place / "base", save_jinja_files=False)
    assert "another way" in (place / "base" / "tokenizer_config.json").read_text()
    weights = ((name, weight.detach()) for name, weight in model.named_parameters())
    jinja = chat_template(template)
    export_hf(weights, source=place / "base", target=place / "final", is_writer=True, chat_template=jinja)
    return place / "final"


def training_prompts(place: Path, template: str, checkpoint: Path) -> list[Prompt]:
    """The prompts as a training run reads them."""
    rows = [{"question": problem, "answer": "1"} for problem in PROBLEMS]
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompts, _ = load_prompts([place / "train.jsonl"], tokenizer, template=template, max_prompt_tokens=2000)
    return prompts


def test_transformers_writes_the_training_prompt(tmp_path: Path) -> None:
    checkpoint = export(tmp_path, "orz")
    assert "another way" not in (checkpoint / "tokenizer_config.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for problem, prompt in zip(PROBLEMS, training_prompts(tmp_path, "orz", checkpoint), strict=True):
        messages = [{"role": "user", "content": problem}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == prompt.token_ids
        assert len(ids) > 100


@contextlib.contextmanager
def served(checkpoint: Path, place: Path) -> Iterator[str]:
    """The address of a vLLM server of the checkpoint, started as a run starts it."""
    fleet = FleetConfig(max_model_tokens=512, kv_cache_gib=0.1, cpu_threads=1)
    launch = vllm_launch(ModelConfig(path=checkpoint, optimizer=OptimizerConfig(lr=1.0)), fleet, index=0)
    with InferenceServer(launch, start_timeout_s=400, log_path=place / "vllm.log") as server:
        server.wait_until_healthy()
        yield server.url


@pytest.mark.slow
def test_vllm_chats_on_the_training_prompt(tmp_path: Path) -> None:
    """/v1/chat/completions says which ids it was prompted with, and greedily goes on as transformers does from them."""
    # A prompt that fits the tiny model, whose heads are as wide as vLLM's kernels need.
    checkpoint = export(tmp_path, "short", family="qwen3")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    headers = {"Authorization": f"Bearer {server_token()}"}
    with served(checkpoint, tmp_path) as url, httpx.Client(base_url=url, headers=headers, timeout=120) as client:
        for problem, prompt in zip(PROBLEMS, training_prompts(tmp_path, "short", checkpoint), strict=True):
            request = {
                "model": MODEL_NAME,
                "messages": [{"role": "user", "content": problem}],
                "temperature": 0,
                "max_tokens": 5,
                "return_token_ids": True,
            }
            answer = client.post("/v1/chat/completions", json=request)
            assert answer.status_code == 200, answer.text
            response = answer.json()
            assert response["prompt_token_ids"] == prompt.token_ids
            inputs = tokenizer(tokenizer.decode(prompt.token_ids), add_special_tokens=False, return_tensors="pt")
            expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
            assert response["choices"][0]["token_ids"] == expected.tolist()
        request["messages"] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1"}]
        refused = client.post("/v1/chat/completions", json=request)
        assert refused.status_code == 400
        assert "send that message alone" in refused.text
