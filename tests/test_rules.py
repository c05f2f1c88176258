"""One conformance suite for all rules: real workers and turns, in threads, against the listings and their promises."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import fields
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from easgd_local.backend.cpu import CpuOps
from easgd_local.learning_rate import LearningRate
from easgd_local.rules import RULES, rule_class
from easgd_local.rules.admm import ADMM
from easgd_local.rules.apam import APAM
from easgd_local.rules.asgd import ASGD, MVASGD
from easgd_local.rules.base import Rule
from easgd_local.rules.diloco import DiLoCo
from easgd_local.rules.downpour import ADownpour, Downpour, MVADownpour
from easgd_local.rules.eamsgd import EAMSGD
from easgd_local.rules.eamsgd_sync import EAMSGDSync
from easgd_local.rules.easgd import EASGD
from easgd_local.rules.easgd_gs import EASGDGaussSeidel
from easgd_local.rules.easgd_sync import EASGDSync
from easgd_local.rules.local import INNER, Local
from easgd_local.rules.localsgd import LocalSGD
from easgd_local.rules.mdownpour import MDownpour
from easgd_local.rules.msgd import MSGD
from easgd_local.rules.passm import PASSM, PASSMPlus
from easgd_local.rules.sgd import SGD
from easgd_local.rules.sma import SMA
from tests import listings, paper, threads
from tests.threads import N, noisy_quadratic, starting_point, train

EPS = np.finfo(np.float32).eps

# Each rule at values that are not its defaults, and at its limits.
CASES: list[Rule] = [
    *(kind(lr=0.1, tau=tau, alpha=alpha) for kind in (EASGD, EASGDSync) for tau in (1, 3) for alpha in (0, 0.25, 1)),
    *(kind(lr=0.03, tau=tau, alpha=0.25, momentum=0.7) for kind in (EAMSGD, EAMSGDSync) for tau in (1, 3)),
    *(EASGDGaussSeidel(lr=0.1, tau=tau, alpha=0.3, first=first) for tau in (1, 3) for first in ("center", "worker")),
    *(kind(lr=0.05, tau=tau) for kind in (Downpour, ADownpour) for tau in (1, 3)),
    MVADownpour(lr=0.05, tau=2, average_rate=0.1),
    MDownpour(lr=0.02, momentum=0.6),
    *(ADMM(lr=0.1, rho=rho) for rho in (0.3, 2.0)),
    *(APAM(lr=0.01, beta1=0.8, beta2=0.99, epsilon=1e-6, delay=delay) for delay in (0, 1, 4)),
    PASSM(lr=0.05, momentum=0.6),
    *(PASSMPlus(lr=0.05, momentum=0.6, full_steps=steps) for steps in (0, 5)),
    *(LocalSGD(lr=0.1, tau=tau) for tau in (1, 3)),
    *(LocalSGD(lr=0.1, tau=tau, inner="msgd", momentum=0.6) for tau in (1, 3)),
    *(SMA(lr=0.1, tau=tau, inner="sgd", center_momentum=0.4) for tau in (1, 3)),
    SMA(lr=0.05, tau=2, inner="msgd", center_momentum=0.4, momentum=0.6),
    *(DiLoCo(lr=0.1, tau=tau, inner="sgd", outer_lr=0.8, outer_momentum=0.4) for tau in (1, 3)),
    SGD(lr=0.1),
    MSGD(lr=0.05, momentum=0.6),
    ASGD(lr=0.1),
    MVASGD(lr=0.1, average_rate=0.1),
]


def named(rule: Rule) -> str:
    changed = (f"{one.name}={value}" for one in fields(rule) if (value := getattr(rule, one.name)) != one.default)
    return f"{rule.name} {' '.join(changed)}"


def in_order(rule: Rule) -> str:
    """The reproducible order of turns of the rule."""
    return "together" if "together" in rule.orders else "strict"


def each_rule(**given: Any) -> list[Rule]:
    """Every rule, with those of the given hyperparameters that it has (δ belongs to other local optimizers)."""
    rules = []
    for rule in RULES.values():
        names = {one.name for one in fields(rule)} - ({"momentum"} if issubclass(rule, Local) else set())
        rules.append(rule(**{name: value for name, value in given.items() if name in names}))
    return rules


def listing(rule: Rule, workers: int, steps: int, dtype: Any = np.float32, **values: Any) -> listings.State:
    start = values.pop("start", starting_point()).astype(dtype)
    gradient, blocks = values.pop("gradient", noisy_quadratic), threads.blocks_of(workers, len(start))
    return listings.compute(rule, start, workers, steps, gradient, blocks, threads.owned(workers))


# The listings


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("rule", CASES, ids=named)
def test_every_rule_equals_its_listing_to_the_bit(rule: Rule, workers: int) -> None:
    workers = 1 if rule.sequential else workers
    done, expected = train(rule, workers, 20, turns=in_order(rule)), listing(rule, workers, 20)
    for name, value in expected.items():
        actual = done.x[int(name[1:])] if name not in done.shared else done.shared[name]
        assert np.array_equal(actual.view(np.uint32), value.view(np.uint32)), name


def test_every_rule_has_a_case() -> None:
    assert {rule.name for rule in CASES} == RULES.keys()


def test_admms_sum_kept_incrementally_is_the_sum() -> None:
    start, blocks = starting_point().astype(np.float64), threads.blocks_of(3)
    ends = []
    for form in (paper.admm, paper.admm_incremental):
        x, multiplier, c = [start.copy() for _ in range(3)], [np.zeros(N) for _ in range(3)], start.copy()
        order = paper.round_robin(3, blocks)
        form(x, multiplier, c, noisy_quadratic, eta=0.1, rho=0.7, steps=range(50), order=order)
        ends.append(np.concatenate([c, *x, *multiplier]))
    assert np.abs(ends[0] - ends[1]).max() < 1e-12


def test_sync_easgd_moves_the_center_towards_the_mean_of_the_workers_by_beta() -> None:
    before = listing(EASGDSync(lr=0.1, tau=3, alpha=0.2), 3, 3, np.float64)  # the exchange of step 3 comes next
    after = listing(EASGDSync(lr=0.1, tau=3, alpha=0.2), 3, 4, np.float64)
    mean = (before["x0"] + before["x1"] + before["x2"]) / 3
    assert after["c"] == pytest.approx((1 - 0.6) * before["c"] + 0.6 * mean, rel=1e-12, abs=1e-12)


# Limits


def same(one: threads.Outcome, other: threads.Outcome) -> bool:
    return np.array_equal(one.c, other.c) and all(map(np.array_equal, one.x, other.x))


def test_without_momentum_the_rules_are_those_without_it() -> None:
    values = {"lr": 0.1, "tau": 2, "alpha": 0.3}
    assert same(train(EAMSGD(**values, momentum=0), 3), train(EASGD(**values), 3))
    assert same(train(EAMSGDSync(**values, momentum=0), 3), train(EASGDSync(**values), 3))
    assert same(train(MSGD(lr=0.1, momentum=0)), train(SGD(lr=0.1)))
    assert same(train(LocalSGD(lr=0.1, inner="msgd", momentum=0), 3), train(LocalSGD(lr=0.1, inner="sgd"), 3))
    plain = train(PASSMPlus(lr=0.1, momentum=0, full_steps=0), 1, turns="strict")
    assert same(plain, train(PASSM(lr=0.1, momentum=0), 1, turns="strict"))


@pytest.mark.parametrize("kind", [EASGD, EASGDSync, EASGDGaussSeidel])
def test_with_alpha_zero_the_workers_never_meet(kind: Any) -> None:
    done = train(kind(lr=0.1, tau=1, alpha=0.0), 3)
    assert np.array_equal(done.c, starting_point())
    for i, x in enumerate(done.x):
        alone = train(SGD(lr=0.1), gradient=lambda _, t, at, i=i: noisy_quadratic(i, t, at))  # type: ignore[misc]
        assert np.array_equal(x, alone.c)


@pytest.mark.parametrize("rule", [Downpour(lr=0.1), Downpour(lr=0.1, tau=4), PASSM(lr=0.1, momentum=0)], ids=named)
def test_one_worker_alone_does_sgd(rule: Rule) -> None:
    """DOWNPOUR: what c and v hold apart is x, rounded otherwise. PASSM: one block, all of the model."""
    done, alone = train(rule, 1, 30, turns="strict"), train(SGD(lr=0.1), 1, 30)
    trained = np.concatenate([np.arange(N)[layer] for layer in threads.LAYERS])
    error = 30 * EPS * np.abs(starting_point()).max()
    x = done.x[0]
    assert np.abs(x[trained] - alone.c[trained]).max() < error


def test_one_worker_alone_makes_mdownpour_msgd_at_the_look_ahead_point() -> None:
    done, alone = train(MDownpour(lr=0.05, momentum=0.6), 1, 30), train(MSGD(lr=0.05, momentum=0.6), 1, 30)
    assert np.abs(done.c - (alone.c + 0.6 * alone.local[0]["v"])).max() < 100 * EPS


def test_with_one_worker_and_tau_1_sync_and_async_are_one() -> None:
    values = {"lr": 0.1, "tau": 1, "alpha": 0.3}
    assert same(train(EASGDSync(**values)), train(EASGD(**values)))


def test_diloco_without_an_outer_optimizer_is_local_sgd() -> None:
    plain = train(DiLoCo(lr=0.1, tau=3, inner="sgd", outer_lr=1, outer_momentum=0), 3)
    assert np.abs(plain.c - train(LocalSGD(lr=0.1, tau=3, inner="sgd"), 3).c).max() < 100 * EPS


def test_sma_without_momentum_is_sync_easgd_at_beta_1() -> None:
    plain, elastic = (
        train(SMA(lr=0.1, tau=2, inner="sgd", center_momentum=0), 3),
        train(EASGDSync(lr=0.1, tau=2, beta=1), 3),
    )
    assert np.abs(plain.c - elastic.c).max() < 100 * EPS


def test_local_sgd_brings_everybody_to_the_mean() -> None:
    apart = train(LocalSGD(lr=0.1, tau=3, inner="sgd"), 3, 3)  # the rendezvous of step 3 comes next
    after = train(LocalSGD(lr=0.1, tau=3, inner="sgd"), 3, 4)
    assert np.abs(after.c - np.mean(apart.x, axis=0)).max() < 8 * EPS * np.abs(apart.x).max()
    for i, x in enumerate(after.x):  # all stepped from there
        assert np.array_equal(x, after.c - np.float32(0.1) * noisy_quadratic(i, 3, after.c.copy()))


# What is conserved


@pytest.mark.parametrize("rule", [EASGD(tau=1, alpha=0.3), EASGDSync(tau=1, alpha=0.3)], ids=named)
def test_without_gradients_an_exchange_conserves_the_sum_of_workers_and_center(rule: Rule) -> None:
    def pushes(i: int, t: int, x: np.ndarray) -> np.ndarray:
        return np.full_like(x, (i + 1) * (t == 0))

    apart, later = (train(rule, 3, steps, pushes) for steps in (1, 12))
    total = np.sum([apart.c, *apart.x], axis=0)
    assert not np.array_equal(later.c, apart.c)
    assert np.abs(np.sum([later.c, *later.x], axis=0) - total).max() < 12 * 4 * EPS * 4


def test_downpour_takes_every_gradient_to_the_center_once() -> None:
    done = train(Downpour(lr=0.125, tau=2), 3, 5, lambda i, t, x: np.full_like(x, 1 + i))
    # Four of the five steps have been taken to the center at the visits of steps 2 and 4: exact in binary.
    assert np.allclose(done.c, starting_point() - 4 * 0.125 * (1 + 2 + 3), rtol=4 * EPS, atol=8 * EPS)
    assert all((vectors["v"] == -0.125 * (1 + i)).all() for i, vectors in enumerate(done.local))


def test_the_averaged_rules_report_the_mean_of_what_the_center_was() -> None:
    done = train(ASGD(lr=0.125), 1, 7, lambda i, t, x: np.ones_like(x))
    values = [starting_point() - k * 0.125 for k in range(8)]
    assert np.abs(done.shared["z"] - np.mean(values, axis=0)).max() < 16 * EPS
    done = train(ADownpour(lr=0.125, tau=1), 2, 4, lambda i, t, x: np.ones_like(x))
    values = [
        starting_point() - k * 0.125 for k in (0, 0, 0, 1, 2, 3, 4, 5, 6)
    ]  # the two visits of t = 0 bring nothing
    assert np.abs(done.shared["z"] - np.mean(values, axis=0)).max() < 32 * EPS


# Convergence


def contraction(rule: Rule, workers: int, h: float) -> float:
    """Spectral radius of one period of the rule on hx²/2, from its listing run on unit vectors in float64.

    The state is what one period hands to the next: x, c and all other vectors.
    """
    return float(np.abs(spectrum(rule, workers, h)).max())


def spectrum(rule: Rule, workers: int, h: float) -> np.ndarray:
    """The eigenvalues of one period, but for the vectors that the rule does not have."""
    matrix = np.array(Linear(rule, workers, h).columns()).T
    one = np.eye(len(matrix))
    has = [k for k in range(len(matrix)) if (matrix[k] != one[k]).any() or (matrix[:, k] != one[k]).any()]
    return np.linalg.eigvals(matrix[np.ix_(has, has)])


class Linear:
    """The listing of a rule as a linear map of its whole state, found by running it on each unit vector."""

    def __init__(self, rule: Rule, workers: int, h: float) -> None:
        self.rule, self.workers, self.h = rule, workers, h

    def columns(self) -> list[np.ndarray]:
        names = self.names()
        return [self.period(np.eye(len(names))[k]) for k in range(len(names))]

    def names(self) -> list[str]:
        private = [f"{name}{i}" for i in range(self.workers) for name in ("x", "v")]
        return ["c", "u", *private]

    def period(self, state: np.ndarray) -> np.ndarray:
        c, u, *private = (np.array([value]) for value in state)
        x, v = private[0::2], private[1::2]
        rule, steps = self.rule, range(self.rule.period)
        order = paper.round_robin(self.workers, [slice(0, 1)] * self.workers)[: self.workers]
        g = lambda i, t, at: self.h * at  # noqa: E731
        match rule:
            case EASGD():
                paper.easgd(
                    x, c, g, eta=rule.lr, alpha=rule.moving_rate(self.workers), tau=rule.tau, steps=steps, order=order
                )
            case EAMSGD():
                paper.eamsgd(
                    x, v, c, g, eta=rule.lr, alpha=rule.moving_rate(self.workers), delta=rule.momentum, tau=rule.tau,
                    steps=steps, order=order,
                )  # fmt: skip
            case EASGDSync():
                paper.easgd_sync(x, c, g, eta=rule.lr, alpha=rule.moving_rate(self.workers), tau=rule.tau, steps=steps)
            case EAMSGDSync():
                paper.eamsgd_sync(
                    x, v, c, g, eta=rule.lr, alpha=rule.moving_rate(self.workers), delta=rule.momentum, tau=rule.tau,
                    steps=steps,
                )  # fmt: skip
            case EASGDGaussSeidel():
                paper.easgd_gauss_seidel(
                    x, c, g, eta=rule.lr, alpha=rule.moving_rate(self.workers), tau=rule.tau, steps=steps, order=order,
                    first=rule.first,
                )  # fmt: skip
            case Downpour():
                paper.downpour(x, v, c, g, eta=rule.lr, tau=rule.tau, steps=steps, order=order)
            case MDownpour():
                paper.mdownpour(x, u, c, g, eta=rule.lr, delta=rule.momentum, steps=steps, order=order)
            case ADMM():
                paper.admm(x, v, c, g, eta=rule.lr, rho=rule.rho, steps=steps, order=order)
            case PASSMPlus() | PASSM():
                listing = paper.passm_plus if isinstance(rule, PASSMPlus) else paper.passm
                more = {"full_steps": 0} if isinstance(rule, PASSMPlus) else {}
                listing(
                    x, v, c, g, eta=rule.lr, mu=rule.momentum, own=[slice(0, 1)], steps=steps, order=order, **more
                )  # fmt: skip
            case LocalSGD():
                paper.localsgd(x, c, listings.mover(rule, x, v, g), tau=rule.tau, steps=steps)
            case SMA():
                paper.sma(
                    x,
                    u,
                    np.zeros(1),
                    c,
                    listings.mover(rule, x, v, g),
                    mu=rule.center_momentum,
                    tau=rule.tau,
                    steps=steps,
                )
            case DiLoCo():
                paper.diloco(
                    x, u, np.zeros(1), c, listings.mover(rule, x, v, g), eta=rule.outer_lr, mu=rule.outer_momentum,
                    tau=rule.tau, steps=steps,
                )  # fmt: skip
            case MSGD():
                paper.msgd(c, v[0], g, eta=rule.lr, delta=rule.momentum, steps=steps)
            case SGD():
                paper.sgd(c, g, eta=rule.lr, steps=steps)
        return np.concatenate([c, u, *(one for pair in zip(x, v, strict=True) for one in pair)])


SMOOTH = [
    EASGD(lr=0.1, tau=2, alpha=0.3), EAMSGD(lr=0.05, tau=2, alpha=0.3, momentum=0.5),
    EASGDSync(lr=0.1, tau=2, alpha=0.2), EAMSGDSync(lr=0.05, tau=2, alpha=0.2, momentum=0.5),
    EASGDGaussSeidel(lr=0.1, tau=2, alpha=0.3), EASGDGaussSeidel(lr=0.1, tau=2, alpha=0.3, first="worker"),
    Downpour(lr=0.03, tau=2), MDownpour(lr=0.02, momentum=0.5), ADMM(lr=0.1, rho=1.0),
    PASSM(lr=0.05, momentum=0.5), PASSMPlus(lr=0.05, momentum=0.5, full_steps=0),
    LocalSGD(lr=0.1, tau=3, inner="sgd"), SMA(lr=0.1, tau=2, inner="sgd", center_momentum=0.3),
    DiLoCo(lr=0.05, tau=3, inner="sgd", outer_lr=0.7, outer_momentum=0.3), SGD(lr=0.1), MSGD(lr=0.05, momentum=0.5),
]  # fmt: skip


@pytest.mark.parametrize("rule", SMOOTH, ids=named)
def test_on_a_quadratic_the_center_converges_at_the_rate_of_the_composite_map(rule: Rule) -> None:
    """The geometric mean of the contraction over many periods, against the spectral radius."""
    h, workers = 0.5, 1 if rule.sequential or rule.divides else 3  # each part of a divided model goes its own way
    predicted = contraction(rule, workers, h)
    assert predicted < 1
    # From 1 to 1e-6 and on to 1e-12; ADMM's incremental sum keeps the rounding errors of the first steps, about 1e-7.
    end = 1e-6 if isinstance(rule, ADMM) else 1e-12
    periods = int(np.log(end) / np.log(predicted) / 2)
    first, second = (
        train(
            rule, workers, k * periods * rule.period, lambda i, t, x: np.float32(h) * x, start=np.ones(16, np.float32),
            layers=(slice(0, 16),), turns=in_order(rule),
        ).c[0]
        for k in (1, 2)
    )  # fmt: skip
    measured = abs(second / first) ** (1 / periods)
    # Float32 carries over all these decades, since everything tends to zero together; oscillating modes and multiple
    # eigenvalues leave a factor that is bounded, so the rate is off by its periods-th root.
    assert measured == pytest.approx(predicted, rel=np.log(30) / periods)


@pytest.mark.parametrize(
    "rule", each_rule(lr=0.06, tau=1, momentum=0.5, inner="sgd", full_steps=0, average_rate=0.003), ids=named
)
def test_every_rule_finds_the_minimum_of_a_quadratic(rule: Rule) -> None:
    workers = 1 if rule.sequential else 3
    done = train(rule, workers, 500, lambda i, t, x: x - np.float32(3), turns=in_order(rule))
    trained = np.concatenate([np.arange(N)[layer] for layer in threads.LAYERS])
    reached = np.abs(done.shared[rule.reported][trained] - 3).max()
    slow = {"asgd": 0.2, "adownpour": 0.1, "mvasgd": 1.5, "mvadownpour": 0.2}  # the mean over time remembers the start
    assert reached < slow.get(rule.name, 1e-3)


def test_the_gauss_seidel_forms_have_one_spectrum_with_one_worker_and_it_is_not_jacobis() -> None:
    for lr, alpha in ((0.1, 0.3), (0.9, 0.7), (0.01, 0.05)):
        center, worker = (EASGDGaussSeidel(lr=lr, tau=1, alpha=alpha, first=first) for first in ("center", "worker"))
        one, other, jacobi = (
            np.sort(np.abs(spectrum(rule, 1, 1.0))) for rule in (center, worker, EASGD(lr=lr, tau=1, alpha=alpha))
        )
        assert one == pytest.approx(other, abs=1e-9)
        assert one != pytest.approx(jacobi, abs=1e-4)


@pytest.mark.parametrize("workers", [1, 3])
def test_gauss_seidel_with_the_center_first_is_stable_for_every_alpha_up_to_a_large_step_size(workers: int) -> None:
    for alpha in np.linspace(0.01, 1, 34):
        assert contraction(EASGDGaussSeidel(lr=1.65, tau=1, alpha=float(alpha)), workers, 1.0) < 1


@pytest.mark.parametrize("first", ["center", "worker"])
@pytest.mark.parametrize("workers", [1, 3, 5])
def test_gauss_seidel_warns_of_what_its_composite_map_makes_unstable(first: str, workers: int) -> None:
    for alpha in (0.1, 0.3, 0.45, 0.6, 0.9):
        rule = EASGDGaussSeidel(lr=1.7, tau=1, alpha=alpha, first=first)
        radius = contraction(rule, workers, 1.0)
        assert rule.spectral_radius(workers) == pytest.approx(radius, abs=1e-9)
        assert bool(rule.warnings(workers)) == (radius > 1)


@pytest.mark.parametrize("kind, lr, workers", [(EASGD, 0.4, 3), (EASGDSync, 0.4, 3), (EASGDSync, 0.01, 8)])
def test_the_bound_on_alpha_is_where_the_composite_map_stops_contracting(kind: Any, lr: float, workers: int) -> None:
    limit = kind(lr=lr).alpha_limit(workers)
    assert contraction(kind(lr=lr, tau=1, alpha=limit * (1 - 1e-6)), workers, 1.0) < 1
    assert contraction(kind(lr=lr, tau=1, alpha=limit * (1 + 1e-6)), workers, 1.0) > 1


def test_the_bound_for_stale_differences_is_that_of_the_literature() -> None:
    limits = [EASGDSync(lr=0.01).alpha_limit(p) for p in (2, 4, 8)]
    assert limits == pytest.approx([0.666, 0.400, 0.222], abs=1e-3)  # at ηh = 0.01


# The gradient, buffers, non-finite values


@pytest.mark.parametrize("rule", each_rule(delay=2), ids=named)
def test_every_rule_leaves_the_gradient_alone(rule: Rule) -> None:
    train(rule, 1 if rule.sequential else 2, 6)  # compared with its copy after each step: tests/threads.py


@pytest.mark.parametrize("rule", each_rule(tau=1, lr=0.01), ids=named)
def test_under_every_rule_buffers_are_averaged_and_not_moved_by_gradients(rule: Rule) -> None:
    """The gradient of buffers is zero; here the forward pass of worker i would set them to i + 1."""

    def gradient(i: int, t: int, x: np.ndarray) -> np.ndarray:
        g = noisy_quadratic(i, t, x)
        g[-threads.BUFFERS :], x[-threads.BUFFERS :] = 0, i + 1
        return g

    workers = 1 if rule.sequential else 3
    layers = (slice(0, 16), slice(16, 31), slice(32, N - threads.BUFFERS))
    done = train(rule, workers, 60, gradient, buffers=threads.BUFFERS, layers=layers, turns=in_order(rule))
    buffers = done.c[-threads.BUFFERS :]
    assert buffers == pytest.approx(np.full(threads.BUFFERS, buffers[0]))
    assert 1 <= buffers[0] <= workers  # between what the workers bring
    if workers == 3:
        assert 1.5 < buffers[0] < 2.5


@pytest.mark.parametrize("rule", [r for r in each_rule(tau=1, lr=0.01, momentum=0.5) if not r.sequential], ids=named)
def test_gradients_that_are_not_finite_stay_out_of_the_center(rule: Rule) -> None:
    def gradient(i: int, t: int, x: np.ndarray) -> np.ndarray:
        g = noisy_quadratic(i, t, x)
        if (i, t) == (1, 5):
            g[[0, 1, 20, 50]] = np.nan, np.inf, -np.inf, np.nan
        return g

    done = train(rule, 3, 20, gradient, turns=in_order(rule))
    assert all(np.isfinite(value).all() for value in done.shared.values())
    assert all(np.isfinite(x).all() for x in done.x)
    assert all(np.isfinite(value).all() for vectors in done.local for value in vectors.values())
    counted = [post for post in done.posts[1] if "nonfinite" in post]
    assert counted and not [post for post in done.posts[0] + done.posts[2] if "nonfinite" in post]


@pytest.mark.parametrize("rule", [APAM(lr=0.01), MDownpour(lr=0.01), PASSM(lr=0.01), EASGD(lr=0.01, tau=1)], ids=named)
def test_a_reload_costs_one_gradient_and_not_the_next_one_too(rule: Rule) -> None:
    asked: list[int] = []

    def gradient(i: int, t: int, x: np.ndarray) -> np.ndarray:
        asked.append(t)
        return np.full_like(x, np.nan) if t == 5 else noisy_quadratic(i, t, x)

    train(rule, 1, 10, gradient, turns="strict")
    before_turns = rule.name != "easgd"  # EASGD's own exchange comes first, and finds at t = 6 what t = 5 has made
    assert asked == [t for t in range(10) if before_turns or t != 6]


def test_admms_contributions_at_the_center_stay_true_when_a_worker_is_reloaded() -> None:
    def gradient(i: int, t: int, x: np.ndarray) -> np.ndarray:
        return np.full_like(x, np.nan) if (i, t) == (1, 5) else noisy_quadratic(i, t, x)

    done = train(ADMM(lr=0.1, rho=0.5), 3, 20, gradient)
    mean = np.mean([done.shared[f"y{i}"] for i in range(3)], axis=0)
    assert np.abs(done.c - mean).max() < 20 * 3 * EPS * np.abs(mean).max()


# Hyperparameters


@pytest.mark.parametrize("name", RULES)
def test_every_rule_says_its_formula_its_source_and_its_hyperparameters(name: str) -> None:
    doc: Any = rule_class(name).__doc__
    assert "<-" in doc
    assert "arXiv:" in doc
    named_there = doc[doc.index("Hyperparameters:") :]
    for one in fields(rule_class(name)):
        assert re.search(rf"\b{one.name}\b", named_there), one.name
        assert one.metadata["help"]


def test_a_hyperparameter_means_the_same_in_every_rule_that_has_it() -> None:
    for name in {one.name for rule in RULES.values() for one in fields(rule)}:
        texts = {one.metadata["help"] for rule in RULES.values() for one in fields(rule) if one.name == name}
        assert len(texts) == 1, name


def test_the_three_spellings_of_the_moving_rate_agree() -> None:
    assert EASGD(beta=0.8).moving_rate(4) == 0.2
    assert EASGD(alpha=0.2, lr=0.05).derived(4) == {"alpha": 0.2, "beta": 0.8, "rho": pytest.approx(0.2 / 0.05)}
    assert EASGD(rho=2.0, lr=0.1).moving_rate(4) == pytest.approx(0.2)
    assert EASGD().moving_rate(3) == pytest.approx(0.3)
    with pytest.raises(ValueError, match=r"beta=3\.0: α = β/p = 1\.5"):
        EASGD(beta=3.0).moving_rate(2)


def test_beta_per_step_divides_by_tau_as_well() -> None:
    assert EASGD(beta=0.8, tau=5, beta_per="step").moving_rate(4) == pytest.approx(0.8 / (5 * 4))
    with pytest.raises(ValueError, match=r"beta=30\.0: α = β/τp = 1\.5"):
        EASGD(beta=30.0, tau=5, beta_per="step").moving_rate(4)


@pytest.mark.parametrize(("kind", "values", "sentence"), [
    (EASGD, {"beta_per": "epoch"}, "beta_per=epoch: must be one of exchange, step"),
    (EASGD, {"beta_per": "step", "alpha": 0.1}, "beta_per=step: .* give beta instead"),
    (EASGD, {"alpha": 0.1, "rho": 1.0}, "alpha=0.1 and rho=1.0: .* give only one"),
    (EASGDGaussSeidel, {"first": "nobody"}, "first=nobody: must be one of center, worker"),
    (Downpour, {"tau": 0}, "tau=0: .* at least 1"),
    (MDownpour, {"tau": 10}, "tau=10: mdownpour takes every gradient .* tau=1 only .* use downpour or eamsgd"),
    (MVADownpour, {"average_rate": 0.0}, r"average_rate=0.0: .* \(0, 1\]"),
    (MVASGD, {"average_rate": 1.5}, r"average_rate=1.5: .* \(0, 1\]"),
    (ADMM, {"rho": 0.0}, "rho=0.0: ADMM's penalty must be positive"),
    (APAM, {"beta1": 1.0}, "beta1=1.0: .* below 1"),
    (APAM, {"beta2": -0.1}, "beta2=-0.1: .* at least 0"),
    (APAM, {"epsilon": 0.0}, "epsilon=0.0: must be positive"),
    (APAM, {"epsilon": 1e-50}, "epsilon=1e-50: .* in float32"),
    (APAM, {"delay": -1}, "delay=-1: .* at least 0"),
    (APAM, {"delay": 10**9}, "delay=1000000000: .* at most 10000"),
    (ADMM, {"rho": 1e300}, r"rho=1e\+300: .* in float32"),
    (PASSM, {"momentum": 1.0}, "momentum=1.0: .* below 1"),
    (PASSMPlus, {"full_steps": -1}, "full_steps=-1: .* at least 0"),
    (LocalSGD, {"tau": 0}, "tau=0: .* at least 1"),
    (LocalSGD, {"momentum": 0.5}, "momentum=0.5: belongs to inner=msgd, and inner=sgd has none"),
    (LocalSGD, {"inner": "lion"}, "inner=lion: the local optimizers are sgd, msgd, adam"),
    (SMA, {"center_momentum": 1.0}, "center_momentum=1.0: .* below 1"),
    (DiLoCo, {"outer_lr": 0.0}, "outer_lr=0.0: .* positive"),
    (DiLoCo, {"outer_momentum": -0.5}, "outer_momentum=-0.5: .* at least 0"),
])  # fmt: skip
def test_a_hyperparameter_that_cannot_work_is_refused(kind: Any, values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        kind(**values)


@pytest.mark.parametrize("kind", [EASGD, EAMSGD, EASGDSync, EAMSGDSync])
def test_a_moving_rate_beyond_the_stability_bound_warns_with_the_bound(kind: Any) -> None:
    limit = kind(lr=0.1).alpha_limit(4)
    (sentence,) = kind(alpha=limit * 1.001, lr=0.1).warnings(4)
    assert f"= {limit:.4g} of {kind.name}" in sentence
    assert kind(alpha=limit * 0.999, lr=0.1).warnings(4) == []


# Local optimizers, schedules, delay


@pytest.mark.parametrize("inner", [name for name in INNER if name not in ("sgd", "msgd")])
def test_a_local_torch_optimizer_does_what_it_does_in_torch(inner: str) -> None:
    """One worker, no rendezvous but the first: torch's optimizer on a plain parameter, to the bit."""
    import torch

    from easgd_local.optimizers import OPTIMIZERS

    done = train(LocalSGD(lr=0.01, tau=100, inner=inner), 1, 12, layers=(slice(0, N),))
    x = torch.nn.Parameter(torch.from_numpy(starting_point().copy()))
    decay = {"weight_decay": 0.0} if inner == "adamw" else {}
    optimizer = getattr(torch.optim, OPTIMIZERS[inner].torch_name)([x], lr=0.01, **decay)
    for t in range(12):
        x.grad = torch.from_numpy(noisy_quadratic(0, t, x.detach().numpy()))
        optimizer.step()
    assert np.abs(done.x[0] - x.detach().numpy()).max() <= 2 * EPS


