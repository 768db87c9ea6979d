"""`linear_log_prob` against float64 log_softmax over full logits, forward and backward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_orz.ops import log_prob
from megatron_orz.ops.log_prob import linear_log_prob
from tests.launch import run_ranks


def inputs(num_tokens: int, hidden_size: int, vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens + vocab)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator)
    weight = torch.randn(vocab, hidden_size, generator=generator) * 0.3
    targets = torch.randint(0, vocab, (num_tokens,), generator=generator)
    return hidden, weight, targets, torch.rand(num_tokens, generator=generator) < 0.7


def definition(
    hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(hidden @ weight.t() / temperature, dim=-1)
    log_probs = log_p.gather(1, targets[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_probs.where(mask, 0.0), entropy.where(mask, 0.0)


def backward_of(outputs: tuple[Tensor, Tensor]) -> None:
    """A loss that weighs every log-probability and entropy differently."""
    log_probs, entropy = outputs
    factors = torch.linspace(-1, 2, len(log_probs), dtype=log_probs.dtype)
    ((log_probs * factors).sum() + (entropy * factors.flip(0)).sum()).backward()


@pytest.mark.parametrize("chunk_bytes", [1, 4096, 1 << 26], ids=["row-by-row", "chunks", "one-chunk"])
@pytest.mark.parametrize(("num_tokens", "vocab"), [(1, 2), (37, 101), (64, 668)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_entropy_and_gradients_equal_the_definition(
    num_tokens: int, vocab: int, temperature: float, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(log_prob.WORKSPACE_BYTES, "cpu", chunk_bytes)
    hidden, weight, targets, mask = inputs(num_tokens, 24, vocab)
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    expected = definition(*exact, targets, mask, temperature)
    backward_of(expected)
    ours = [hidden.requires_grad_(), weight.requires_grad_()]
    actual = linear_log_prob(*ours, targets, loss_mask=mask, temperature=temperature)
    backward_of(actual)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)
    for a, e in zip(ours, exact, strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad.double(), e.grad, rtol=1e-4, atol=1e-5)


def test_padded_vocabulary_rows_get_no_probability_and_no_gradient() -> None:
    hidden, weight, targets, mask = inputs(20, 16, 50)
    padded = torch.cat([weight, torch.full((14, 16), 9.0)]).requires_grad_()
    actual = linear_log_prob(hidden, padded, targets, loss_mask=mask, vocab_size=50)
    expected = definition(hidden.double(), weight.double(), targets, mask, 1.0)
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=1e-5, atol=1e-5)
    backward_of(actual)
    assert padded.grad is not None
    assert not padded.grad[50:].any()
    assert padded.grad[:50].any()


@pytest.mark.parametrize("row", ["all equal", "one huge"])
def test_adversarial_rows_stay_finite(row: str) -> None:
    weight = torch.zeros(300, 8)
    if row == "one huge":
        weight[17] = 1e4
    hidden = torch.ones(3, 8, requires_grad=True)
    targets = torch.tensor([17, 17, 5])
    log_probs, entropy = linear_log_prob(hidden, weight, targets, loss_mask=torch.ones(3, dtype=torch.bool))
    if row == "all equal":
        torch.testing.assert_close(log_probs, torch.full((3,), -(torch.tensor(300.0).log())))
        torch.testing.assert_close(entropy, torch.full((3,), torch.tensor(300.0).log()))
    else:
        torch.testing.assert_close(log_probs, torch.tensor([0.0, 0.0, -8e4]))
        torch.testing.assert_close(entropy, torch.zeros(3))
    backward_of((log_probs, entropy))
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_bfloat16_inputs_are_exact_up_to_their_own_rounding() -> None:
    hidden, weight, targets, mask = inputs(40, 64, 500)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    actual = linear_log_prob(hidden, weight, targets, loss_mask=mask)[0]
    expected = definition(hidden.double(), weight.double(), targets, mask, 1.0)[0]
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4)


def test_wrong_shapes_are_named() -> None:
    hidden, weight, targets, mask = inputs(5, 8, 10)
    with pytest.raises(ValueError, match=r"\[5, 8\] and weight \[10, 7\]"):
        linear_log_prob(hidden, weight[:, :7], targets, loss_mask=mask)
    with pytest.raises(ValueError, match=r"targets \[4\]"):
        linear_log_prob(hidden, weight, targets[:4], loss_mask=mask)


def run_shard(output: Path, with_mask: bool) -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    hidden, weight, targets, mask = inputs(37, 24, 101)
    mask = mask & with_mask
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -101 % size))
    shard = padded.chunk(size)[rank].clone().requires_grad_()
    hidden.requires_grad_()
    outputs = linear_log_prob(
        hidden, shard, targets, loss_mask=mask, temperature=0.8, vocab_size=101, tp_group=dist.group.WORLD
    )
    backward_of(outputs)
    torch.save([*(o.detach() for o in outputs), hidden.grad, shard.grad], output / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("with_mask", [True, False], ids=["some-tokens", "no-tokens"])
def test_vocabulary_parallel_equals_one_rank(tmp_path: Path, with_mask: bool) -> None:
    run_ranks(2, run_shard, tmp_path, with_mask)
    hidden, weight, targets, mask = inputs(37, 24, 101)
    mask = mask & with_mask
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    expected = definition(*exact, targets, mask, 0.8)
    backward_of(expected)
    shards = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for log_probs, entropy, d_hidden, _ in shards:
        torch.testing.assert_close(log_probs.double(), expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(d_hidden.double(), exact[0].grad, rtol=1e-4, atol=1e-5)
    d_weight = torch.cat([shard[3] for shard in shards])[:101]
    torch.testing.assert_close(d_weight.double(), exact[1].grad, rtol=1e-4, atol=1e-5)
