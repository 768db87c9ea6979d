"""`linear_log_prob` against float64 log_softmax over full logits, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_orz.ops import extension, log_prob, reference
from megatron_orz.ops.log_prob import head_gradients, head_stats, linear_log_prob
from tests.ops.heads import TEMPERATURE, Head, assert_close, by_definition, exact_leaves, random_head

needs_kernel = pytest.mark.skipif(extension.NOT_BUILT is not None, reason="the C++ extension is not built")

# Tokens, hidden size, vocabulary: nothing, one of all, and sizes that no vector or block divides.
SIZES = [(0, 3, 5), (1, 1, 1), (1, 8, 2), (37, 24, 101), (64, 17, 668)]


def set_workspace(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(log_prob, "WORKSPACE_BYTES", {"cpu": num_bytes, "cuda": num_bytes})


def loss_of(outputs: tuple[Tensor, Tensor]) -> Tensor:
    """Weighs every log-probability and entropy differently."""
    log_probs, entropy = outputs
    factors = torch.linspace(-1, 2, len(log_probs), dtype=log_probs.dtype, device=log_probs.device)
    return (log_probs * factors).sum() + (entropy * factors.flip(0)).sum()


def check(head: Head, *, vocab_size: int | None = None, forward: float, backward: float, **options: Any) -> None:
    """Outputs and gradients against the definition; tolerances are relative to the largest entry."""
    exact = exact_leaves(head)
    num_rows = len(head.weight) if vocab_size is None else vocab_size
    expected = by_definition(head, exact[0], exact[1][:num_rows])
    loss_of(expected).backward()
    leaves = head.leaves()
    options = {"loss_mask": head.loss_mask, "temperature": TEMPERATURE, "vocab_size": vocab_size, **options}
    actual = linear_log_prob(*leaves, head.targets, **options)
    loss_of(actual).backward()
    for output, wanted in zip(actual, expected, strict=True):
        assert output.dtype == (torch.float64 if head.hidden.dtype == torch.float64 else torch.float32)
        assert_close(output, wanted, forward)
    for leaf, wanted in zip(leaves, exact, strict=True):
        assert leaf.grad is not None
        assert wanted.grad is not None
        assert leaf.grad.dtype == head.hidden.dtype
        assert_close(leaf.grad, wanted.grad, backward)


@pytest.mark.parametrize("num_bytes", [1, 4096, 1 << 26], ids=["number-by-number", "blocks", "one-block"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.usefixtures("implementation")
def test_outputs_and_gradients_equal_the_definition(
    size: tuple[int, int, int], num_bytes: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    set_workspace(monkeypatch, max(num_bytes, size[0] * size[2] // 8))  # a number at a time takes too long for all
    check(random_head(*size, device=device), forward=2e-6, backward=2e-6)


@pytest.mark.usefixtures("implementation")
def test_float64_is_float64_throughout() -> None:
    check(random_head(37, 24, 101, torch.float64), forward=1e-14, backward=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("implementation")
def test_half_precision_inputs_are_exact_up_to_their_own_rounding(dtype: torch.dtype, device: torch.device) -> None:
    """Logits are float32: outputs are as good as for float32 inputs. Gradients have the type of what they belong to;
    on CUDA that of the logits does too, before 500 terms of random signs are summed."""
    head = random_head(40, 64, 500, dtype, device)
    exact = by_definition(head, head.hidden.double(), head.weight.double())
    actual = linear_log_prob(head.hidden, head.weight, head.targets, loss_mask=head.loss_mask, temperature=TEMPERATURE)
    for output, wanted in zip(actual, exact, strict=True):
        torch.testing.assert_close(output.double(), wanted, rtol=0, atol=1e-5)
    rounding = torch.finfo(dtype).eps * (4 if device.type == "cuda" else 1)
    check(head, forward=1e-6, backward=rounding)


@pytest.mark.parametrize("vocab_size", [50, 1])
def test_padded_vocabulary_rows_get_no_probability_and_no_gradient(vocab_size: int, device: torch.device) -> None:
    head = random_head(20, 16, 64, device=device)
    head.weight[vocab_size:] = 9.0
    head = head._replace(targets=head.targets % vocab_size)
    check(head, vocab_size=vocab_size, forward=2e-6, backward=2e-6)


def test_without_a_mask_all_tokens_count(device: torch.device) -> None:
    head = random_head(20, 16, 64, device=device)
    check(head._replace(loss_mask=torch.ones_like(head.loss_mask)), loss_mask=None, forward=2e-6, backward=2e-6)


def test_an_empty_mask_gives_zeros_and_zero_gradients(device: torch.device) -> None:
    head = random_head(20, 16, 64, device=device)
    head.loss_mask[:] = False
    leaves = head.leaves()
    outputs = linear_log_prob(*leaves, head.targets, loss_mask=head.loss_mask)
    loss_of(outputs).backward()
    assert not any(output.any() for output in outputs)
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


def test_without_entropy_the_rest_is_the_same() -> None:
    head = random_head(20, 16, 64)
    results = []
    for with_entropy in (True, False):
        leaves = head.leaves()
        log_probs, entropy = linear_log_prob(*leaves, head.targets, entropy=with_entropy)
        assert entropy.requires_grad == with_entropy
        assert bool(entropy.any()) == with_entropy
        log_probs.square().sum().backward()
        results.append([log_probs, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("row", ["all-equal", "one-huge", "some-minus-infinity", "tiny-temperature"])
@pytest.mark.usefixtures("implementation")
def test_adversarial_rows_stay_exact(row: str, device: torch.device) -> None:
    hidden = torch.ones(3, 1, device=device)
    weight = torch.zeros(300, 1, device=device)
    targets = torch.tensor([17, 17, 5], device=device)
    temperature = 1.0
    if row == "one-huge":
        weight[17] = 1e5
    if row == "some-minus-infinity":
        weight[100:] = -float("inf")
    if row == "tiny-temperature":
        weight[:, 0], temperature = torch.arange(300.0), 1e-6
    head = Head(hidden, weight, targets, torch.ones(3, dtype=torch.bool, device=device))
    log_p = torch.log_softmax(hidden.double() @ weight.double().t() / temperature, dim=-1)
    expected = log_p.gather(1, targets[:, None]).squeeze(1), -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(1)
    leaves = head.leaves()
    actual = linear_log_prob(*leaves, targets, temperature=temperature)
    for output, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(output.double(), wanted, rtol=1e-6, atol=1e-6)
    loss_of(actual).backward()
    assert leaves[1].grad is not None
    assert leaves[1].grad.isfinite().all()


@pytest.mark.usefixtures("implementation")
def test_what_is_not_a_number_shows_and_stays_with_its_token(device: torch.device) -> None:
    head = random_head(20, 16, 64, device=device)
    head.hidden[3] = float("nan")
    leaves = head.leaves()
    outputs = linear_log_prob(*leaves, head.targets)
    loss_of(outputs).backward()
    assert leaves[0].grad is not None
    for of_tokens in (*outputs, leaves[0].grad.sum(1)):
        assert of_tokens.isnan().nonzero().flatten().tolist() == [3]


@needs_kernel
def test_gradcheck() -> None:
    head = random_head(5, 4, 11, torch.float64)

    def outputs_of(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return linear_log_prob(
            hidden, weight, head.targets % 9, loss_mask=head.loss_mask, temperature=TEMPERATURE, vocab_size=9
        )

    assert torch.autograd.gradcheck(outputs_of, head.leaves())


def test_weight_gradient_is_added_to_main_grad(device: torch.device) -> None:
    """Two uses of a half-precision weight add up in float32; autograd gets nothing, as Megatron's hook expects."""
    head = random_head(40, 64, 500, torch.bfloat16, device)
    exact = exact_leaves(head)
    loss_of(by_definition(head, *exact)).backward()
    hidden, weight = head.leaves()
    weight.main_grad = torch.ones_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
    for _ in range(2):
        outputs = linear_log_prob(hidden, weight, head.targets, loss_mask=head.loss_mask, temperature=TEMPERATURE)
        loss_of(outputs).backward()
    assert weight.grad is None
    assert exact[1].grad is not None
    # On the CPU nothing was rounded to bfloat16, whose last place is 4e-3.
    tolerance = 1e-6 if device.type == "cpu" else 1e-2
    assert_close(weight.main_grad - 1, 2 * exact[1].grad, tolerance)  # type: ignore[attr-defined]


