"""Mean and variance of the center: the formulas against exact propagation and against simulation, and their limits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from easgd_local import theory
from easgd_local.theory import stability

CASES = [  # lr, alpha, workers, curvature: slow, fast, oscillating, ηh = pα, at p = 1, unstable
    (0.1, 0.225, 4, 1.0), (0.5, 0.3, 3, 1.0), (1.5, 0.05, 8, 1.2), (0.3, 0.1, 3, 1.0), (0.2, 0.9, 1, 0.5),
    (0.9, 0.7, 4, 1.0),
]  # fmt: skip
SIGMA = 1.7


def propagated(lr: float, alpha: float, p: int, h: float, steps: int, start: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and variance of c_t and of the average z_t, by the recursion of the mean and covariance of (x, c, sum).

    The state is (x^1, ..., x^p, c, c_0 + ... + c_{t-1}); the noise ηξ enters x.
    """
    drift = np.zeros((p + 2, p + 2))
    drift[:-1, :-1] = stability.easgd_stale_matrix(lr, alpha, p, h)
    drift[-1, -2:] = 1  # sum <- sum + c
    noise = np.diag([(lr * SIGMA) ** 2] * p + [0.0, 0.0])
    mean, covariance, total = np.append(start, 0.0), np.zeros((p + 2, p + 2)), np.zeros(p + 2)
    total[-2:] = 1  # c_t and the sum before it
    found: dict[str, list[float]] = {"mean": [], "variance": [], "average": []}
    for t in range(steps + 1):
        found["mean"].append(mean[p])
        found["variance"].append(covariance[p, p])
        found["average"].append(total @ covariance @ total / (t + 1) ** 2)
        mean, covariance = drift @ mean, drift @ covariance @ drift.T + noise
    return {name: np.array(values) for name, values in found.items()}


@pytest.mark.parametrize("lr, alpha, p, h", CASES)
def test_the_formulas_equal_exact_propagation(lr: float, alpha: float, p: int, h: float) -> None:
    start = np.append(np.linspace(-1, 3, p) if p > 1 else [2.0], 1.5)
    exact, t = propagated(lr, alpha, p, h, 60, start), np.arange(61)
    given = {"lr": lr, "alpha": alpha, "workers": p, "curvature": h}
    mean = theory.center_mean(t, **given, start=(1.5, start[:-1].mean()))
    assert mean == pytest.approx(exact["mean"], rel=1e-12, abs=1e-12)
    assert theory.center_variance(t, **given, sigma=SIGMA) == pytest.approx(exact["variance"], rel=1e-12, abs=1e-13)
    average = theory.double_average_variance(t, **given, sigma=SIGMA)
    assert average == pytest.approx(exact["average"], rel=1e-12, abs=1e-13)


def test_the_formulas_as_published_are_these() -> None:
    lr, alpha, p, h, t, x, c = 0.3, 0.12, 4, 1.3, 9, 0.4, 1.1
    a, q2 = lr * h + (p + 1) * alpha, lr * h * p * alpha
    g, f = (1 - (a + sign * math.sqrt(a * a - 4 * q2)) / 2 for sign in (-1, 1))
    u = p * (x - alpha / (1 - p * alpha - f) * c)
    mean = g**t * c + alpha * u * (g**t - f**t) / (g - f)
    bracket = (
        (g**2 - g ** (2 * t)) / (1 - g**2)
        + (f**2 - f ** (2 * t)) / (1 - f**2)
        - 2 * (g * f - (g * f) ** t) / (1 - g * f)
    )
    variance = (p * alpha * lr / (g - f)) ** 2 * bracket * SIGMA**2 / p
    given = {"lr": lr, "alpha": alpha, "workers": p, "curvature": h}
    assert theory.center_mean(t, **given, start=(c, x)) == pytest.approx(mean, rel=1e-12)
    assert theory.center_variance(t, **given, sigma=SIGMA) == pytest.approx(variance, rel=1e-12)