def test_every_local_optimizer_has_a_step_size_of_its_own() -> None:
    assert [LocalSGD(inner=inner).lr for inner in ("sgd", "msgd", "adamw")] == [0.2, 0.05, 0.0005]
    assert (DiLoCo().lr, DiLoCo(inner="sgd").lr, DiLoCo(lr=0.3).lr) == (0.0005, 0.2, 0.3)


def test_every_local_rule_takes_every_optimizer() -> None:
    for kind in (rule for rule in RULES.values() if issubclass(rule, Local)):
        for inner in INNER:
            assert np.isfinite(train(kind(lr=0.01, inner=inner, tau=2), 2, 8).c).all()


@pytest.mark.parametrize("shape", ["constant", "step", "cosine", "sqrt"])
def test_the_step_size_follows_the_schedule_of_the_workers_own_clock(shape: str) -> None:
    """With a gradient of one, x tells the sum of all step sizes."""
    schedule = LearningRate(shape, 0.5, 20, warmup=3, every=6, decay=0.25)
    done = train(SGD(lr=0.5), 1, 20, lambda i, t, x: np.ones_like(x), start=np.zeros(N, np.float32), schedule=schedule)
    assert done.c[0] == pytest.approx(-sum(schedule(t) for t in range(20)), rel=float(20 * EPS))