def test_results_do_not_vary(device: torch.device) -> None:
    head = random_head(300, 33, 1001, device=device)

    def results() -> list[Tensor | None]:
        leaves = head.leaves()
        outputs = linear_log_prob(*leaves, head.targets, loss_mask=head.loss_mask)
        loss_of(outputs).backward()
        return [*outputs, *(leaf.grad for leaf in leaves)]

    first, second = results(), results()
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_kernel
@pytest.mark.parametrize("with_main_grad", [False, True])
def test_compiles_as_one_graph(with_main_grad: bool) -> None:
    head = random_head(20, 16, 64)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return loss_of(linear_log_prob(hidden * 2, weight, head.targets, temperature=TEMPERATURE))

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        hidden, weight = head.leaves()
        if with_main_grad:
            weight.main_grad = torch.ones_like(weight)  # type: ignore[attr-defined]
        total = function(hidden, weight)
        total.backward()
        results.append([total, hidden.grad, weight.main_grad if with_main_grad else weight.grad])  # type: ignore[attr-defined]
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [0, 5])
def test_ops_are_registered_correctly(n: int, dtype: torch.dtype) -> None:
    """Schemas, fake tensors, dispatch and compilation of the registered ops."""
    hidden, weight, targets, _ = random_head(n, 8, 11, dtype)
    logits, of_tokens = hidden @ weight.t(), torch.randn(4, n, dtype=dtype).unbind()
    ops = torch.ops.megatron_orz
    torch.library.opcheck(ops.logits_stats.default, (logits, targets, 3, 0.7, True))
    torch.library.opcheck(ops.dlogits.default, (logits, targets, *of_tokens, 3, 0.7), {"out": torch.empty_like(logits)})
    torch.library.opcheck(head_stats, (hidden, weight, targets, 3, 0.7, True))
    torch.library.opcheck(head_gradients, (hidden, weight, targets, *of_tokens, torch.zeros_like(weight), 3, 0.7))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("v", [0, 1, 7, 8, 31, 33, 668])
