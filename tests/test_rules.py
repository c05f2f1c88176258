"""Rules, one process, no center but plain arrays: each equals its listing and keeps the promises of all rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from easgd_local.backend.cpu import CpuOps
from easgd_local.rules import RULES, rule_class
from easgd_local.rules.base import Rule
from easgd_local.rules.eamsgd import EAMSGD
from easgd_local.rules.easgd import EASGD
from easgd_local.rules.msgd import MSGD
from easgd_local.rules.sgd import SGD
from tests import paper

N = 31
EIGHT_EPS = 8 * np.finfo(np.float32).eps


class Desk:
    """Stands in for a worker: the rule's vectors as plain arrays, the whole center as one block."""

    def __init__(self, rule: Rule, rank: int, workers: int, c: np.ndarray, gradient: paper.Gradient) -> None:
        self.rank, self.workers, self.t, self.ops = rank, workers, 0, CpuOps()
        self.rule, self.c, self._gradient, self.visits = rule, c, gradient, 0
        self.x = c.copy()
        for name in (*rule.local, *rule.scratch):
            setattr(self, name, np.zeros_like(c))
        self.g = np.zeros_like(c)

    @property
    def lr(self) -> float:
        return self.rule.lr

    def turns(self) -> Iterator[slice]:
        self.visits += 1
        yield from (slice(0, 7), slice(7, 7), slice(7, None))

    def grad(self, at: np.ndarray | None = None) -> np.ndarray:
        self.g = self._gradient(self.rank, self.t, self.x if at is None else at)
        self.handed_out = self.g.copy()
        return self.g


def noisy_quadratic(i: int, t: int, x: np.ndarray) -> np.ndarray:
    """g = hx - b - ξ with a fixed ξ for each (i, t)."""
    h = np.linspace(0.1, 2, len(x)).astype(x.dtype)
    return h * x - np.random.default_rng([i, t]).standard_normal(len(x)).astype(x.dtype)


def train(rule: Rule, workers: int, steps: int, gradient: paper.Gradient = noisy_quadratic) -> list[Desk]:
    c = np.random.default_rng(7).standard_normal(N).astype(np.float32)
    desks = [Desk(rule, i, workers, c, gradient) for i in range(workers)]
    for _ in range(steps):
        for desk in desks:
            rule.step(desk)
            desk.t += 1
    return desks


def start(workers: int) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    c = np.random.default_rng(7).standard_normal(N).astype(np.float32)
    return [c.copy() for _ in range(workers)], [np.zeros_like(c) for _ in range(workers)], c


def one_after_the_other(workers: int) -> paper.Order:
    return [(i, slice(None)) for i in range(workers)]


@pytest.mark.parametrize("alpha", [0.0, 0.225, 0.5, 1.0])
@pytest.mark.parametrize("tau", [1, 3])
@pytest.mark.parametrize("workers", [1, 3])
def test_easgd_equals_its_listing(alpha: float, tau: int, workers: int) -> None:
    desks = train(EASGD(lr=0.1, tau=tau, alpha=alpha), workers, 20)
    x, _, c = start(workers)
    paper.easgd(
        x, c, noisy_quadratic, eta=0.1, alpha=alpha, tau=tau, steps=range(20), order=one_after_the_other(workers)
    )
    assert np.array_equal(desks[0].c, c)
    assert all(np.array_equal(desk.x, xi) for desk, xi in zip(desks, x, strict=True))


@pytest.mark.parametrize("alpha", [0.0, 0.225, 0.5, 1.0])
@pytest.mark.parametrize("tau", [1, 3])
@pytest.mark.parametrize("workers", [1, 3])
def test_eamsgd_equals_its_listing(alpha: float, tau: int, workers: int) -> None:
    desks = train(EAMSGD(lr=0.03, tau=tau, alpha=alpha, momentum=0.7), workers, 20)
    x, v, c = start(workers)
    paper.eamsgd(
        x, v, c, noisy_quadratic, eta=0.03, alpha=alpha, delta=0.7, tau=tau, steps=range(20),
        order=one_after_the_other(workers),
    )  # fmt: skip
    assert np.array_equal(desks[0].c, c)
    assert all(np.array_equal(desk.x, xi) for desk, xi in zip(desks, x, strict=True))
    assert all(np.array_equal(desk.v, vi) for desk, vi in zip(desks, v, strict=True))