@pytest.mark.parametrize("delay", [0, 1, 6])
def test_apam_with_a_delay_takes_gradients_at_what_it_read_so_many_steps_ago(delay: int) -> None:
    points: list[np.ndarray] = []

    def gradient(i: int, t: int, x: np.ndarray) -> np.ndarray:
        points.append(x.copy())
        return noisy_quadratic(i, t, x)

    done = train(APAM(lr=0.05, delay=delay), 1, 15, gradient)
    now = [train(APAM(lr=0.05, delay=delay), 1, t).c if t else starting_point() for t in range(15)]
    for t, point in enumerate(points):
        assert np.array_equal(point, now[max(0, t - delay)])
    assert np.isfinite(done.c).all()


def test_in_strict_turns_a_worker_is_stale_by_one_update_of_each_other_worker() -> None:
    for workers in (1, 2, 4):
        done = train(APAM(lr=0.01), workers, 12)
        stale = [post[-1]["staleness"] for posts in done.posts for post in posts if "worker" in post]  # type: ignore[index]
        assert stale == [workers - 1] * workers


def test_apam_with_one_worker_is_amsgrad_but_for_where_epsilon_stands() -> None:
    """torch corrects √v̂ for bias before it adds ε, the authors' code after; with ε → 0 they coincide."""
    import torch

    done = train(APAM(lr=0.01, epsilon=1e-30), 1, 40)
    x = torch.nn.Parameter(torch.from_numpy(starting_point().copy()))
    optimizer = torch.optim.Adam([x], lr=0.01, eps=1e-30, amsgrad=True)
    for t in range(40):
        x.grad = torch.from_numpy(noisy_quadratic(0, t, x.detach().numpy()))
        optimizer.step()
    assert np.abs(done.c - x.detach().numpy()).max() < 40 * 8 * EPS
    apart = train(APAM(lr=0.01, epsilon=1.0), 1, 40)
    assert np.abs(apart.c - done.c).max() > 0.01  # ε is used


