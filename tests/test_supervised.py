"""Next-token training against transformers: losses, gradients and updates on conversations, unpacked there."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_orz import supervised
from megatron_orz.config import CheckpointConfig, ConversationConfig, ModelConfig, OptimizerConfig, SupervisedConfig
from megatron_orz.data.packing import pack_demonstrations
from megatron_orz.data.synthetic import build_tokenizer
from megatron_orz.logs import read_metrics
from megatron_orz.supervised import train_supervised
from megatron_orz.types import Demonstration
from tests.engine import tiny
from tests.engine.layouts import keep_first_gradients
from tests.engine.reference import megatron_tensors
from tests.launch import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

# Written apart from the program: the `short` prompt, and one response for each.
TURNS = [
    (f"{a}+{b}", f"{a}+{b}={a + b}</think><answer>\\boxed{{{a + b}}}</answer>") for a in (1, 4) for b in range(2, 10)
]
HELD_OUT = [("7+7", "7+7=14</think>"), ("0+3", "3</think><answer>\\boxed{3}</answer>")]
# At AdamW's usual eps of 1e-8 an update near a zero gradient is its sign: noise.
OPTIMIZER = OptimizerConfig(lr=3e-3, warmup_steps=2, decay="cosine", min_lr=3e-4, eps=1e-4, weight_decay=0.1)
NUM_STEPS = 6


@cache
def tokenizer() -> Any:
    return build_tokenizer()


def tokens_of(turn: tuple[str, str]) -> tuple[list[int], list[int]]:
    prompt, response = (tokenizer()(text)["input_ids"] for text in (f"User: {turn[0]}\nAssistant: <think>", turn[1]))
    return prompt, [*response, tokenizer().eos_token_id]


@pytest.fixture
def config(tmp_path: Path) -> SupervisedConfig:
    """Six steps of all conversations, each of them once a step."""
    tiny.save_model(tmp_path / "base", tied=True, vocab_size=len(tokenizer()))
    tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"prompt": prompt, "response": response} for prompt, response in TURNS]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    messages = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        for prompt, response in HELD_OUT
    ]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in messages))
    return SupervisedConfig(
        run_dir=tmp_path / "run",
        model=ModelConfig(path=tmp_path / "base", optimizer=OPTIMIZER),
        data=ConversationConfig(
            train=(tmp_path / "train.jsonl",),
            held_out=(tmp_path / "held_out.jsonl",),
            template="short",
            max_tokens=80,
            max_pack_tokens=120,
        ),
        num_epochs=NUM_STEPS,
        num_conversations=len(TURNS),
        held_out_interval=2,
        checkpoint=CheckpointConfig(interval=0),
    )


def cross_entropy(model: Any, turns: list[tuple[str, str]], *, learn_all: bool = False) -> Tensor:
    """Nats per learnt token by transformers, one conversation at a time: labels of -100 are left out."""
    total, count = torch.zeros(()), 0
    for prompt, response in map(tokens_of, turns):
        labels = torch.tensor([prompt + response if learn_all else [-100] * len(prompt) + response])
        num_learned = int((labels[:, 1:] != -100).sum())
        total = total + model(torch.tensor([prompt + response]), labels=labels).loss * num_learned
        count += num_learned
    return total / count


def transformers_run(path: Path) -> tuple[list[float], list[float], Any]:
    """Losses and held-out losses of every step by transformers and torch's AdamW, and the trained model."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    spared = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=OPTIMIZER.eps)
    losses, held_out = [], []
    for step in range(NUM_STEPS + 1):
        with torch.no_grad():
            held_out.append(float(cross_entropy(model, HELD_OUT)))
        loss = cross_entropy(model, TURNS)
        losses.append(loss.item())
        # Warm-up over 2 of 6 updates, then half a cosine from 3e-3 down to 3e-4 at the last.
        share = (step + 1 - 2) / (6 - 2)
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * share)).item())
        rate = 3e-3 * (step + 1) / 2 if step < 2 else 3e-4 + (3e-3 - 3e-4) * cosine
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if step < NUM_STEPS:
            optimizer.step()
    return losses, held_out, model