def test_simulated_means_and_variances_lie_within_their_confidence_limits() -> None:
    lr, alpha, p, h, steps, runs = 0.3, 0.2, 3, 1.0, 12, 40_000
    rng = np.random.default_rng(20)
    x, c, total = np.full((runs, p), 2.0), np.full(runs, 2.0), np.full(runs, 2.0)
    for _ in range(steps):
        d = alpha * (x - c[:, None])
        x = x - lr * (h * x - SIGMA * rng.standard_normal((runs, p))) - d
        c = c + d.sum(axis=1)
        total += c
    given = {"lr": lr, "alpha": alpha, "workers": p, "curvature": h}
    mean = theory.center_mean(steps, **given, start=2.0)
    # Gaussian: a sample mean spreads by σ/√n, a sample variance by σ²√(2/(n - 1)); once in 16 000 it is 4 of them.
    for values, variance in (
        (c, theory.center_variance(steps, **given, sigma=SIGMA)),
        (total / (steps + 1), theory.double_average_variance(steps, **given, sigma=SIGMA)),
    ):
        assert abs(values.var(ddof=1) - variance) < 4 * variance * math.sqrt(2 / (runs - 1))
    assert abs(c.mean() - mean) < 4 * math.sqrt(theory.center_variance(steps, **given, sigma=SIGMA) / runs)


# Limits


def test_the_limit_with_endless_workers_has_the_published_value() -> None:
    assert f"{theory.center_mse_limit(lr=0.1, beta=0.9):.7f}" == "0.0515800"
    lr, beta, h = np.array([0.1, 0.7, 1.9]), np.array([0.9, 1.6, 0.2]), 1.0
    u = lr * h
    published = beta * u / ((2 - beta) * (2 - u)) * (2 - beta - u + beta * u) / (beta + u - beta * u) * SIGMA**2 / h**2
    assert theory.center_mse_limit(lr=lr, beta=beta, curvature=h, sigma=SIGMA) == pytest.approx(published, rel=1e-12)


@pytest.mark.parametrize("p", [1, 3, 10_000])
def test_the_limit_with_few_workers_is_that_of_the_variance(p: int) -> None:
    lr, beta, h = 0.3, 0.7, 1.4
    given = {"lr": lr, "alpha": beta / p, "workers": p, "curvature": h}
    limit = theory.center_mse_limit(lr=lr, beta=beta, workers=p, curvature=h, sigma=SIGMA)
    assert p * theory.center_variance(math.inf, **given, sigma=SIGMA) == pytest.approx(limit, rel=1e-12)
    assert p * theory.center_variance(10_000, **given, sigma=SIGMA) == pytest.approx(limit, rel=1e-12)
    assert theory.center_mean(math.inf, **given) == 0
    if p == 10_000:
        endless = theory.center_mse_limit(lr=lr, beta=beta, curvature=h, sigma=SIGMA)
        assert limit == pytest.approx(endless, rel=3 / p)


def test_the_double_average_reaches_the_cramer_rao_bound_whatever_eta_and_beta_are() -> None:
    lr, beta = np.meshgrid([0.05, 0.5, 1.5], [0.1, 0.9, 1.2])
    for p in (1, 4):
        alpha = beta * 0.6 / p
        bound = theory.cramer_rao_bound(2.0 / 3, SIGMA**2, workers=p)
        t = 10**7
        variance = theory.double_average_variance(
            t, lr=lr, alpha=alpha, workers=p, curvature=2.0 / 3, sigma=SIGMA
        )  # fmt: skip
        fine = alpha < theory.easgd_alpha_limit(lr, 2.0 / 3, stale=True, workers=p)
        assert fine.sum() >= 6
        assert (t * variance)[fine] == pytest.approx(bound, rel=1e-4)
        assert bound == pytest.approx(SIGMA**2 * 9 / 4 / p)


def test_in_more_dimensions_the_bound_is_the_inverse_hessians_sandwich() -> None:
    rng, p, d, lr, alpha = np.random.default_rng(7), 2, 3, 0.2, 0.3
    root = rng.normal(size=(d, d))
    hessian, spread = root @ root.T / 3 + np.eye(d), rng.normal(size=(d, d))
    covariance = spread @ spread.T
    # (mean of the workers, c, sum of the past c) in d dimensions; the mean's noise is ηξ/√p.
    unit, zero = np.eye(d), np.zeros((d, d))
    drift = np.block([
        [unit - lr * hessian - alpha * unit, alpha * unit, zero],
        [p * alpha * unit, (1 - p * alpha) * unit, zero],
        [zero, unit, unit],
    ])  # fmt: skip
    noise, state = np.zeros((3 * d, 3 * d)), np.zeros((3 * d, 3 * d))
    noise[:d, :d] = lr**2 * covariance / p
    found = []
    for t in range(1, 4001):
        state = drift @ state @ drift.T + noise
        if t in (2000, 4000):
            found.append(state[-d:, -d:] / t)  # t·Var of (c_0 + ... + c_{t-1})/t
    bound = theory.cramer_rao_bound(hessian, covariance, workers=p)
    extrapolated = 2 * found[1] - found[0]  # the error falls as 1/t
    assert np.abs(extrapolated - bound).max() < 1e-9 * np.abs(bound).max()