def test_sgd_and_msgd_equal_their_listings() -> None:
    (x,), (v,), _ = start(1)
    paper.sgd(x, noisy_quadratic, eta=0.1, steps=range(20))
    (desk,) = train(SGD(lr=0.1), 1, 20)
    assert np.array_equal(desk.x, x)
    assert np.array_equal(desk.c, x)
    (x,), (v,), _ = start(1)
    paper.msgd(x, v, noisy_quadratic, eta=0.1, delta=0.6, steps=range(20))
    (desk,) = train(MSGD(lr=0.1, momentum=0.6), 1, 20)
    assert np.array_equal(desk.x, x)
    assert np.array_equal(desk.c, x)


def test_without_momentum_eamsgd_is_easgd() -> None:
    still = train(EAMSGD(lr=0.1, tau=2, alpha=0.3, momentum=0.0), 3, 15)
    plain = train(EASGD(lr=0.1, tau=2, alpha=0.3), 3, 15)
    assert np.array_equal(still[0].c, plain[0].c)


def test_with_alpha_zero_the_workers_never_meet() -> None:
    desks = train(EASGD(lr=0.1, tau=1, alpha=0.0), 3, 15)
    assert np.array_equal(desks[0].c, start(1)[2])
    for i, desk in enumerate(desks):
        (x,), _, _ = start(1)
        paper.sgd(x, lambda _, t, at, i=i: noisy_quadratic(i, t, at), eta=0.1, steps=range(15))  # type: ignore[misc]
        assert np.array_equal(desk.x, x)


def test_an_exchange_moves_the_center_by_what_the_worker_gives_up() -> None:
    (desk,) = train(EASGD(lr=0.1, tau=1, alpha=0.3), 1, 4, gradient=lambda i, t, x: np.ones_like(x) * (t + 1))
    x, c = desk.x.copy(), desk.c.copy()
    desk._gradient = lambda i, t, at: np.zeros_like(at)
    desk.rule.step(desk)
    bound = EIGHT_EPS * (np.abs(x) + np.abs(c))
    assert not np.array_equal(desk.x, x)
    assert np.all(np.abs((desk.x + desk.c) - (x + c)) <= bound)


@pytest.mark.parametrize(("alpha", "expected"), [(0.5, "the mean of both"), (1.0, "swapped")])
def test_alpha_one_half_meets_in_the_middle_and_alpha_one_swaps(alpha: float, expected: str) -> None:
    desk = Desk(EASGD(tau=1, alpha=alpha), 0, 1, np.zeros(N, np.float32), lambda i, t, x: np.zeros_like(x))
    desk.x[:] = 4.0
    desk.rule.step(desk)
    assert (desk.x[0], desk.c[0]) == ((2.0, 2.0) if expected == "the mean of both" else (0.0, 4.0))


def test_a_worker_visits_the_center_every_tau_steps() -> None:
    (desk,) = train(EASGD(tau=4), 1, 9)
    assert desk.visits == 3  # at t = 0, 4, 8
    assert EASGD(tau=4).period == 4


@pytest.mark.parametrize("name", RULES)
def test_every_rule_leaves_the_gradient_alone(name: str) -> None:
    for desk in train(rule_class(name)(), 1, 3):
        assert np.array_equal(desk.g, desk.handed_out)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_converges_on_a_quadratic(name: str) -> None:
    desks = train(rule_class(name)(), 1, 2000, gradient=lambda i, t, x: x - np.float32(3))
    assert np.abs(desks[0].c - 3).max() < 1e-4


@pytest.mark.parametrize("name", RULES)
def test_every_rule_says_its_formula_and_its_source(name: str) -> None:
    doc: Any = rule_class(name).__doc__
    assert "<-" in doc
    assert "arXiv:" in doc
    assert all(one.metadata["help"] for one in fields(rule_class(name)))


def test_the_three_spellings_of_the_moving_rate_agree() -> None:
    assert EASGD(beta=0.8).moving_rate(4) == 0.2
    assert EASGD(alpha=0.2).derived(4) == {"alpha": 0.2, "beta": 0.8, "rho": pytest.approx(0.2 / 0.05)}
    assert EASGD(rho=2.0, lr=0.1).moving_rate(4) == pytest.approx(0.2)
    assert EASGD().moving_rate(3) == pytest.approx(0.3)
    with pytest.raises(ValueError, match=r"beta=3\.0: α = β/p = 1\.5"):
        EASGD(beta=3.0).moving_rate(2)


def test_a_moving_rate_beyond_the_stability_bound_warns_with_the_bound() -> None:
    (sentence,) = EASGD(alpha=1.0, lr=0.1).warnings(4)
    assert "0.9744" in sentence  # (4 - 0.2) / (4 - 0.1)
    assert EASGD(alpha=0.97, lr=0.1).warnings(4) == []
