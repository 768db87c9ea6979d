"""The loss-fused output layer against `linear_log_prob`, the loss and autograd; both, over ranks, against one rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_orz.ops import log_prob, token_loss
from megatron_orz.ops.log_prob import linear_log_prob
from megatron_orz.ops.token_loss import linear_token_loss
from tests.launch import run_ranks
from tests.ops.heads import TEMPERATURE, Head, assert_close, by_definition, exact_leaves, random_head

Loss = Callable[[Head, Tensor, Tensor, Tensor], Tensor]


def of_tokens(head: Head, seed: int) -> Tensor:
    """Random numbers of all tokens, [T]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(head.targets), generator=generator, dtype=torch.float64).to(head.hidden.device)


def surrogate(head: Head, index: Tensor, log_probs: Tensor, entropy: Tensor) -> Tensor:
    """PPO's; old policies lie on both sides of the clip range."""
    advantages, weights = of_tokens(head, 1), of_tokens(head, 2).abs()
    exact, _ = by_definition(head, head.hidden.double(), head.weight.double())
    ratio = (log_probs - (exact + 0.3 * of_tokens(head, 3)).to(log_probs.dtype)[index]).exp()
    clipped = ratio.clamp(0.8, 1.2)
    advantages, weights = (x.to(log_probs.dtype)[index] for x in (advantages, weights))
    return -torch.minimum(ratio * advantages, clipped * advantages) * weights


def made_up(head: Head, index: Tensor, log_probs: Tensor, entropy: Tensor) -> Tensor:
    """Curved in both, with a bonus for entropy."""
    weights = of_tokens(head, 4).to(log_probs.dtype)[index]
    return weights * (0.3 * log_probs.square() - 0.5 * entropy + 0.1 * entropy * log_probs)


def next_token(head: Head, index: Tensor, log_probs: Tensor, entropy: Tensor) -> Tensor:
    """Knows nothing of entropy."""
    return -log_probs


LOSSES: dict[str, Loss] = {"surrogate": surrogate, "made-up": made_up, "next-token": next_token}