def test_without_a_pull_the_center_stays() -> None:
    t = np.arange(5)
    given = {"lr": 0.1, "alpha": 0.0, "workers": 3}
    assert theory.center_mean(t, **given, start=2.5) == pytest.approx([2.5] * 5)
    assert theory.center_variance(t, **given) == pytest.approx([0] * 5)


def test_everything_broadcasts() -> None:
    lr, alpha, t = np.array([[0.1], [0.2]]), np.array([0.05, 0.1, 0.2]), np.array([1, 7, math.inf])
    for of in (theory.center_mean, theory.center_variance):
        grid = of(t, lr=lr, alpha=alpha, workers=np.array([4, 1, 3]))
        assert grid.shape == (2, 3)
        assert grid[1, 1] == of(7, lr=0.2, alpha=0.1, workers=1)
        assert isinstance(of(7, lr=0.2, alpha=0.1, workers=1), float)


def test_small_rates_cost_no_digits_in_the_limit() -> None:
    given = {"lr": 1e-6, "alpha": 1e-6, "workers": 4}
    far = theory.center_variance(math.inf, **given, sigma=SIGMA)
    assert 4 * far == pytest.approx(theory.center_mse_limit(lr=1e-6, beta=4e-6, workers=4, sigma=SIGMA), rel=1e-9)


# Domains

FINE = {"lr": 0.1, "alpha": 0.2, "workers": 4}


@pytest.mark.parametrize("call, sentence", [
    (lambda: theory.center_mean(3, **FINE | {"lr": 0.0}), "lr=0: the step size η must be positive"),
    (lambda: theory.center_mean(3, **FINE | {"lr": -0.1}), "lr=-0.1: "),
    (lambda: theory.center_mean(3, **FINE | {"alpha": -0.1}), "alpha=-0.1: "),
    (lambda: theory.center_mean(3, **FINE | {"workers": 0}), "workers=0: "),
    (lambda: theory.center_mean(3, **FINE, start=math.nan), "start=nan: "),
    (lambda: theory.center_mean(-1, **FINE), "t=-1: the time t must be a whole number of steps, at least 0"),
    (lambda: theory.center_variance(2.5, **FINE), "t=2.5: "),
    (lambda: theory.center_variance(3, **FINE, sigma=-1.0), "sigma=-1: "),
    (lambda: theory.center_variance(3, **FINE, curvature=math.inf), "curvature=inf: "),
    (lambda: theory.center_variance(math.inf, **FINE | {"alpha": [0.1, 0.9]}), "lr=0.1, alpha=0.9, .*: no limit as t"),
    (lambda: theory.center_mean(math.inf, **FINE | {"alpha": 0.0}), "lr=0.1, alpha=0, .* < α < .* must hold; lower "),
    (lambda: theory.center_mean(math.inf, **FINE | {"lr": 2.5}), "lr=2.5, .*: no limit as t -> ∞"),
    (lambda: theory.center_mse_limit(lr=0.1, beta=2.0), "lr=0.1, beta=2, workers=inf, curvature=1: unstable"),
    (lambda: theory.center_mse_limit(lr=3.0, beta=3.0), "lr=3, beta=3, .*: unstable"),
    (lambda: theory.center_mse_limit(lr=0.1, beta=0.0), "beta=0: "),
    (lambda: theory.center_mse_limit(lr=0.1, beta=0.9, workers=0.5), r"workers=0.5: .* \(or infinite\)"),
    (lambda: theory.double_average_variance(5, **FINE | {"alpha": 0.0}), "alpha=0: "),
    (lambda: theory.double_average_variance(math.inf, **FINE), "t=inf: "),
    (lambda: theory.cramer_rao_bound([[1.0, 1.0], [1.0, 1.0]], np.eye(2)), "curvature: the matrix cannot be inverted"),
    (lambda: theory.cramer_rao_bound(0.0), "curvature=0: "),
])  # fmt: skip
def test_what_is_outside_the_domain_is_refused_with_value_and_rule(call: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}") as refused:
        call()
    assert str(refused.value).endswith(".")
    assert "\n" not in str(refused.value)
