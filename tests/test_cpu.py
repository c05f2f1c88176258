"""The operations on the CPU: each equals its formula, every operation rounded once, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest

from easgd_local.backend.cpu import PIECE, CpuOps, Vector, vector

SIZES = (0, 1, 31, 1023, PIECE, PIECE + 1, 100_003)
OFFSETS = (0, 1, 3)  # floats past a page
GUARD = np.float32(-7.5)  # what surrounds a vector, and must still do so afterwards
U = 2.0**-24  # half the distance from 1 to the next float32

HYPER = (0.225, 0.037, 0.9, 5e-4)  # as the operations get them, the formulas as float32
ALPHA, LR, MOMENTUM, DECAY = map(np.float32, HYPER)


class Operation(NamedTuple):
    """One operation on named vectors, and its formula, which works in whatever type its vectors have."""

    run: Callable[..., None]  # (ops, vectors)
    formula: Callable[..., dict[str, Any]]  # what is written, from the old values
    reads: tuple[str, ...]  # vectors that must not change
    levels: int  # of rounded operations, one upon the other


def pull(x, c, d, a):
    s = x - c
    d = s * a
    return {"d": d, "c": c + d}


def descend(x, g, lr):
    step = g * lr
    return {"x": x - step}


def descend_and_subtract(x, g, d, lr):
    near = x - d
    step = g * lr
    return {"x": near - step}


def nesterov(x, v, g, lr, momentum):
    kept = v * momentum
    step = g * lr
    v = kept - step
    return {"v": v, "x": x + v}


def nesterov_and_subtract(x, v, g, d, lr, momentum):
    return nesterov(x - d, v, g, lr, momentum)


def lookahead(y, x, v, momentum):
    ahead = v * momentum
    return {"y": x + ahead}


def add_decay(g, x, decay):
    pull_to_zero = x * decay
    return {"g": g + pull_to_zero}


def copy(y, x):
    return {"y": x}


def fill(y):
    return {"y": 0 * y + 2.5}


OPERATIONS = {
    "pull": Operation(
        lambda ops, x, c, d: ops.pull(x, c, d, 0.225), lambda x, c, d: pull(x, c, d, ALPHA), ("x",), 3
    ),
    "descend": Operation(
        lambda ops, x, g: ops.descend(x, g, 0.037), lambda x, g: descend(x, g, LR), ("g",), 2
    ),
    "descend with d": Operation(
        lambda ops, x, g, d: ops.descend(x, g, 0.037, d),
        lambda x, g, d: descend_and_subtract(x, g, d, LR), ("g", "d"), 2,
    ),
    "nesterov": Operation(
        lambda ops, x, v, g: ops.nesterov(x, v, g, 0.037, 0.9),
        lambda x, v, g: nesterov(x, v, g, LR, MOMENTUM), ("g",), 3,
    ),
    "nesterov with d": Operation(
        lambda ops, x, v, g, d: ops.nesterov(x, v, g, 0.037, 0.9, d),
        lambda x, v, g, d: nesterov_and_subtract(x, v, g, d, LR, MOMENTUM), ("g", "d"), 3,
    ),
    "lookahead": Operation(
        lambda ops, y, x, v: ops.lookahead(y, x, v, 0.9), lambda y, x, v: lookahead(y, x, v, MOMENTUM),
        ("x", "v"), 2,
    ),
    "add_decay": Operation(
        lambda ops, g, x: ops.add_decay(g, x, 5e-4), lambda g, x: add_decay(g, x, DECAY), ("x",), 2
    ),
    "copy": Operation(lambda ops, y, x: ops.copy(y, x), lambda y, x: copy(y, x), ("x",), 0),
    "fill": Operation(lambda ops, y: ops.fill(y, 2.5), lambda y: fill(y), (), 0),
}  # fmt: skip

EVERY = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())


def names(operation: Operation) -> tuple[str, ...]:
    return operation.formula.__code__.co_varnames[: operation.formula.__code__.co_argcount]


def values(n: int, seed: int) -> Vector:
    """n numbers over many orders of magnitude, zeros of both signs among them."""
    random = np.random.default_rng(seed)
    x = (random.standard_normal(n) * np.exp(3 * random.standard_normal(n))).astype(np.float32)
    x[5::17], x[11::17] = 0.0, -0.0
    return x


class Padded:
    """A vector between guards, `offset` floats past a page; read-only if the operation may not write it."""

    def __init__(self, content: Vector, offset: int) -> None:
        self.whole = vector(len(content) + 16)
        self.whole[:] = GUARD
        self.place = slice(offset, offset + len(content))
        self.whole[self.place] = content

    def view(self, writable: bool) -> Vector:
        part = self.whole[self.place]
        part.flags.writeable = writable
        return part

    def guards_hold(self) -> bool:
        return bool(np.all(np.delete(self.whole, self.place) == GUARD))


def bits(x: Any) -> np.ndarray:
    assert x.dtype == np.float32
    return np.asarray(x).view(np.uint32)


def apply(operation: Operation, old: dict[str, Vector], offset: int) -> dict[str, Vector]:
    """The vectors after the operation, each a different number of floats past a page."""
    padded = {name: Padded(x, (offset * k) % 8) for k, (name, x) in enumerate(old.items(), start=1)}
    operation.run(CpuOps(), **{name: box.view(name not in operation.reads) for name, box in padded.items()})
    assert all(box.guards_hold() for box in padded.values())
    return {name: box.view(False) for name, box in padded.items()}


def planned(operation: Operation, n: int) -> dict[str, Vector]:
    return {name: values(n, seed) for seed, name in enumerate(names(operation))}


# Formulas


@EVERY
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("offset", OFFSETS)
def test_every_operation_equals_its_formula_to_the_bit(operation, n, offset):
    old = planned(operation, n)
    new = apply(operation, old, offset)
    expected = old | operation.formula(**old)
    assert {*operation.formula(**old)} | {*operation.reads} == {*old}
    for name, x in new.items():
        assert np.array_equal(bits(x), bits(expected[name])), name


@EVERY
def test_every_operation_is_as_exact_as_its_roundings_allow(operation):
    old = planned(operation, 100_003)
    new = apply(operation, old, 0)
    wide = {name: x.astype(np.float64) for name, x in old.items()}
    # All coefficients are below 1, so at each level of a formula the intermediate results add up to at most `most` in
    # absolute value, and their roundings err by at most U * most. One level more covers the products of errors.
    most = sum(np.abs(x) for x in wide.values())
    for name, exact in operation.formula(**wide).items():
        assert np.all(np.abs(new[name] - exact) <= (operation.levels + 1) * U * most), name


# (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24, and the last term falls to rounding: a product that is rounded leaves exactly zero
# where a fused multiply-add would leave 2^-24.
E, SQUARE = np.float32(1 + 2**-12), np.float32(1 + 2**-11)

PLANTED = {
    "pull": (lambda ops, x, c, d: ops.pull(x, c, d, E), {"x": E - SQUARE, "c": -SQUARE, "d": 0}, {"c": 0, "d": SQUARE}),
    "descend": (lambda ops, x, g: ops.descend(x, g, E), {"x": SQUARE, "g": E}, {"x": 0}),
    "descend with d": (lambda ops, x, g, d: ops.descend(x, g, E, d), {"x": 2 * SQUARE, "g": E, "d": SQUARE}, {"x": 0}),
    "nesterov": (lambda ops, x, v, g: ops.nesterov(x, v, g, E, E), {"x": 0, "v": E, "g": E}, {"v": 0, "x": 0}),
    "nesterov with d": (
        lambda ops, x, v, g, d: ops.nesterov(x, v, g, E, E, d), {"x": 1, "v": E, "g": E, "d": 1}, {"v": 0, "x": 0},
    ),
    "lookahead": (lambda ops, y, x, v: ops.lookahead(y, x, v, E), {"y": 5, "x": -SQUARE, "v": E}, {"y": 0}),
    "add_decay": (lambda ops, g, x: ops.add_decay(g, x, E), {"g": -SQUARE, "x": E}, {"g": 0}),
}  # fmt: skip


def test_the_planted_product_tells_a_fused_multiply_add_from_two_operations():
    assert Fraction(float(E)) ** 2 - Fraction(float(SQUARE)) == Fraction(1, 2**24)
    assert E * E - SQUARE == 0


@pytest.mark.parametrize("run, old, expected", PLANTED.values(), ids=PLANTED.keys())
@pytest.mark.parametrize("n", [1, 31, PIECE + 1])
def test_no_operation_fuses_multiply_and_add(run, old, expected, n):
    full = {name: np.full(n, value, np.float32) for name, value in old.items()}
    run(CpuOps(), **full)
    for name, value in expected.items():
        assert np.all(full[name] == value), name


def test_hyperparameters_that_are_not_rounded_first_would_show():
    x = values(1023, 1)
    for value in HYPER:
        assert not np.array_equal(x * np.float32(value), (x * np.float64(value)).astype(np.float32))


def test_lookahead_may_write_over_what_it_reads():
    x, v = values(1023, 1), values(1023, 2)
    expected = lookahead(x, x, v, MOMENTUM)["y"]
    CpuOps().lookahead(x, x, v, MOMENTUM)
    assert np.array_equal(bits(x), bits(expected))


@EVERY
def test_an_operation_on_blocks_equals_the_one_on_the_whole(operation):
    old, n = planned(operation, PIECE + 1023), PIECE + 1023
    whole = apply(operation, old, 0)
    parts = {name: x.copy() for name, x in old.items()}
    ops = CpuOps()
    for b in (slice(500, n), slice(0, 31), slice(31, 31), slice(31, 500)):
        operation.run(ops, **{name: x[b] for name, x in parts.items()})
    assert all(np.array_equal(bits(whole[name]), bits(parts[name])) for name in parts)


# Values that are not finite


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "places", [[0], [1022], [3, 17, 18], [PIECE - 1, PIECE], [PIECE + 30], list(range(PIECE, PIECE + 31))]
)
def test_pull_reloads_what_is_not_finite_and_counts_it(bad, places):
    x, c, d = (values(PIECE + 31, seed) for seed in range(3))
    clean = pull(x, c, d, ALPHA)
    x[places] = bad
    before, center, ops = x.copy(), c.copy(), CpuOps()
    ops.pull(x, c, d, ALPHA)
    others = np.ones(len(x), bool)
    others[places] = False
    assert ops.nonfinite == len(places)
    assert np.array_equal(x[places], center[places]) and np.array_equal(c[places], center[places])
    assert not d[places].any()
    assert np.array_equal(bits(x[others]), bits(before[others]))
    assert np.array_equal(bits(d[others]), bits(clean["d"][others]))
    assert np.array_equal(bits(c[others]), bits(clean["c"][others]))


def test_pull_sees_infinities_of_both_signs_that_would_cancel():
    x, c, d = (np.zeros(1023, np.float32) for _ in range(3))
    x[[7, 70, 700]] = np.inf, -np.inf, np.nan
    ops = CpuOps()
    ops.pull(x, c, d, 1.0)
    assert ops.nonfinite == 3 and not x.any() and not c.any() and not d.any()


def test_pull_counts_on_until_the_count_is_reset():
    ops = CpuOps()
    for expected in (2, 4):
        x, c, d = np.full(31, 1, np.float32), np.zeros(31, np.float32), np.zeros(31, np.float32)
        x[[3, 30]] = np.nan
        ops.pull(x, c, d, 0.5)
        assert ops.nonfinite == expected
    ops.pull(x, c, d, 0.5)  # all is finite now
    assert ops.nonfinite == 4


def test_pull_does_not_take_a_large_sum_for_a_value_that_is_not_finite():
    x, c, d = np.full(1023, 3e38, np.float32), np.zeros(1023, np.float32), np.zeros(1023, np.float32)
    ops = CpuOps()
    ops.pull(x, c, d, 1.0)
    assert ops.nonfinite == 0
    assert np.all(x == np.float32(3e38)) and np.array_equal(d, x) and np.array_equal(c, x)


def test_pull_takes_a_difference_that_overflows_for_not_finite():
    x, c, d = np.full(31, 1, np.float32), np.zeros(31, np.float32), np.zeros(31, np.float32)
    x[30], c[30] = 3e38, -3e38
    ops = CpuOps()
    ops.pull(x, c, d, 0.5)
    assert ops.nonfinite == 1
    assert d.tolist() == [0.5] * 30 + [0] and x[30] == c[30] == np.float32(-3e38)


def test_pull_contributes_nothing_to_a_center_that_is_not_finite():
    x, c, d = np.full(31, 1, np.float32), np.zeros(31, np.float32), np.zeros(31, np.float32)
    c[4] = np.inf
    ops = CpuOps()
    ops.pull(x, c, d, 0.5)
    assert ops.nonfinite == 1
    assert c[4] == x[4] == np.inf and d[4] == 0 and np.count_nonzero(c == 0.5) == 30


# The memory


@pytest.mark.parametrize("n", SIZES)
def test_a_vector_is_zeros_on_a_page(n):
    x = vector(n)
    assert x.shape == (n,) and x.dtype == np.float32 and not x.any()
    assert x.ctypes.data % 4096 == 0
    x[:] = 1  # writable
    assert not vector(n).any()