def test_kernels_equal_the_reference(v: int, dtype: torch.dtype, device: torch.device) -> None:
    """Whatever columns a rank holds, none included; written over the logits or beside them."""
    if dtype == torch.float64 and device.type == "cuda":
        pytest.skip("float64 is for the CPU")
    generator = torch.Generator().manual_seed(v)
    logits = 5 * torch.randn(6, v, generator=generator, dtype=dtype).to(device)
    targets = torch.tensor([0, 3, 4, 99, 3 + v - 1, 3 + v], device=device)  # this block holds [3, 3 + v)
    ops, tolerance = torch.ops.megatron_orz, 1e-6 if dtype == torch.float32 else 1e-14
    for with_entropy in (True, False):
        stats = ops.logits_stats(logits, targets, 3, 0.7, with_entropy)
        expected = reference.logits_stats(logits.double(), targets, 3, 0.7, with_entropy)
        torch.testing.assert_close(stats.double(), expected, rtol=10 * tolerance, atol=10 * tolerance)
    lse = (0.7 * logits).logsumexp(1) if v else torch.zeros(6, dtype=dtype, device=device)
    of_rows = [lse, *(x.to(device, dtype) for x in torch.randn(3, 6, generator=generator).unbind())]
    wanted = torch.empty_like(logits, dtype=torch.float64)
    reference.dlogits(logits.double(), targets, *(x.double() for x in of_rows), 3, 0.7, out=wanted)
    beside, over = torch.full_like(logits, float("nan")), logits.clone()
    ops.dlogits(logits, targets, *of_rows, 3, 0.7, out=beside)
    ops.dlogits(over, targets, *of_rows, 3, 0.7, out=over)
    torch.testing.assert_close(beside.double(), wanted, rtol=20 * tolerance, atol=20 * tolerance)
    assert torch.equal(beside, over)


def test_bad_inputs_are_refused_with_their_values() -> None:
    hidden, weight, targets, mask = random_head(5, 8, 10)
    for arguments, message in (
        (
            (hidden, weight[:, :7], targets, mask),
            r"hidden is float32 \[5, 8\] on cpu, weight is float32 \[10, 7\] on cpu",
        ),
        ((hidden[0], weight, targets, mask), r"hidden is float32 \[8\]"),
        ((hidden.bfloat16(), weight, targets, mask), r"hidden is bfloat16 \[5, 8\]"),
        ((hidden.int(), weight.int(), targets, mask), "hidden is int32"),
        ((hidden, weight, targets[:4], mask), r"targets is int64 \[4\]"),
        ((hidden, weight, targets.int(), mask), "targets is int32"),
        ((hidden, weight, targets, mask[:4]), r"loss_mask is bool \[4\]"),
        ((hidden, weight, targets, mask.float()), r"loss_mask is float32 \[5\]"),
        ((hidden, weight.to("meta"), targets, mask), "weight is float32 .* on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_log_prob(*arguments[:3], loss_mask=arguments[3])


@needs_kernel
def test_the_kernels_themselves_read_nothing_outside_their_arrays() -> None:
    logits, targets, of_row = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), torch.zeros(3)
    ops = torch.ops.megatron_orz
    stats = (logits, targets, 0, 1.0, True)
    for i, wrong, message in (
        (0, logits[0], "two dimensions"),
        (0, logits.t(), "contiguous"),
        (1, targets[:2], r"\[3\], not Long \[2\] on cpu"),
        (1, targets.int(), "Long, not Int"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.logits_stats(*stats[:i], wrong, *stats[i + 1 :])
    gradient = (logits, targets, of_row, of_row, of_row, of_row, 0, 1.0)
    for i, wrong, message in (
        (2, of_row[:2], r"\[3\], not Float \[2\]"),
        (3, of_row.double(), "one dtype, not Float and Double"),
        (4, torch.zeros(3, 2)[:, 0], "contiguous"),
        (1, targets.int(), "Long, not Int"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.dlogits(*gradient[:i], wrong, *gradient[i + 1 :], out=logits)
    with pytest.raises(ValueError, match="one shape"):
        ops.dlogits(*gradient, out=torch.zeros(3, 5))
