"""The binding of the CUDA kernels, on CPU tensors and the emulator: every argument arrives where it belongs.

What the kernels compute is tested elsewhere; here each op runs once, with arguments that cannot be exchanged.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_orz.ops import reference
from tests.csrc.emulation import emulated_ops
from tests.csrc.test_gae_kernels import define as gae_by_definition


@pytest.fixture(scope="module")
def ops() -> Any:
    return emulated_ops()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TARGETS = torch.tensor([1000, 1299, 999, 1300, 1007])  # of 300 columns from 1000 on


@pytest.mark.parametrize("entropy", [True, False])
def test_logits_stats(ops: Any, entropy: bool) -> None:
    logits = normal(5, 300)
    stats = ops.logits_stats(logits, TARGETS, 1000, 0.7, entropy)
    expected = reference.logits_stats(logits.double(), TARGETS, 1000, 0.7, entropy)
    torch.testing.assert_close(stats, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, None], ids=str)
def test_dlogits(ops: Any, dtype: torch.dtype | None) -> None:
    """None: in place."""
    logits, (entropy, g, h) = normal(5, 300), normal(3, 5, seed=1)
    of_rows = (logits.logsumexp(1), entropy, g, h)
    expected = torch.empty(5, 300, dtype=torch.float64)
    reference.dlogits(logits.double(), TARGETS, *(x.double() for x in of_rows), 1000, 0.7, out=expected)
    out = logits if dtype is None else torch.full((5, 300), torch.nan, dtype=dtype)
    ops.dlogits(logits, TARGETS, *of_rows, 1000, 0.7, out=out)
    rtol = {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(out.dtype, 1e-5)
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packed_value_loss(ops: Any, dtype: torch.dtype) -> None:
    hidden, head = normal(9, 40).to(dtype), normal(40, seed=1).to(dtype)
    old_values, returns = normal(2, 9, seed=2) * 4
    weights = torch.tensor([0.5, 0, 1, 2, 0, 0.25, 1, 1, 3])
    x, w = hidden.double().requires_grad_(), head.double().requires_grad_()
    expected = x @ w
    clipped = expected.clamp(old_values.double() - 0.2, old_values.double() + 0.2)
    error = torch.maximum((expected - returns).square(), (clipped - returns).square())
    (0.5 * weights * error).sum().backward()

    before = normal(40, seed=3)
    d_head = before.clone()
    values, d_hidden = ops.packed_value_loss(hidden, head, old_values, returns, weights, 0.2, d_head=d_head)
    assert values.dtype == torch.float32
    assert d_hidden.dtype == dtype
    rtol = {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(dtype, 1e-5)
    torch.testing.assert_close(values.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d_hidden.double(), x.grad, rtol=rtol, atol=1e-5)
    torch.testing.assert_close(d_head.double(), before.double() + w.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_packed_gae(ops: Any, dtype: torch.dtype) -> None:
    rewards, values = normal(2, 9).to(dtype)
    cu_seqlens = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1], dtype=torch.bool)
    advantages, returns, moments = ops.packed_gae(rewards, values, cu_seqlens, mask, 0.9, 0.8)
    expected = torch.from_numpy(gae_by_definition(rewards.numpy(), values.numpy(), cu_seqlens.numpy(), 0.9, 0.8))
    torch.testing.assert_close(advantages, expected.to(dtype))
    torch.testing.assert_close(returns, (expected + values).to(dtype))
    selected = advantages[mask].double()
    deviations = (selected - selected.mean()).square().sum()
    torch.testing.assert_close(moments, torch.stack([torch.tensor(6.0).double(), selected.mean(), deviations]))


def bad(op: str, index: int, argument: Tensor) -> tuple[str, list[Any]]:
    """Good arguments of an op but for one."""
    arguments: dict[str, list[Any]] = {
        "logits_stats": [normal(5, 30), TARGETS, 0, 1.0, True],
        "dlogits": [normal(5, 30), TARGETS, *normal(4, 5), 0, 1.0, normal(5, 30)],
        "packed_value_loss": [normal(5, 30), normal(30), *normal(3, 5), 0.2, normal(30)],
        "packed_gae": [*normal(2, 5), torch.tensor([0, 5], dtype=torch.int32), torch.ones(5).bool(), 1.0, 1.0],
    }
    arguments[op][index] = argument
    return op, arguments[op]


BAD_ARGUMENTS = {
    "three dimensions": (bad("logits_stats", 0, normal(5, 30, 1)), r"\[5, 30, 1\]"),
    "logits of float64": (bad("logits_stats", 0, normal(5, 30).double()), "Float, not Double"),
    "strided logits": (bad("logits_stats", 0, normal(30, 5).t()), r"strides \[1, 5\]"),
    "too few targets": (bad("logits_stats", 1, TARGETS[:4]), r"\[n\] = \[5\], not Long \[4\]"),
    "targets of int32": (bad("logits_stats", 1, TARGETS.int()), "Long, not Int"),
    "row numbers of bfloat16": (bad("dlogits", 3, normal(5).bfloat16()), "one dtype, not Float and BFloat16"),
    "strided row numbers": (bad("dlogits", 5, normal(10)[::2]), r"strides \[2\]"),
    "out of another shape": (bad("dlogits", -1, normal(5, 31)), r"\[5, 30\] and \[5, 31\]"),
    "out of integers": (bad("dlogits", -1, torch.zeros(5, 30).int()), "not Int"),
    "strided hidden": (bad("packed_value_loss", 0, normal(30, 5).t()), r"strides \[1, 5\]"),
    "hidden of float64": (bad("packed_value_loss", 0, normal(5, 30).double()), "not Double"),
    "head of another type": (bad("packed_value_loss", 1, normal(30).half()), "Float and Half"),
    "head of another size": (bad("packed_value_loss", 1, normal(31)), r"\[H\] = \[30\], not Float \[31\]"),
    "weights of another size": (bad("packed_value_loss", 4, normal(6)), r"\[T\] = \[5\], not Float \[6\]"),
    "d_head of float64": (bad("packed_value_loss", -1, normal(30).double()), "Float, not Double"),
    "rewards of float16": (bad("packed_gae", 0, normal(5).half()), "not Half"),
    "too few values": (bad("packed_gae", 1, normal(4)), r"\[5\] and \[4\]"),
    "long boundaries": (bad("packed_gae", 2, torch.tensor([0, 5])), "Int, not Long"),
    "no boundaries": (bad("packed_gae", 2, torch.zeros(0).int()), r"\[0\]"),
    "mask of floats": (bad("packed_gae", 3, torch.ones(5)), "Bool, not Float"),
}


@pytest.mark.parametrize(("call", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_are_refused_with_what_they_are(ops: Any, call: tuple[str, list[Any]], message: str) -> None:
    op, arguments = call
    out_name = {"dlogits": "out", "packed_value_loss": "d_head"}.get(op)
    keywords = {out_name: arguments.pop()} if out_name else {}
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(*arguments, **keywords)


def test_a_row_that_does_not_fit_in_shared_memory_is_refused(ops: Any) -> None:
    hidden = torch.zeros(1, 40961)
    with pytest.raises(ValueError, match="hidden size of 40961 is more than the 40960"):
        ops.packed_value_loss(hidden, hidden[0], *normal(3, 1), 0.2, d_head=torch.zeros(40961))