def test_a_run_is_that_of_transformers_on_the_same_conversations(config: SupervisedConfig) -> None:
    """Losses, held-out losses, the schedule, and the exported model: training and export are one model."""
    train_supervised(config)
    losses, held_out, model = transformers_run(config.model.path)
    rows = read_metrics(config.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(NUM_STEPS + 1))
    assert [row["supervised/loss"] for row in rows[:-1]] == pytest.approx(losses[:-1], rel=1e-4)
    measured = {row["step"]: row["evaluation/held_out/loss"] for row in rows if "evaluation/held_out/loss" in row}
    assert list(measured) == [0, 2, 4, 6]
    assert list(measured.values()) == pytest.approx(held_out[::2], rel=1e-4)
    assert rows[1]["policy/lr"] == pytest.approx(3e-3)
    assert rows[NUM_STEPS - 1]["policy/lr"] == pytest.approx(3e-4)
    final = AutoModelForCausalLM.from_pretrained(config.run_dir / "final")
    for (name, expected), (_, weight) in zip(model.named_parameters(), final.named_parameters(), strict=True):
        assert torch.allclose(weight, expected, atol=1e-4), name
    assert losses[-1] < losses[0] - 1
    assert {"curves.png", "finished", "config.json", "tensorboard"} <= {path.name for path in config.run_dir.iterdir()}


def test_all_tokens_are_learnt_where_that_is_asked_for(config: SupervisedConfig) -> None:
    data = replace(config.data, learn="all", held_out=())
    train_supervised(replace(config, data=data, num_epochs=1, model=config.resolved_model(NUM_STEPS)))
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    [first, _] = read_metrics(config.run_dir / "metrics.jsonl")
    expected = float(cross_entropy(model, TURNS, learn_all=True).detach())
    assert first["supervised/loss"] == pytest.approx(expected, rel=1e-5)
    assert abs(expected - float(cross_entropy(model, TURNS).detach())) > 1e-2, "the two losses differ on this model"


def test_the_next_run_starts_from_what_this_one_exports(config: SupervisedConfig) -> None:
    train_supervised(config)
    final = config.run_dir / "final"
    again = replace(config, run_dir=config.run_dir.with_name("again"), model=replace(config.model, path=final))
    # The exported tokenizer carries the prompt, so that it need not be named.
    again = replace(again, data=replace(again.data, template="tokenizer"))
    train_supervised(again)
    last = read_metrics(config.run_dir / "metrics.jsonl")[-1]
    first = read_metrics(again.run_dir / "metrics.jsonl")[0]
    assert first["evaluation/held_out/loss"] == pytest.approx(last["evaluation/held_out/loss"], rel=1e-6)


def gradients_of_layout(parallel: dict[str, Any], path: Path, output: Path) -> None:
    """What one rank does: the first update on several packs, and the held-out loss; rank 0 writes the results."""
    from megatron_orz.algorithms.losses import next_token_loss
    from megatron_orz.config import ParallelConfig
    from megatron_orz.engine.megatron_engine import PolicyEngine
    from megatron_orz.engine.parallel import open_mesh
    from megatron_orz.supervised import cross_entropy as held_out_loss

    with open_mesh(ParallelConfig(timeout_s=300, **parallel), seed=0) as mesh:
        policy = PolicyEngine(ModelConfig(path=path, optimizer=OptimizerConfig(lr=1e-3)), mesh)

        def packs(turns: list[tuple[str, str]]) -> Any:
            return pack_demonstrations(
                [demonstration(turn) for turn in turns],
                max_pack_tokens=100,
                dp_size=mesh.dp_size,
                dp_rank=mesh.dp_rank,
                pad_multiple=mesh.pack_multiple,
            )

        held_out = held_out_loss(policy, packs(HELD_OUT), mesh)
        gradients = keep_first_gradients(policy)
        assert len(packs(TURNS)) > 1
        metrics = policy.step(packs(TURNS), next_token_loss)
        if mesh.rank == 0:
            torch.save({"gradients": gradients, "loss": metrics["policy/loss"], "held_out": held_out}, output)


def demonstration(turn: tuple[str, str]) -> Demonstration:
    prompt, response = tokens_of(turn)
    return Demonstration(token_ids=prompt + response, loss_mask=[False] * len(prompt) + [True] * len(response))


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(1, {}), (2, {"tp": 2, "sequence_parallel": True}), (2, {"pp": 2}), (2, {})],
    ids=["single", "tp2", "pp2", "dp2"],
)
def test_every_layout_has_the_gradients_of_transformers(
    world_size: int, parallel: dict[str, Any], config: SupervisedConfig, tmp_path: Path
) -> None:
    path = config.model.path
    run_ranks(world_size, gradients_of_layout, parallel, path, tmp_path / "results.pt")
    results = torch.load(tmp_path / "results.pt")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert results["held_out"] == pytest.approx(float(cross_entropy(model, HELD_OUT).detach()), rel=1e-5)
    loss = cross_entropy(model, TURNS)
    loss.backward()
    assert results["loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = megatron_tensors(
        {name: parameter.grad for name, parameter in model.named_parameters()},
        num_kv_heads=model.config.num_key_value_heads,
    )
    if "output_layer.weight" in results["gradients"]:  # the last stage's copy of the embedding
        expected["output_layer.weight"] = expected["embedding.word_embeddings.weight"]
    assert results["gradients"].keys() == expected.keys()
    for name, gradient in results["gradients"].items():
        wanted = expected[name]
        got = gradient[: len(wanted)]  # the vocabulary is padded
        assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max(), name


