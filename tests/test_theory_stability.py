"""Stability: the matrices against the listings, the bounds against random search, and the numbers of the papers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from easgd_local import theory
from tests import paper

EPS = np.finfo(np.float64).eps
WHOLE = slice(0, None)


def in_turn(workers: int) -> list[tuple[int, slice]]:
    return [(i, WHOLE) for i in range(workers)]


def unit_vectors(number: int) -> list[np.ndarray]:
    """One vector for each part of the state; coordinate k of all of them is the experiment that starts from e_k."""
    return list(np.eye(number))


# The listings, run on the unit vectors


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize("lr, alpha, h", [(0.1, 0.3, 1.0), (0.7, 0.95, 2.5), (0.0, 1.0, 1.0), (0.4, 0.0, 0.5)])
def test_the_round_robin_matrix_is_one_cycle_of_the_listing(workers: int, lr: float, alpha: float, h: float) -> None:
    *x, c = unit_vectors(workers + 1)
    paper.easgd(
        x, c, lambda i, t, at: h * at, eta=lr, alpha=alpha, tau=1, steps=range(1), order=in_turn(workers)
    )  # fmt: skip
    expected = np.stack([*x, c])
    assert np.abs(theory.easgd_round_robin_matrix(lr, alpha, workers, h) - expected).max() <= 8 * workers * EPS


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_the_stale_matrix_is_one_step_of_synchronous_easgd(workers: int) -> None:
    *x, c = unit_vectors(workers + 1)
    paper.easgd_sync(x, c, lambda i, t, at: 2.5 * at, eta=0.2, alpha=0.07, tau=1, steps=range(1))
    assert np.abs(theory.easgd_stale_matrix(0.2, 0.07, workers, 2.5) - np.stack([*x, c])).max() <= 8 * workers * EPS


@pytest.mark.parametrize("workers", [1, 3, 8])
@pytest.mark.parametrize("lr, rho, h", [(1e-3, 2.5, 1.0), (0.3, 0.7, 1.7), (0.1, 0.0, 1.0)])
def test_admms_matrix_is_one_cycle_of_the_listing(workers: int, lr: float, rho: float, h: float) -> None:
    vectors = unit_vectors(2 * workers + 1)
    multiplier, x, c = vectors[0:-1:2], vectors[1:-1:2], vectors[-1]
    paper.admm(
        x, multiplier, c, lambda i, t, at: h * at, eta=lr, rho=rho, steps=range(1), order=in_turn(workers)
    )  # fmt: skip
    found = theory.admm_round_robin_matrix(lr, rho, workers, h)
    assert np.abs(found - np.stack(vectors)).max() <= 8 * workers * EPS * np.abs(found).max()


def test_grids_give_a_matrix_at_every_point() -> None:
    lr, other, h = np.array([[0.1], [0.2]]), np.array([0.0, 0.3, 0.9]), np.array([1.0, 2.0, 0.5])
    for of in (theory.easgd_round_robin_matrix, theory.easgd_stale_matrix, theory.admm_round_robin_matrix):
        grid = of(lr, other, 3, h)
        assert grid.shape[:2] == (2, 3)
        assert np.array_equal(grid[1, 2], of(0.2, 0.9, 3, 0.5))


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_the_radii_are_those_of_the_matrices(workers: int) -> None:
    rng = np.random.default_rng(workers)
    lr, alpha, rho, h = (
        rng.uniform(0, 2, 500),
        rng.uniform(0, 1, 500),
        rng.uniform(0, 10, 500),
        rng.uniform(0.1, 2, 500),
    )
    pairs = (
        (theory.easgd_round_robin_radius, theory.easgd_round_robin_matrix, alpha),
        (theory.easgd_stale_radius, theory.easgd_stale_matrix, alpha),
        (theory.admm_round_robin_radius, theory.admm_round_robin_matrix, rho),
    )
    for radius, matrix, other in pairs:
        assert radius(lr, other, workers, h) == pytest.approx(
            theory.spectral_radius(matrix(lr, other, workers, h)), rel=1e-9, abs=1e-9
        )


def test_a_large_map_is_put_together_from_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    lr, alpha = np.meshgrid(np.linspace(0, 2, 7), np.linspace(0, 1, 5))
    whole = theory.easgd_round_robin_radius(lr, alpha, 3)
    monkeypatch.setattr("easgd_local.theory.stability.PIECE", 3 * 4**2)  # 3 points at a time
    assert np.array_equal(theory.easgd_round_robin_radius(lr, alpha, 3), whole)
    assert whole.shape == (5, 7)


# The numbers


@pytest.mark.parametrize("workers, radius, size", [(3, 1.0009738854, 1.2e9), (8, 1.0022578662, 1.3e20)])
def test_admm_decays_and_then_blows_up(workers: int, radius: float, size: float) -> None:
    matrix = theory.admm_round_robin_matrix(1e-3, 2.5, workers)
    assert theory.spectral_radius(matrix) == pytest.approx(radius, abs=5e-11)
    start = np.array([0.0, 1000.0] * workers + [1000.0])
    sizes = np.abs(theory.trajectory(matrix, start, 20_000)).max(axis=1)
    assert f"{sizes[-1]:.1e}" == f"{size:.1e}"
    assert sizes[1000] < sizes[0] / 2  # at first it decays
    assert sizes[-1] == sizes.max()


def test_easgd_is_stable_all_over_figure_1_and_admm_is_not() -> None:
    lr, rho = np.meshgrid(np.linspace(2e-4, 1e-2, 25), np.linspace(0.2, 10, 25))
    assert theory.easgd_is_stable(lr, lr * rho).all()
    unstable = [(theory.admm_round_robin_radius(lr, rho, p) > 1 + 1e-9).mean() for p in (3, 8)]
    assert 0.05 < unstable[0] < unstable[1] < 0.5  # the more workers, the wider


def test_the_stale_bound_has_the_published_values() -> None:
    limits = theory.easgd_alpha_limit(0.01, 1.0, stale=True, workers=np.array([2, 4, 8]))
    assert [f"{limit:.3f}" for limit in limits] == ["0.666", "0.400", "0.222"]


def test_with_one_worker_a_difference_is_never_stale() -> None:
    lr = np.linspace(0, 2, 21)
    assert theory.easgd_alpha_limit(lr, 1.0, stale=True, workers=1) == pytest.approx(theory.easgd_alpha_limit(lr))
    assert theory.easgd_alpha_limit(lr) == pytest.approx((4 - 2 * lr) / (4 - lr))
    assert theory.easgd_alpha_limit(3.0) == theory.easgd_alpha_limit(3.0, stale=True, workers=5) == 0


def test_a_trajectory_that_leaves_the_floating_point_numbers_stays_outside() -> None:
    states = theory.trajectory([[1e200, 0.0], [1.0, 0.5]], [1.0, 1.0], 3)
    assert states[1].tolist() == [1e200, 1.5]
    assert np.isinf(states[2, 0])
    assert not np.isfinite(states[3]).any()


def test_a_step_beyond_two_over_the_curvature_is_unstable_without_any_pull() -> None:
    assert theory.easgd_is_stable([2.0, 2.1], 0.0).tolist() == [True, False]
    assert theory.easgd_round_robin_radius([2.0, 2.1], 0.0, 3) == pytest.approx([1.0, 1.1])


# The bounds, by random search


def random_points(seed: int, number: int = 4000) -> tuple[np.ndarray, ...]:
    """(η, α, h) with ηh in (0, 2.2) and α in (0, 1), none within 1e-6 of the bound of exclusive turns."""
    rng = np.random.default_rng(seed)
    h = 10 ** rng.uniform(-2, 2, number)
    lr, alpha = rng.uniform(0, 2.2, number) / h, rng.uniform(0, 1, number)
    far = np.abs(alpha - theory.easgd_alpha_limit(lr, h)) > 1e-6
    return lr[far], alpha[far], h[far]


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7, 8])
def test_below_the_bound_no_number_of_workers_is_unstable(workers: int) -> None:
    lr, alpha, h = random_points(workers)
    stable = theory.easgd_is_stable(lr, alpha, h)
    assert 0.3 < stable.mean() < 0.7
    assert theory.easgd_round_robin_radius(lr, alpha, workers, h)[stable].max() <= 1 + 1e-12


@pytest.mark.parametrize("workers", [1, 3, 5, 7])
def test_beyond_the_bound_every_odd_number_of_workers_is_unstable(workers: int) -> None:
    lr, alpha, h = random_points(10 + workers)
    unstable = ~theory.easgd_is_stable(lr, alpha, h)
    assert theory.easgd_round_robin_radius(lr, alpha, workers, h)[unstable].min() > 1


@pytest.mark.parametrize("workers, edge", [(2, math.sqrt(0.5)), (4, 0.6751), (8, 0.6687)])
def test_even_numbers_of_workers_are_stable_a_little_beyond_the_bound(workers: int, edge: float) -> None:
    assert theory.easgd_alpha_limit(1.0) == pytest.approx(2 / 3)
    assert edge > 2 / 3
    assert theory.easgd_round_robin_radius(1.0, edge - 2e-4, workers) < 1
    assert theory.easgd_round_robin_radius(1.0, edge + 2e-4, workers) > 1


def test_the_stale_bound_is_exact_for_every_number_of_workers() -> None:
    rng = np.random.default_rng(5)
    for workers in (1, 2, 3, 4, 8, 13):
        h = 10 ** rng.uniform(-2, 2, 2000)
        lr = rng.uniform(0.001, 2.2, 2000) / h
        limit = theory.easgd_alpha_limit(lr, h, stale=True, workers=workers)
        alpha = rng.uniform(1e-4, 2 / (workers + 1), 2000)
        far = np.abs(alpha - limit) > 1e-6
        radius = theory.spectral_radius(theory.easgd_stale_matrix(lr, alpha, workers, h))
        assert np.array_equal((radius < 1)[far], (alpha < limit)[far])


# Negative α is momentum


def test_the_least_radius_over_alpha_is_where_the_formula_says() -> None:
    rng = np.random.default_rng(6)
    for lr, beta, h in rng.uniform(0.02, 1, (40, 3)):
        best = theory.momentum_alpha(lr, beta, h)
        around = best + np.linspace(-1, 1, 2001)
        radius = theory.spectral_radius(theory.drift_matrix(lr, around, beta, h))
        least = abs(1 - math.sqrt(beta * lr * h))
        assert best <= 0
        assert around[radius.argmin()] == pytest.approx(best, abs=1e-9)
        assert radius.min() == pytest.approx(least, abs=1e-7)  # a double eigenvalue: √ε
        assert least < abs(1 - lr * h) or beta <= lr * h  # SGD's, where a slow center is the slower


@pytest.mark.parametrize("delta", [0.0, 0.5, 0.9])
def test_with_beta_one_minus_alpha_is_heavy_ball_momentum(delta: float) -> None:
    lr, h, x, before = 0.1, 1.7, 3.0, 3.0
    state, drift = np.array([x, before]), theory.drift_matrix(lr, -delta, 1.0, h)
    for _ in range(50):
        x, before = x - lr * h * x + delta * (x - before), x
        state = drift @ state
        assert state == pytest.approx([x, before], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("delta", [0.0, 0.5, 0.99])
def test_a_negative_alpha_with_beta_below_one_is_nesterovs_momentum(delta: float) -> None:
    h, lr = np.linspace(0.01, 3, 50), 0.2  # Nesterov's: v <- δv - ηg(x + δv); x <- x + v, on (x, v)
    rows = [np.stack([1 - lr * h, delta * (1 - lr * h)], -1), np.stack([-lr * h, delta * (1 - lr * h)], -1)]
    nesterov = np.stack(rows, -2)
    drift = theory.drift_matrix(lr * (1 + delta), -(delta**2) / (1 + delta), 1 / (1 + delta), h)
    for invariant in (np.linalg.det, lambda m: np.trace(m, axis1=-2, axis2=-1)):
        assert invariant(drift) == pytest.approx(invariant(nesterov), rel=1e-12, abs=1e-12)


def test_with_beta_p_alpha_the_drift_matrix_is_that_of_the_mean_of_the_workers() -> None:
    step, p = theory.easgd_stale_matrix(0.3, 0.1, 4, 1.2), 4
    average = np.zeros((2, p + 1))
    average[0, :p], average[1, p] = 1 / p, 1
    assert average @ step == pytest.approx(theory.drift_matrix(0.3, 0.1, 0.4, 1.2) @ average, abs=8 * EPS)


# Domains


@pytest.mark.parametrize("call, sentence", [
    (lambda: theory.easgd_round_robin_matrix(-0.1, 0.5, 3), "lr=-0.1: the step size η must be at least 0 and finite; "),
    (lambda: theory.easgd_round_robin_matrix([0.1, math.nan], 0.5, 3), "lr=nan: the step size η must be "),
    (lambda: theory.easgd_round_robin_matrix(0.1, 1.5, 3), r"alpha=1.5: .* α must lie in \[0, 1\]; "),
    (lambda: theory.easgd_round_robin_matrix(0.1, 0.5, 0), "workers=0: there must be at least 1 worker; try 4"),
    (lambda: theory.easgd_round_robin_matrix(0.1, 0.5, 2.5), "workers=2.5: .* must be one whole number; try 4"),
    (lambda: theory.easgd_round_robin_matrix(0.1, 0.5, 3, 0.0), "curvature=0: .* h must be positive and finite"),
    (lambda: theory.easgd_round_robin_radius(0.1, [0.5, -0.2], 3), r"alpha=-0.2: .* must lie in \[0, 1\]"),
    (lambda: theory.easgd_stale_matrix(0.1, -0.1, 3), "alpha=-0.1: the moving rate α must be at least 0"),
    (lambda: theory.easgd_stale_radius(0.1, 0.1, 2.5), "workers=2.5: .* must be whole and at least 1"),
    (lambda: theory.easgd_is_stable(0.1, 1.1), "alpha=1.1: "),
    (lambda: theory.easgd_is_stable(math.inf, 0.1), "lr=inf: "),
    (lambda: theory.easgd_alpha_limit(0.1, stale=True), "workers=None: with stale differences .*; give workers"),
    (lambda: theory.easgd_alpha_limit(0.1, stale=True, workers=0), "workers=0: "),
    (lambda: theory.admm_round_robin_matrix(0.1, -1.0, 3), "rho=-1: ADMM's penalty ρ must be at least 0"),
    (lambda: theory.admm_round_robin_radius(0.1, math.inf, 3), "rho=inf: "),
    (lambda: theory.spectral_radius(np.ones((2, 3))), r"matrix of shape \(2, 3\): .* square"),
    (lambda: theory.spectral_radius([[math.nan]]), "matrix with NaN or infinity: "),
    (lambda: theory.trajectory(np.eye(2), [1.0, 2.0, 3.0], 5), r"start of shape \(3,\): "),
    (lambda: theory.trajectory(np.eye(2), [1.0, 2.0], -1), "rounds=-1: "),
    (lambda: theory.drift_matrix(0.1, math.nan, 0.9), "alpha=nan: must be a finite number"),
    (lambda: theory.drift_matrix(0.1, -0.5, -0.9), "beta=-0.9: the center's moving rate β must be at least 0"),
    (lambda: theory.momentum_alpha(0.1, -0.9), "beta=-0.9: "),
])  # fmt: skip
def test_what_is_outside_the_domain_is_refused_with_value_and_rule(call: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}") as refused:
        call()
    assert str(refused.value).endswith(".")
    assert "\n" not in str(refused.value)
