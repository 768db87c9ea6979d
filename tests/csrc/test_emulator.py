"""The emulator sees what it claims to see."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from tests.csrc.emulation import library, poison, run


def test_a_barrier_that_some_threads_never_reach_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="some threads wait at a barrier that others never reach"):
        run("launch_barrier_under_a_branch")


def test_a_race_shows_as_a_result_that_depends_on_the_order_of_threads() -> None:
    with pytest.raises(AssertionError, match="depend on the order of threads"):
        run("launch_race", poison(128, dtype=np.int32))


def test_half_rounds_as_torch_does() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=5000) * 10.0 ** random.integers(-9, 6, 5000)
    ties = np.arange(1, 4096, 2) / 2  # between neighbours, at several exponents
    edges = [0, -0.0, 65504, 65519.9, 65520, 1e9, np.inf, -np.inf, 2.0**-24, 2.0**-25, 1.5 * 2.0**-24, 2.0**-14]
    x = np.concatenate([x, ties, ties * 2.0**-20, edges]).astype(np.float32)
    bits, back = poison(len(x), dtype=np.uint16), poison(len(x))
    arrays = (ctypes.c_void_p(a.ctypes.data) for a in (x, bits, back))
    library().half_round_trip(*arrays, ctypes.c_int64(len(x)))
    expected = torch.from_numpy(x).half()
    np.testing.assert_array_equal(bits, expected.view(torch.int16).numpy().view(np.uint16))
    np.testing.assert_array_equal(back, expected.float().numpy())
