"""The fused value head and loss, kernel and reference, against float64 autograd of the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_orz.ops import extension, reference
from megatron_orz.ops.value_loss import linear_value_loss

needs_kernel = pytest.mark.skipif(extension.NOT_BUILT is not None, reason="the C++ extension is not built")
EPS = 0.2

# Rows and columns around a SIMD vector, a chain of them and a block of rows; one token; none.
SIZES = [(0, 16), (1, 1), (3, 7), (65, 33), (128, 64), (200, 101)]


def inputs(num_tokens: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """hidden, head, old_values, returns, weights; a third of the tokens has weight 0, values lie around the range."""
    generator = torch.Generator().manual_seed(num_tokens + hidden_size)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden = random(num_tokens, hidden_size).to(dtype)
    head = (random(1, hidden_size) / hidden_size**0.5).to(dtype)
    old_values = (hidden.double() @ head.double().t()).squeeze(1) + 0.3 * random(num_tokens)
    weights = random(num_tokens).abs().where(torch.arange(num_tokens) % 3 > 0, 0.0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    others = [x.to(wide) for x in (old_values, random(num_tokens), weights)]
    return [x.to(device) for x in (hidden, head, *others)]


def by_definition(
    hidden: Tensor, head: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, values, d_hidden and d_head in float64, by autograd of PPO's formula."""
    hidden, head = (x.detach().double().requires_grad_() for x in (hidden, head))
    old_values, returns = old_values.double(), returns.double()
    values = (hidden @ head.t()).squeeze(1)
    errors = (values - returns) ** 2
    if clip_eps:
        clipped = old_values + (values - old_values).clamp(-clip_eps, clip_eps)
        errors = torch.max(errors, (clipped - returns) ** 2)
    loss = (0.5 * errors * weights.double()).sum()
    return loss.detach(), values.detach(), *torch.autograd.grad(loss, (hidden, head))


@pytest.mark.parametrize("clip_eps", [0.0, EPS])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Half the last place of the type that d_hidden has, and a few of float32 for sums of a hundred terms.
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2**-9), (torch.float16, 2**-12)],
    ids=str,
)
@pytest.mark.usefixtures("implementation")
def test_loss_values_and_gradients_equal_the_definition(
    size: tuple[int, int], dtype: torch.dtype, tolerance: float, clip_eps: float, device: torch.device
) -> None:
    if dtype == torch.float64 and device.type == "cuda":
        pytest.skip("float64 is for the CPU")
    hidden, head, *others = inputs(*size, dtype, device)
    expected = by_definition(hidden, head, *others, clip_eps=clip_eps)
    hidden.requires_grad_()
    head.requires_grad_()
    loss, values = linear_value_loss(hidden, head, *others, clip_eps=clip_eps)
    loss.backward()
    assert not values.requires_grad
    assert hidden.grad is not None
    assert head.grad is not None
    fine = max(1e-12, 2e-6 * (dtype != torch.float64))
    for actual, wanted, relative in zip(
        (loss, values, hidden.grad, head.grad), expected, (fine, fine, tolerance, tolerance), strict=True
    ):
        largest = wanted.abs().max().item() if wanted.numel() else 0.0
        torch.testing.assert_close(actual.detach().double(), wanted, rtol=relative, atol=relative * largest)


