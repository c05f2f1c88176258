"""Synchronous EASGD with independent moving rates: the worker's α and the center's β. A negative α is momentum."""

from __future__ import annotations

from typing import Any

import numpy as np

from easgd_local.theory import domain
from easgd_local.theory.domain import Array, Grid


def drift_matrix(lr: Grid, alpha: Grid, beta: Grid, curvature: Grid = 1.0) -> Array:
    """The map of the means of (mean_i x^i, c) in one step, with α and β on their own: after Zhang's thesis.

        [[1 - ηh - α, α], [β, 1 - β]]          eigenvalues 1 - (a ± √(a² - 4βηh))/2,  a = ηh + α + β

    The trace is 2 - a and the determinant 1 - a + βηh, so α enters through a alone, and for given η, β, h the radius is
    least where the eigenvalues meet, a = 2√(βηh) (more leaves a slower real one, less a pair of modulus √determinant):

        α = -(√β - √(ηh))² ≤ 0,     radius |1 - √(βηh)|     where SGD has |1 - ηh|     (`momentum_alpha`)

    That is momentum, by name and not only by rate. Equal trace and determinant for every h, hence the same modes:

        β = 1, α = -δ                          heavy ball  x_{t+1} = x_t - ηh x_t + δ(x_t - x_{t-1}); then c_t = x_{t-1}
        β = 1/(1 + δ), α = -δ²/(1 + δ)         Nesterov's momentum δ with the step size η/(1 + δ)

    lr (η), alpha (α, of any sign), beta (β) and curvature (h) broadcast to a shape S; returns (*S, 2, 2). `ValueError`
    unless η ≥ 0, h > 0, β ≥ 0 and α is finite.
    """
    values = domain.step_size_or_none(lr), domain.finite("alpha", alpha), _beta(beta), domain.curvature_of(curvature)
    eta, alpha, beta, h = np.broadcast_arrays(*values)
    rows = [np.stack([1 - eta * h - alpha, alpha], axis=-1), np.stack([beta, 1 - beta], axis=-1)]
    return np.stack(rows, axis=-2)


def momentum_alpha(lr: Grid, beta: Grid, curvature: Grid = 1.0) -> Any:
    """The α for which `drift_matrix` has the least spectral radius, |1 - √(βηh)|: -(√β - √(ηh))². Broadcasts.

    Zero where β = ηh. `ValueError` unless η ≥ 0, h > 0 and β ≥ 0.
    """
    u = domain.step_size_or_none(lr) * domain.curvature_of(curvature)
    return -((np.sqrt(_beta(beta)) - np.sqrt(u)) ** 2)


def _beta(value: Grid) -> Array:
    rule = "the center's moving rate β must be at least 0 and finite; try 0.9"
    return domain.checked("beta", value, lambda beta: (beta >= 0) & np.isfinite(beta), rule)