# Without turns


@pytest.mark.parametrize(
    "rule", [PASSM(lr=0.1, momentum=0.5), PASSMPlus(lr=0.1, momentum=0.5, full_steps=1)], ids=named
)
def test_in_every_interleaving_of_visits_passm_computes_what_its_listing_does(rule: Rule) -> None:
    """Two workers, two blocks, two steps: 70 interleavings of the visits of blocks, in each of which the listing,
    made to follow it, ends with the same bits. Gradients depend on the whole of x, so they tell old from new."""
    ends = set()
    for order in sorted(set(permutations("aaaabbbb"))):
        done = interleaved(rule, ["ab".index(who) for who in order])
        assert np.array_equal(done, followed(rule, ["ab".index(who) for who in order]))
        ends.add(done.tobytes())
    assert len(ends) > 5  # so the order does matter


BLOCKS = (slice(0, 16), slice(16, 32))


def coupled(i: int, t: int, x: np.ndarray) -> np.ndarray:
    """A gradient in which every coordinate depends on all."""
    return (x - np.float32(0.1) * x[::-1] + np.float32(0.01) * (i + 1) * (t + 1)).astype(np.float32)


def interleaved(rule: Rule, order: list[int]) -> np.ndarray:
    """c after the rule's own steps, each worker in a thread that goes on only when `order` says so."""
    center, batons = starting_point(32), [threading.Semaphore(0), threading.Semaphore(0)]
    paused = threading.Semaphore(0)

    class Desk(SimpleNamespace):
        lr, workers, update = rule.lr, 2, 0

        def turns(self) -> Iterator[slice]:
            for b in BLOCKS:
                batons[self.rank].acquire()
                yield b
                paused.release()

        def grad(self, at: Any = None, only: slice | None = None) -> np.ndarray:
            g = coupled(self.rank, self.t, self.x)
            if only is not None:
                g[: only.start] = g[only.stop :] = 0
            return g

    def work(desk: Any) -> None:
        for desk.t in range(2):
            rule.step(desk)

    desks = [
        Desk(rank=i, t=0, ops=CpuOps(), x=center.copy(), c=center, u=np.zeros_like(center), own=BLOCKS[i])
        for i in range(2)
    ]
    workers = [threading.Thread(target=work, args=(desk,), daemon=True) for desk in desks]
    for one in workers:
        one.start()
    for who in order:
        batons[who].release()
        assert paused.acquire(timeout=10)
    for one in workers:
        one.join(10)
    return center


def followed(rule: Rule, order: list[int]) -> np.ndarray:
    """c after the listing of PASSM or PASSM+, its visits in the given order."""
    c = starting_point(32)
    x, u, g = [c.copy(), c.copy()], [np.zeros_like(c), np.zeros_like(c)], [c, c]
    made, eta, mu = [0, 0], np.float32(rule.lr), np.float32(rule.momentum)
    for i in order:
        t, b = divmod(made[i], 2)
        if b == 0:
            g[i] = coupled(i, t, x[i])
        full = rule.name == "passm+" and t == 0
        if full or b == i:
            place = BLOCKS[b]
            u[i][place] = mu * u[i][place] + g[i][place]
            step = u[i][place] if rule.name == "passm" else g[i][place] + mu * u[i][place]
            c[place] = c[place] - eta * step
        x[i][BLOCKS[b]] = c[BLOCKS[b]]
        made[i] += 1
    return c