def fused(head: Head, loss: Loss, *leaves: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    options = {"loss_mask": head.loss_mask, "temperature": TEMPERATURE, **options}
    return linear_token_loss(*leaves, head.targets, lambda *of_chunk: loss(head, *of_chunk), **options)


def check(head: Head, loss: Loss, *, forward: float, backward: float) -> None:
    """Loss, outputs and gradients against float64 autograd through full logits."""
    exact = exact_leaves(head)
    expected = by_definition(head, *exact)
    index = head.loss_mask.nonzero().squeeze(1)
    expected_loss = loss(head, index, expected[0][index], expected[1][index]).sum()
    expected_loss.backward()
    leaves = head.leaves()
    total, *outputs = fused(head, loss, *leaves)
    total.backward()
    assert total.shape == ()
    assert_close(total, expected_loss, forward)
    for output, wanted in zip(outputs, expected, strict=True):
        assert not output.requires_grad
        assert_close(output, wanted, forward)
    for leaf, wanted in zip(leaves, exact, strict=True):
        assert leaf.grad is not None
        assert wanted.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        assert_close(leaf.grad, wanted.grad, backward)


@pytest.mark.parametrize("num_bytes", [1, 30_000, 128 << 20], ids=["token-by-token", "chunks", "one-chunk"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_loss_and_gradients_equal_the_definition(
    loss: Loss, num_bytes: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(token_loss, "WORKSPACE_BYTES", {"cpu": num_bytes, "cuda": num_bytes})
    check(random_head(61, 24, 333, device=device), loss, forward=3e-6, backward=3e-6)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_float64_is_float64_throughout(loss: Loss) -> None:
    check(random_head(37, 24, 101, torch.float64), loss, forward=1e-13, backward=1e-13)


@pytest.mark.parametrize("num_bytes", [60_000, 1 << 30], ids=["chunks", "one-chunk"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_half_precision_inputs_are_exact_up_to_their_own_rounding(
    loss: Loss, dtype: torch.dtype, num_bytes: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """As for `linear_log_prob`; the weight is made float32 in parts on the CPU, the logits exist in parts on CUDA."""
    monkeypatch.setattr(token_loss, "WORKSPACE_BYTES", {"cpu": num_bytes, "cuda": num_bytes})
    monkeypatch.setattr(token_loss, "UPCAST_ROWS", 200)
    rounding = torch.finfo(dtype).eps * (4 if device.type == "cuda" else 1)
    check(random_head(61, 24, 333, dtype, device), loss, forward=1e-5, backward=rounding)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_equals_the_separate_path(loss: Loss, device: torch.device) -> None:
    """On the same float32 numbers, up to the order of sums."""
    head = random_head(61, 24, 333, device=device)
    leaves, others = head.leaves(), head.leaves()
    total, *outputs = fused(head, loss, *leaves)
    total.backward()
    separate = linear_log_prob(*others, head.targets, loss_mask=head.loss_mask, temperature=TEMPERATURE)
    index = head.loss_mask.nonzero().squeeze(1)
    separate_total = loss(head, index, separate[0][index], separate[1][index]).sum()
    separate_total.backward()
    for actual, expected in zip([total, *outputs], [separate_total, *separate], strict=True):
        assert_close(actual, expected, 2e-6)
    for leaf, other in zip(leaves, others, strict=True):
        assert leaf.grad is not None
        assert other.grad is not None
        assert_close(leaf.grad, other.grad, 2e-6)


def test_each_token_of_the_mask_is_seen_once_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "WORKSPACE_BYTES", {"cpu": 4 * 333 * 10})
    head = random_head(61, 24, 333)
    seen: list[Tensor] = []

    def loss(head: Head, index: Tensor, log_probs: Tensor, entropy: Tensor) -> Tensor:
        assert log_probs.requires_grad
        assert log_probs.shape == entropy.shape == index.shape
        seen.append(index)
        return log_probs

    fused(head, loss, *head.leaves())
    assert [len(index) for index in seen[:-1]] == [10] * (len(seen) - 1)
    assert torch.equal(torch.cat(seen), head.loss_mask.nonzero().squeeze(1))


class Logits(TorchDispatchMode):
    """Notes the bytes of every tensor with a column for each word."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size, self.num_bytes = vocab_size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.new_empty.default and out.shape[-1] == self.vocab_size:
            self.num_bytes += out.nbytes
        return out


@pytest.mark.parametrize("num_bytes", [60_000, 1 << 30], ids=["chunks", "one-chunk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_workspace_is_as_large_as_announced(
    dtype: torch.dtype, num_bytes: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(token_loss, "WORKSPACE_BYTES", {"cpu": num_bytes, "cuda": num_bytes})
    head = random_head(61, 24, 333, dtype, device)
    with Logits(333) as logits:
        fused(head, next_token, *head.leaves())
    num_tokens = int(head.loss_mask.sum())
    assert logits.num_bytes == token_loss.workspace_bytes(num_tokens, 333, dtype, device.type)
    assert 0 < logits.num_bytes <= num_bytes


def test_half_precision_gradients_lie_beside_their_logits_on_cuda() -> None:
    """Float32 logits of 2048 tokens, and bfloat16 gradients of four times as many; a 7 B model on two ranks."""
    rows = 152064 // 2
    assert token_loss.workspace_bytes(32768, rows, torch.bfloat16, "cuda") == rows * (2048 * 4 + 8192 * 2)
    assert token_loss.workspace_bytes(100, rows, torch.bfloat16, "cuda") == rows * 100 * (4 + 2)
    assert token_loss.workspace_bytes(32768, rows, torch.float32, "cuda") == rows * 8192 * 4
    assert token_loss.workspace_bytes(32768, 2 * rows, torch.float32, "cuda") <= 4 << 30


def test_without_loss_tokens_the_loss_is_0_and_can_be_backpropagated() -> None:
    head = random_head(20, 16, 64)
    head.loss_mask[:] = False
    leaves = head.leaves()
    total, *outputs = fused(head, surrogate, *leaves)
    total.backward()
    assert total == 0
    assert not any(output.any() for output in outputs)
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


def test_a_scaled_loss_has_scaled_gradients() -> None:
    head = random_head(20, 16, 64)
    gradients = []
    for factor in (1, 3):
        leaves = head.leaves()
        (factor * fused(head, made_up, *leaves)[0]).backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(gradients[1], [3 * gradient for gradient in gradients[0]])


def test_a_loss_is_backpropagated_once() -> None:
    total, *_ = fused(random_head(20, 16, 64), made_up, *random_head(20, 16, 64).leaves())
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already"):
        total.backward()


def test_weight_gradient_is_added_to_main_grad_which_no_scale_can_reach(device: torch.device) -> None:
    head = random_head(61, 24, 333, torch.bfloat16, device)
    hidden, weight = head.leaves()
    fused(head, made_up, hidden, weight)[0].backward()
    assert weight.grad is not None
    by_autograd, d_hidden = weight.grad.float(), hidden.grad
    weight.grad, hidden.grad = None, None
    weight.main_grad = torch.ones_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
    fused(head, made_up, hidden, weight)[0].backward()
    assert weight.grad is None
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, d_hidden)
    assert_close(weight.main_grad - 1, by_autograd, 2**-8)  # type: ignore[attr-defined]
    if device.type == "cpu":  # on CUDA the assertion would end the process
        with pytest.raises(RuntimeError, match="cannot be scaled"):
            (fused(head, made_up, hidden, weight)[0] * 0.5).backward()


def test_without_gradients_main_grad_stays_as_it_is() -> None:
    head = random_head(20, 16, 64)
    hidden, weight = head.leaves()
    weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    with torch.no_grad():
        results = fused(head, made_up, hidden, weight)
    assert not weight.main_grad.any()  # type: ignore[attr-defined]
    del weight.main_grad
    for actual, expected in zip(results, fused(head, made_up, hidden, weight), strict=True):
        assert_close(actual, expected, 1e-6)


def test_not_a_number_reaches_the_gradients() -> None:
    head = random_head(20, 16, 64)
    leaves = head.leaves()
    total, *_ = fused(head, lambda head, index, log_probs, entropy: log_probs * float("nan"), *leaves)
    total.backward()
    assert total.isnan()
    assert all(leaf.grad is not None and leaf.grad.isnan().any() for leaf in leaves)


def test_results_do_not_vary(device: torch.device) -> None:
    head = random_head(300, 33, 1001, device=device)

    def results() -> list[Tensor | None]:
        leaves = head.leaves()
        outputs = fused(head, made_up, *leaves)
        outputs[0].backward()
        return [*outputs, *(leaf.grad for leaf in leaves)]

    first, second = results(), results()
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_bad_inputs_are_refused_with_their_values() -> None:
    head = random_head(5, 8, 10)
    with pytest.raises(ValueError, match=r"hidden is float32 \[5, 8\] on cpu, weight is float32 \[10, 7\] on cpu"):
        fused(head, next_token, head.hidden, head.weight[:, :7])


# Vocabularies that tensor parallelism pads; of the smallest, some ranks hold nothing but padding.
PARALLEL_HEADS = {"some-tokens": (37, 24, 101), "no-tokens": (0, 24, 101), "more-ranks-than-rows": (9, 6, 3)}


def run_shard(output: Path) -> None:
    """Both paths on this rank's rows of the vocabulary, in several blocks and chunks."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    log_prob.WORKSPACE_BYTES["cpu"] = token_loss.WORKSPACE_BYTES["cpu"] = 2000
    results: dict[str, Any] = {}
    for name, sizes in PARALLEL_HEADS.items():
        head = random_head(*sizes)
        options: dict[str, Any] = {"vocab_size": sizes[2], "tp_group": dist.group.WORLD}
        hidden, weight = head.hidden.clone().requires_grad_(), head.shard(rank, size).requires_grad_()
        outputs = linear_log_prob(
            hidden, weight, head.targets, loss_mask=head.loss_mask, temperature=TEMPERATURE, **options
        )
        made_up(head, torch.arange(len(hidden)), *outputs).sum().backward()
        results[f"separate {name}"] = [*(x.detach() for x in outputs), hidden.grad, weight.grad]
        hidden.grad = weight.grad = None
        total, *outputs = fused(head, made_up, hidden, weight, **options)
        total.backward()
        results[f"fused {name}"] = [*outputs, hidden.grad, weight.grad]
    torch.save(results, output / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 4])
def test_vocabulary_parallel_equals_one_rank(size: int, tmp_path: Path) -> None:
    run_ranks(size, run_shard, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    for name, sizes in PARALLEL_HEADS.items():
        head = random_head(*sizes)
        exact = exact_leaves(head)
        expected = by_definition(head, *exact)
        made_up(head, torch.arange(len(head.hidden)), *expected).where(head.loss_mask, 0.0).sum().backward()
        assert exact[0].grad is not None
        assert exact[1].grad is not None
        for path in ("separate", "fused"):
            of_ranks = [rank[f"{path} {name}"] for rank in ranks]
            for log_probs, entropy, d_hidden, _ in of_ranks:
                assert_close(log_probs, expected[0], 3e-6)
                assert_close(entropy, expected[1], 3e-6)
                assert_close(d_hidden, exact[0].grad, 3e-6)
            d_weight = torch.cat([d_weight for *_, d_weight in of_ranks])
            assert_close(d_weight[: sizes[2]], exact[1].grad, 3e-6)
            assert not d_weight[sizes[2] :].any()