def weights_of(path: Path) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def test_a_run_that_gets_sigterm_goes_on_as_if_nothing_had_been(
    config: SupervisedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_supervised(config)
    stopped = replace(config, run_dir=config.run_dir.with_name("stopped"))

    with monkeypatch.context() as patch:
        pack, calls = supervised.pack_demonstrations, count()

        def pack_and_get_a_signal(*arguments: Any, **options: Any) -> Any:
            if next(calls) == 4:  # the held-out file, three steps, and in the midst of the fourth
                os.kill(os.getpid(), signal.SIGTERM)
            return pack(*arguments, **options)

        patch.setattr(supervised, "pack_demonstrations", pack_and_get_a_signal)
        with pytest.raises(SystemExit) as end:
            train_supervised(stopped)
    assert end.value.code == 75
    assert not (stopped.run_dir / "final").exists()
    assert [row["step"] for row in read_metrics(stopped.run_dir / "metrics.jsonl")] == [0, 1, 2, 3]

    train_supervised(stopped)
    whole, resumed = (read_metrics(run.run_dir / "metrics.jsonl") for run in (config, stopped))
    names = ("step", "supervised/loss", "policy/lr", "policy/grad_norm", "evaluation/held_out/loss")
    assert [[row.get(name) for name in names] for row in resumed] == [
        [row.get(name) for name in names] for row in whole
    ]
    expected = weights_of(config.run_dir / "final")
    for name, weight in weights_of(stopped.run_dir / "final").items():
        assert torch.equal(weight, expected[name]), name


def test_a_finished_run_is_left_alone_and_another_recipe_refused(
    config: SupervisedConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, num_epochs=1, model=config.resolved_model(NUM_STEPS), checkpoint=CheckpointConfig())
    train_supervised(config)
    before = (config.run_dir / "metrics.jsonl").read_bytes()
    train_supervised(config)
    assert "holds this run, finished" in capsys.readouterr().out
    assert (config.run_dir / "metrics.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match=r"a run of another recipe: seed is 1, was 0; restore the recipe, .*"):
        train_supervised(replace(config, seed=1))
    file = config.data.train[0]
    file.write_text(file.read_text().replace("1+2", "1+1"))
    with pytest.raises(ValueError, match=r"a run of another recipe: data\.content is .*"):
        train_supervised(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_epochs": 0.05}, r"the run has 1 steps, and model\.optimizer\.warmup_steps 2 leave none .*; lower them"),
        ({"data": {"template": "no place"}}, r"template 'no place' is neither a built-in name .*; set data\.template"),
        ({"data": {"template": "tokenizer"}}, r"data\.template is tokenizer, but .* has no chat template; set it to"),
        ({"data": {"max_tokens": 5}}, r"none of the 16 conversations of .* fits data\.max_tokens 5; raise it"),
        ({"data": {"max_tokens": 600, "max_pack_tokens": 600}}, r"data\.max_tokens 600 exceeds the 512 positions of"),
        (
            {"data": {"train": (Path("none.jsonl"),)}},
            r"none\.jsonl: no such file; check data\.train and data\.held_out",
        ),
        ({"model": ModelConfig(path=Path("none"), optimizer=OPTIMIZER)}, r"none holds no config\.json; .*"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_built(
    change: dict[str, Any], message: str, config: SupervisedConfig
) -> None:
    if isinstance(change.get("data"), dict):
        change = {"data": replace(config.data, **change["data"])}
    with pytest.raises(ValueError, match=message):
        train_supervised(replace(config, **change))
    assert not config.run_dir.exists()


def test_a_dry_run_says_what_it_would_do_and_builds_nothing(
    config: SupervisedConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train_supervised(replace(config, dry_run=True))
    said = capsys.readouterr()
    assert json.loads(said.out)["data"]["template"] == "short"
    counts, steps = said.err.splitlines()
    num_learned = sum(len(tokens_of(turn)[1]) for turn in TURNS)
    assert re.fullmatch(
        rf"training data: 16 conversations of 16 rows \(0 too long\), \d+ tokens, {num_learned} .*", counts
    )
    assert steps == "6 steps of 16 conversations"
    assert not config.run_dir.exists()
