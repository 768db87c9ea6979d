"""`logits_stats` and `dlogits` under the emulator, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from tests.csrc.emulation import BFLOAT16, FLOAT16, FLOAT32, as_float64, poison, run

# One column; around a warp, a pack of four, a tile of a warp (256), the switch to whole blocks (2048) and a block's
# tile (4096); vocabularies of the tests.
COLUMNS = [1, 2, 31, 33, 101, 668, 1025, 2048, 2049, 4099]
SCALE = 1 / 0.7


class Rows(NamedTuple):
    logits: np.ndarray  # [n, v] float32
    targets: np.ndarray  # [n] int64, in the whole vocabulary
    vocab_start: int = 0

    @property
    def x(self) -> np.ndarray:
        return self.logits.astype(np.float64) * SCALE


def random_rows(n: int, v: int) -> Rows:
    random = np.random.default_rng((n, v))
    return Rows(4 * random.normal(size=(n, v)).astype(np.float32), random.integers(0, v, n))


class Definition(NamedTuple):
    log_prob: np.ndarray
    entropy: np.ndarray
    log_sum_exp: np.ndarray


def define(rows: Rows) -> Definition:
    maximum = rows.x.max(axis=1, keepdims=True)
    log_sum_exp = maximum + np.log(np.exp(rows.x - maximum).sum(axis=1, keepdims=True))
    log_p = rows.x - log_sum_exp
    p = np.exp(log_p)
    entropy = -(p * np.where(p > 0, log_p, 0)).sum(axis=1)
    return Definition(np.take_along_axis(log_p, rows.targets[:, None], 1)[:, 0], entropy, log_sum_exp[:, 0])


def logits_stats(rows: Rows, entropy: bool = True, misalign: bool = False) -> np.ndarray:
    n, v = rows.logits.shape
    stats = poison(n, 4)
    run(
        "logits_stats", rows.logits, rows.targets, rows.vocab_start, stats, n, v, SCALE, entropy,
        misalign=[rows.logits] if misalign else [],
    )  # fmt: skip
    return stats


def compute(blocks: list[Rows], misalign: bool = False) -> Definition:
    """The kernel on every block, whose statistics are then combined in float64."""
    m, s, y, t = np.stack([logits_stats(rows, misalign=misalign) for rows in blocks]).astype(np.float64).T
    maximum = m.max(axis=1, keepdims=True)  # [n, blocks], as all of them
    below = np.maximum(m - maximum, -1e30)
    factor = np.exp(below)
    s, y = (factor * s).sum(1), (factor * (y + below * s)).sum(1)
    log_sum_exp = maximum[:, 0] + np.log(s)
    return Definition(t.sum(1) - log_sum_exp, np.log(s) - y / s, log_sum_exp)


def check(actual: Definition, expected: Definition, rtol: float = 2e-6) -> None:
    for name in Definition._fields:
        got, wanted = getattr(actual, name), getattr(expected, name)
        # A sum of float32 terms of this size: a few units in the last place of the log-sum-exp.
        limit = rtol * np.maximum(np.abs(expected.log_sum_exp), np.abs(wanted)) + rtol
        np.testing.assert_array_less(np.abs(got - wanted), limit + 1e-30, err_msg=name)


@pytest.mark.parametrize("n", [0, 1, 17])
@pytest.mark.parametrize("v", COLUMNS)
def test_log_prob_and_entropy_equal_the_definition(v: int, n: int) -> None:
    rows = random_rows(n, v)
    check(compute([rows]), define(rows))


@pytest.mark.parametrize("entropy", [True, False])
def test_statistics_are_those_of_the_formula(entropy: bool) -> None:
    rows = random_rows(5, 300)._replace(targets=np.array([1000, 1299, 999, 1300, 1007]), vocab_start=1000)
    below = rows.x - rows.x.max(axis=1, keepdims=True)
    exp = np.exp(below)
    target = [rows.x[0, 0], rows.x[1, 299], 0, 0, rows.x[4, 7]]  # 0 where the target is another block's
    expected = np.stack([rows.x.max(axis=1), exp.sum(1), (below * exp).sum(1) * entropy, target], axis=1)
    np.testing.assert_allclose(logits_stats(rows, entropy), expected, rtol=3e-6, atol=1e-5)


@pytest.mark.parametrize("v", [668, 2052])
def test_logits_may_begin_at_any_float(v: int) -> None:
    rows = random_rows(5, v)
    check(compute([rows], misalign=True), define(rows))


@pytest.mark.parametrize("width", [1, 40, 1024])
def test_blocks_combine_to_the_whole_vocabulary(width: int) -> None:
    whole = random_rows(17, 3 * width)
    blocks = [
        Rows(np.ascontiguousarray(whole.logits[:, i * width : (i + 1) * width]), whole.targets, i * width)
        for i in range(3)
    ]
    check(compute(blocks), define(whole))


def test_a_block_without_columns_adds_nothing() -> None:
    whole = random_rows(9, 50)
    empty = Rows(np.zeros((9, 0), np.float32), whole.targets, vocab_start=50)
    np.testing.assert_array_equal(logits_stats(empty), np.tile([-np.inf, 0, 0, 0], (9, 1)))
    check(compute([whole, empty]), define(whole))


Row = Callable[[int], np.ndarray]
ADVERSARIAL: dict[str, Row] = {
    "all equal": lambda v: np.full(v, 3.25),
    "one huge": lambda v: np.where(np.arange(v) == v // 3, 5.6e4, 0.0),
    "all huge": lambda v: np.full(v, 1e5) + np.arange(v) % 2,
    "all very small": lambda v: np.full(v, -1e5) + np.arange(v) % 2,
    "rising": lambda v: np.linspace(-90, 90, v),
    "falling": lambda v: np.linspace(90, -90, v),
    "-inf but one": lambda v: np.where(np.arange(v) == v - 1, 2.0, -np.inf),
    "-inf first": lambda v: np.where(np.arange(v) < v - 3, -np.inf, np.arange(v) % 3),
}


@pytest.mark.parametrize("v", [101, 2500])
@pytest.mark.parametrize("row", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_adversarial_rows(row: Row, v: int) -> None:
    logits = np.tile(row(v), (2, 1)).astype(np.float32)
    rows = Rows(logits, np.array([v - 1, logits[1].argmax()]))
    actual, expected = compute([rows]), define(rows)
    check(actual, expected)
    # However large the logits are, the entropy and the likeliest token's log-probability stay exact.
    np.testing.assert_allclose(actual.log_prob[1], expected.log_prob[1], rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(actual.entropy, expected.entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("v", [33, 3000])
def test_nan_is_not_hidden(v: int) -> None:
    rows = random_rows(3, v)
    rows.logits[1, v // 2] = np.nan
    actual = compute([rows])
    for values in actual:
        assert np.isnan(values).tolist() == [False, True, False]


# ---- dlogits ----

DTYPES = {"float32": (FLOAT32, np.float32), "bfloat16": (BFLOAT16, np.uint16), "float16": (FLOAT16, np.uint16)}


def define_gradient(rows: Rows, g: np.ndarray, h: np.ndarray) -> np.ndarray:
    exact = define(rows)
    log_p = rows.x - exact.log_sum_exp[:, None]
    p = np.exp(log_p)
    is_target = np.arange(rows.logits.shape[1]) == rows.targets[:, None]
    centred = np.where(p > 0, log_p, 0) + exact.entropy[:, None]
    return SCALE * (g[:, None] * is_target - p * (g[:, None] + h[:, None] * centred))


def dlogits(rows: Rows, g: np.ndarray, h: np.ndarray, out: np.ndarray, dtype: str, misalign: bool = False) -> None:
    exact = define(rows)
    lse, entropy = exact.log_sum_exp.astype(np.float32), exact.entropy.astype(np.float32)
    run(
        "dlogits", rows.logits, rows.targets, rows.vocab_start, lse, entropy, g, h, out, DTYPES[dtype][0],
        *rows.logits.shape, SCALE, misalign=[out] if misalign else [],
    )  # fmt: skip


def gradients(n: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(n)
    return random.normal(size=n).astype(np.float32), (0.1 * random.normal(size=n)).astype(np.float32)


def check_gradient(actual: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    # Half a unit in the last place of the type, and the rounding of log_sum_exp (about 20) in p; float16 has a smallest
    # number of 6e-8.
    rtol = {"float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-10}[dtype]
    np.testing.assert_allclose(
        as_float64(actual, dtype), expected, rtol=rtol, atol=1e-6 if dtype != "float16" else 2e-6
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "v"), [(0, 33), (1, 1), (17, 2), (17, 31), (17, 32), (3, 101), (17, 668), (3, 1025), (2, 4104), (2, 4099)]
)
def test_dlogits_equals_the_definition(n: int, v: int, dtype: str) -> None:
    rows, (g, h) = random_rows(n, v), gradients(n)
    out = poison(n, v, dtype=DTYPES[dtype][1])
    dlogits(rows, g, h, out, dtype)
    check_gradient(out, define_gradient(rows, g, h), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dlogits_may_begin_at_any_element(dtype: str) -> None:
    rows, (g, h) = random_rows(3, 64), gradients(3)
    out = poison(3, 64, dtype=DTYPES[dtype][1])
    dlogits(rows, g, h, out, dtype, misalign=True)
    check_gradient(out, define_gradient(rows, g, h), dtype)


@pytest.mark.parametrize("v", [33, 1024, 9001])
def test_dlogits_in_place_equals_the_definition(v: int) -> None:
    rows, (g, h) = random_rows(3, v), gradients(3)
    expected = define_gradient(rows, g, h)
    dlogits(rows, g, h, rows.logits, "float32")
    check_gradient(rows.logits, expected, "float32")


def test_dlogits_of_a_block_gives_nothing_to_targets_of_others() -> None:
    rows, (g, h) = random_rows(4, 120), gradients(4)
    expected = define_gradient(rows, g, h)
    foreign = np.array([0, 2])
    expected[foreign, rows.targets[foreign]] -= g[foreign] * SCALE
    targets = rows.targets + 70
    targets[foreign] = [69, 190]
    lse, entropy = (x.astype(np.float32) for x in (define(rows).log_sum_exp, define(rows).entropy))
    out = poison(4, 120)
    run("dlogits", rows.logits, targets, 70, lse, entropy, g, h, out, FLOAT32, 4, 120, SCALE)
    check_gradient(out, expected, "float32")


@pytest.mark.parametrize("row", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_dlogits_of_adversarial_rows(row: Row) -> None:
    logits = np.tile(row(300).astype(np.float32), (2, 1))
    rows, (g, h) = Rows(logits, np.array([299, 298])), gradients(2)
    out = poison(2, 300)
    dlogits(rows, g, h, out, "float32")
    # log_sum_exp in float32 is off by up to 2^-24 of itself, and p by as much relative to itself.
    rtol = 1e-5 + float(np.abs(define(rows).log_sum_exp).max()) * 2**-23
    np.testing.assert_allclose(out, define_gradient(rows, g, h), rtol=rtol, atol=1e-6)
