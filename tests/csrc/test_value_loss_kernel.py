"""`packed_value_loss` under the emulator, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.csrc.emulation import BFLOAT16, FLOAT16, FLOAT32, as_float64, poison, run, workspace

DTYPES = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16}


def normal(seed: int, n: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng((seed, n)).normal(size=n) * scale).astype(np.float32)


def masked_weights(n: int) -> np.ndarray:
    """A share in the loss for about two thirds of the tokens, none for the others."""
    random = np.random.default_rng(n)
    return (random.random(n) * (random.random(n) < 2 / 3)).astype(np.float32)


def rounded(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """x in the type, as the kernel reads it and in float64."""
    tensor = torch.from_numpy(x).to(getattr(torch, dtype))
    stored = tensor.numpy() if dtype == "float32" else tensor.view(torch.int16).numpy().view(np.uint16)
    return stored.copy(), tensor.double().numpy()


def check_value_loss(
    num_tokens: int, hidden_size: int, dtype: str, clip_eps: float = 0.2, misalign: bool = False
) -> None:
    """Runs the kernel on random inputs and compares with float64."""
    stored, hidden = rounded(normal(8, num_tokens * hidden_size).reshape(num_tokens, hidden_size), dtype)
    stored_head, head = rounded(normal(9, hidden_size, (hidden_size + 1) ** -0.5), dtype)
    returns, weights = normal(10, num_tokens), masked_weights(num_tokens)
    value = hidden @ head
    old_values = (value + normal(11, num_tokens, 0.3)).astype(np.float32)

    error, change = value - returns, value - old_values
    clipped_error = old_values + change.clip(-clip_eps, clip_eps) - returns
    is_clipped = (np.abs(change) > clip_eps) & (np.abs(clipped_error) > np.abs(error)) & (clip_eps > 0)
    d_value = np.where(is_clipped, 0, weights * error)
    # A token without weight has a value, and may hold anything.
    returns[weights == 0], old_values[weights == 0] = np.nan, np.nan
    nothing = np.flatnonzero(weights == 0)[::2]
    stored[nothing], value[nothing] = np.nan if dtype == "float32" else 0x7FFF, np.nan

    values, d_hidden = poison(num_tokens), poison(num_tokens, hidden_size, dtype=stored.dtype)
    before = normal(12, hidden_size)
    d_head = before.copy()
    run(
        "packed_value_loss", stored, stored_head, DTYPES[dtype], old_values, returns, weights, values, d_hidden, d_head,
        workspace("packed_value_loss", num_tokens, hidden_size), num_tokens, hidden_size, clip_eps,
        misalign=[stored] if misalign else [],
    )  # fmt: skip
    # Dot products of float32 products; d_hidden is rounded to the type, by half a unit in its last place.
    rtol = {"float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-10}[dtype]
    np.testing.assert_allclose(values, value, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(as_float64(d_hidden, dtype), d_value[:, None] * head, rtol=rtol, atol=2e-6)
    np.testing.assert_allclose(d_head, before + d_value @ hidden, rtol=1e-5, atol=2e-5 * (1 + num_tokens**0.5))


# The last case gives some blocks a second turn, of several warps.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "hidden_size"), [
    (0, 64), (1, 1), (2, 2), (17, 31), (17, 33), (3, 101), (5, 64), (9, 896), (3, 4104), (3, 2049), (1100, 520),
])  # fmt: skip
def test_packed_value_loss_equals_the_definition(num_tokens: int, hidden_size: int, dtype: str) -> None:
    check_value_loss(num_tokens, hidden_size, dtype)


def test_value_loss_without_clipping() -> None:
    check_value_loss(40, 64, "float32", clip_eps=0.0)


def test_hidden_states_may_begin_at_any_element() -> None:
    check_value_loss(9, 64, "bfloat16", misalign=True)