@needs_kernel
@pytest.mark.parametrize("clip_eps", [0.0, EPS])
def test_kernel_equals_reference(clip_eps: float) -> None:
    hidden, head, *others = inputs(77, 50, torch.float64, torch.device("cpu"))
    ours, theirs = torch.ones(2, 50, dtype=torch.float64)
    actual = torch.ops.megatron_orz.packed_value_loss(hidden, head[0], *others, clip_eps, d_head=ours)
    expected = reference.packed_value_loss(hidden, head[0], *others, clip_eps, d_head=theirs)
    torch.testing.assert_close([*actual, ours], [*expected, theirs], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("implementation")
def test_a_token_without_weight_reaches_no_gradient_even_if_it_is_not_finite(device: torch.device) -> None:
    hidden, head, *others = inputs(9, 12, torch.float32, device)
    expected = by_definition(hidden, head, *others, clip_eps=EPS)
    hidden[0], hidden[3] = float("nan"), float("inf")
    loss, values = linear_value_loss(hidden.requires_grad_(), head.requires_grad_(), *others, clip_eps=EPS)
    loss.backward()
    assert hidden.grad is not None
    assert head.grad is not None
    assert not values[[0, 3]].isfinite().any()
    assert not hidden.grad[[0, 3]].any()
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(head.grad.double(), expected[3], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("implementation")
def test_a_counted_token_that_is_not_finite_shows(device: torch.device) -> None:
    hidden, head, *others = inputs(9, 12, torch.float32, device)
    hidden[1] = float("nan")
    loss, _ = linear_value_loss(hidden, head.requires_grad_(), *others, clip_eps=EPS)
    loss.backward()
    assert loss.isnan()
    assert head.grad is not None
    assert head.grad.isnan().all()


@pytest.mark.usefixtures("implementation")
def test_gradients_are_scaled_with_the_loss_and_the_head_goes_into_main_grad_unscaled(device: torch.device) -> None:
    hidden, head, *others = inputs(20, 8, torch.float32, device)
    _, _, d_hidden, d_head = by_definition(hidden, head, *others, clip_eps=EPS)
    hidden.requires_grad_()
    head.requires_grad_()
    (3 * linear_value_loss(hidden, head, *others, clip_eps=EPS)[0]).backward()
    assert hidden.grad is not None
    assert head.grad is not None
    torch.testing.assert_close(hidden.grad.double(), 3 * d_hidden, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.grad.double(), 3 * d_head, rtol=1e-5, atol=1e-6)

    head.grad, head.main_grad = None, torch.ones_like(head)  # type: ignore[attr-defined]
    linear_value_loss(hidden, head, *others, clip_eps=EPS)[0].backward()
    assert head.grad is None
    torch.testing.assert_close(head.main_grad.double(), 1 + d_head, rtol=1e-5, atol=1e-6)  # type: ignore[attr-defined]
    if device.type == "cpu":  # on CUDA the assertion would end the process
        loss, _ = linear_value_loss(hidden, head, *others, clip_eps=EPS)
        with pytest.raises(RuntimeError, match="cannot be scaled"):
            (loss * 2).backward()


def test_without_gradients_main_grad_stays_as_it_is() -> None:
    hidden, head, *others = inputs(20, 8, torch.float32, torch.device("cpu"))
    head.requires_grad_()
    head.main_grad = torch.zeros_like(head)  # type: ignore[attr-defined]
    with torch.no_grad():
        loss, values = linear_value_loss(hidden, head, *others, clip_eps=EPS)
    expected = by_definition(hidden, head, *others, clip_eps=EPS)
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(values.double(), expected[1], rtol=1e-5, atol=1e-6)
    assert not head.main_grad.any()  # type: ignore[attr-defined]


@needs_kernel
def test_the_sum_for_the_head_depends_on_no_thread(device: torch.device) -> None:
    hidden, head, *others = inputs(3000, 40, torch.float32, device)
    threads = torch.get_num_threads()
    sums = []
    for num_threads in (1, 2, 1, 2):
        torch.set_num_threads(num_threads)
        sums.append(torch.zeros(40, device=device))
        torch.ops.megatron_orz.packed_value_loss(hidden, head[0], *others, EPS, d_head=sums[-1])
    torch.set_num_threads(threads)
    assert all(torch.equal(x, sums[0]) for x in sums)


@needs_kernel
def test_op_is_registered_correctly() -> None:
    """Schema, fake tensors, dispatch and compilation of the registered op."""
    hidden, head, *others = inputs(5, 6, torch.float32, torch.device("cpu"))
    torch.library.opcheck(
        torch.ops.megatron_orz.packed_value_loss.default,
        (hidden, head[0], *others, EPS),
        {"d_head": torch.zeros(6)},
    )


def bad(**changes: Tensor) -> dict[str, Tensor]:
    good = {name: torch.zeros(3) for name in ("old_values", "returns", "weights")}
    return {"hidden": torch.zeros(3, 4), "head": torch.zeros(1, 4), **good, **changes}


BAD_INPUTS = {
    "widths differ": (bad(head=torch.zeros(1, 5)), r"head is float32 \[1, 5\] on cpu"),
    "flat hidden": (bad(hidden=torch.zeros(3)), r"hidden is float32 \[3\]"),
    "types differ": (bad(head=torch.zeros(1, 4).bfloat16()), r"head is bfloat16 \[1, 4\]"),
    "integers": (bad(hidden=torch.zeros(3, 4).int(), head=torch.zeros(1, 4).int()), "hidden is int32"),
    "too few returns": (bad(returns=torch.zeros(2)), r"returns is float32 \[2\]"),
    "half precision": (bad(weights=torch.zeros(3).half()), r"weights is float16 \[3\]"),
    "other device": (bad(weights=torch.zeros(3, device="meta")), "weights is .* on meta"),
}


@pytest.mark.parametrize(("wrong", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs_are_refused_with_their_values(wrong: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_value_loss(**wrong, clip_eps=EPS)


@needs_kernel
@pytest.mark.parametrize("what", [what for what in BAD_INPUTS if what != "other device"])
def test_the_kernel_itself_reads_nothing_outside_its_arrays(what: str) -> None:
    hidden, head, *others = BAD_INPUTS[what][0].values()
    with pytest.raises((ValueError, NotImplementedError)):
        torch.ops.megatron_orz.packed_value_loss(hidden, head[0], *others, EPS, d_head=torch.zeros(4))
