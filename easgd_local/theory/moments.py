"""Mean and variance of the center of synchronous EASGD on the noisy quadratic: Zhang et al. 2015, supplement.

    g = hx - b - ξ,  E ξ = 0,  Var ξ = σ²,  independent over workers and steps;  x* = b/h
    x^i <- x^i - η g(x^i) - α(x^i - c),   c <- c + α Σ_i (x^i - c)     every step (τ = 1)

    a = ηh + (p + 1)α,   q² = ηh·pα,   γ, φ = 1 - (a ∓ √(a² - 4q²))/2

γ and φ, always real and γ > φ, are the eigenvalues of the map of (Σ_i (x^i - x*), c - x*). A change of the sum at one
step reaches the center k steps later times α S_k, S_k = (γ^k - φ^k)/(γ - φ). Everything below follows from that. All
arguments broadcast; t counts steps and may be infinite where the limit exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from easgd_local.theory import domain
from easgd_local.theory.domain import Array, Grid
from easgd_local.theory.stability import easgd_alpha_limit


def center_mean(
    t: Grid, *, lr: Grid, alpha: Grid, workers: Grid, curvature: Grid = 1.0, start: Grid | tuple[Grid, Grid] = 1.0
) -> Any:
    """E[c_t - x*], the bias of the center after t steps: Zhang et al. 2015, supplement.

        γ^t (c_0 - x*) + α u_0 S_t,     u_0 = Σ_i [x_0^i - x* - α/(1 - pα - φ)·(c_0 - x*)]

    `start` is the offset from x* that center and workers begin with, or a pair: (c_0 - x*, mean_i x_0^i - x*).
    `ValueError` unless η > 0, α ≥ 0, p ≥ 1, h > 0, and for infinite t unless stable.
    """
    t, modes = domain.clock(t), _Modes.of(lr, alpha, workers, curvature)
    _refuse_unstable(t, modes)
    pair = start if isinstance(start, tuple) else (start, start)
    c, x = (domain.finite("start", one) for one in pair)
    u = modes.alpha * modes.p * x - (modes.p * modes.alpha - modes.slow) * c  # α u_0; pα²/(1 - pα - φ) = γ - 1 + pα
    return modes.gamma**t * c + u * (modes.gamma**t - modes.phi**t) / modes.split


def center_variance(t: Grid, *, lr: Grid, alpha: Grid, workers: Grid, curvature: Grid = 1.0, sigma: Grid = 1.0) -> Any:
    """Var c_t after t steps from a start without spread: Zhang et al. 2015, supplement.

        pα²η²σ² Σ_{0<k<t} S_k² = (p²α²η²/(γ - φ)²)·[Γ(γ²) + Γ(φ²) - 2Γ(γφ)]·σ²/p,     Γ(r) = (r - r^t)/(1 - r)

    Rounding: about t·2^-53/(γ - φ)² relative to the first terms, for they cancel. `ValueError` unless η > 0, α ≥ 0,
    p ≥ 1, h > 0, σ ≥ 0, and for infinite t unless stable.
    """
    t, modes, sigma = domain.clock(t), _Modes.of(lr, alpha, workers, curvature), domain.deviation(sigma)
    _refuse_unstable(t, modes)
    steps = np.maximum(t - 1, 0)  # Σ_{0<k<t} r^k = r (1 + ... + r^{t-2})
    total = sum(weight * r * _geometric(r, gap, steps) for weight, r, gap in modes.squares())
    return modes.p * (modes.alpha * modes.eta * sigma / modes.split) ** 2 * np.maximum(total, 0)


def center_mse_limit(*, lr: Grid, beta: Grid, workers: Grid = np.inf, curvature: Grid = 1.0, sigma: Grid = 1.0) -> Any:
    """p times the mean squared error of the center as t -> ∞, with β = pα: Zhang et al. 2015, supplement.

        (βησ²/h)·(2 - a + q²)/[(a - q²)(4 - 2a + q²)],     a = ηh + β + β/p,  q² = ηhβ

    the variance Σ_k S_k² of a recursion of second order, summed. At p = ∞, where a = ηh + β, it is the paper's
    [βηh/((2 - β)(2 - ηh))]·[(2 - β - ηh + βηh)/(β + ηh - βηh)]·σ²/h². `ValueError` unless η > 0, β > 0, p ≥ 1 (infinity
    is the default), h > 0, σ ≥ 0 and stable: (2 - ηh)(2 - β) > 2β/p and ηh < 2.
    """
    eta, h, p = domain.step_size(lr), domain.curvature_of(curvature), domain.counts(workers, endless=True)
    positive = "the center's moving rate β must be positive and finite, else the center has no limit; try 0.9"
    beta = domain.checked("beta", beta, lambda beta: (beta > 0) & np.isfinite(beta), positive)
    sigma, u = domain.deviation(sigma), eta * h
    a, q2 = u + beta + beta / p, u * beta
    unstable = ~((4 - 2 * a + q2 > 0) & (u < 2))
    if unstable.any():
        values = _first(unstable, lr=eta, beta=beta, workers=p, curvature=h)
        raise ValueError(f"{values}: unstable, as (2 - ηh)(2 - β) > 2β/p and ηh < 2 must hold; lower lr or beta.")
    return beta * eta * sigma**2 / h * (2 - a + q2) / ((a - q2) * (4 - 2 * a + q2))


def double_average_variance(
    t: Grid, *, lr: Grid, alpha: Grid, workers: Grid, curvature: Grid = 1.0, sigma: Grid = 1.0
) -> Any:
    """Var z_t of the double average z_t = (c_0 + ... + c_t)/(t + 1): Zhang et al. 2015, supplement.

        pα²η²σ²/(t + 1)² · Σ_{n<t} G_n²,     G_n = Σ_{k≤n} S_k = 1/q² - [γ^{n+1}/(1 - γ) - φ^{n+1}/(1 - φ)]/(γ - φ)

    summed in closed form. t·Var z_t tends to σ²/(p h²), `cramer_rao_bound`, whatever η and β are. t is finite here.
    Rounding: about 2^-53/q⁴ relative to the first terms. `ValueError` unless η > 0, α > 0, p ≥ 1, h > 0, σ ≥ 0, t ≥ 0.
    """
    t, sigma = domain.clock(t, endless=False), domain.deviation(sigma)
    pull = "the moving rate α must be positive, else the center never moves and has no average to speak of; try 0.2"
    alpha = domain.checked("alpha", alpha, lambda alpha: (alpha > 0) & np.isfinite(alpha), pull)
    modes = _Modes.of(lr, alpha, workers, curvature)
    slow, fast = modes.slow, modes.fast
    whole = 1 / (slow * fast)  # 1/q²;  G_n = whole - g γ^n + f φ^n
    g, f = modes.gamma / (slow * modes.split), modes.phi / (fast * modes.split)
    total = whole**2 * t - 2 * whole * (g * _geometric(modes.gamma, slow, t) - f * _geometric(modes.phi, fast, t))
    weights = g * g, f * f, g * f
    for weight, (sign, r, gap) in zip(weights, modes.squares(), strict=True):
        total = total + sign * weight * _geometric(r, gap, t)
    return modes.p * (modes.alpha * modes.eta * sigma / (t + 1)) ** 2 * np.maximum(total, 0)


def cramer_rao_bound(curvature: Grid = 1.0, covariance: Grid = 1.0, *, workers: Grid = 1) -> Any:
    """The least asymptotic t·variance of an estimate of the minimum from p noisy gradients a step: A⁻¹ΣA⁻ᵀ/p.

    curvature: A, (d, d), or h; covariance: Σ of the noise, (d, d), or σ². Returns (d, d), or σ²/(p h²). `ValueError`
    unless p ≥ 1, all is finite and A can be inverted.
    """
    hessian, noise = domain.finite("curvature", curvature), domain.finite("covariance", covariance)
    p = domain.counts(workers)
    if hessian.ndim == 0:
        return noise / (p * domain.curvature_of(hessian) ** 2)
    try:
        inverse = np.linalg.inv(hessian)
    except np.linalg.LinAlgError as error:
        raise ValueError(f"curvature: the matrix cannot be inverted ({error}); give a positive definite one.") from None
    return inverse @ noise @ inverse.T / p


@dataclass(frozen=True)
class _Modes:
    """γ, φ and what the formulas make of them; slow = 1 - γ and fast = 1 - φ without cancellation."""

    eta: Array
    alpha: Array
    p: Array
    h: Array
    slow: Array
    fast: Array

    @classmethod
    def of(cls, lr: Grid, alpha: Grid, workers: Grid, curvature: Grid) -> _Modes:
        eta, alpha, h = domain.step_size(lr), domain.rate(alpha), domain.curvature_of(curvature)
        p = domain.counts(workers)
        u, beta = eta * h, p * alpha
        a = u + beta + alpha
        root = np.sqrt((u - beta) ** 2 + 2 * alpha * (u + beta) + alpha**2)  # a² - 4q², a sum of squares
        fast = (a + root) / 2
        return cls(eta, alpha, p, h, u * beta / fast, fast)

    @property
    def gamma(self) -> Array:
        return 1 - self.slow

    @property
    def phi(self) -> Array:
        return 1 - self.fast

    @property
    def split(self) -> Array:
        """γ - φ, positive as η is."""
        return self.fast - self.slow

    def squares(self) -> tuple[tuple[int, Array, Array], ...]:
        """(weight, r, 1 - r) of r = γ², φ², γφ in (γ^k - φ^k)²."""
        slow, fast = self.slow, self.fast
        return (
            (1, self.gamma**2, slow * (2 - slow)),
            (1, self.phi**2, fast * (2 - fast)),
            (-2, self.gamma * self.phi, slow + fast - slow * fast),
        )


def _geometric(r: Array, gap: Array, n: Array) -> Array:
    """1 + r + ... + r^{n-1} = (1 - r^n)/(1 - r) with gap = 1 - r, to about an ulp of each term; n may be infinite."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        near = -np.expm1(n * np.log1p(-gap)) / gap  # r > 0
        far = (1 - r**n) / gap
    return np.where(gap == 0, n, np.where(gap < 0.5, near, far))


def _refuse_unstable(t: Array, modes: _Modes) -> None:
    limit = easgd_alpha_limit(modes.eta, modes.h, stale=True, workers=modes.p)
    wrong = np.isinf(t) & ~((modes.alpha < limit) & (modes.alpha > 0))
    if wrong.any():
        values = _first(wrong, lr=modes.eta, alpha=modes.alpha, workers=modes.p, curvature=modes.h)
        raise ValueError(
            f"{values}: no limit as t -> ∞, as 0 < α < 2(2 - ηh)/(2 + p(2 - ηh)) must hold; lower lr or alpha, or give "
            f"a finite t."
        )


def _first(where: Any, **values: Array) -> str:
    """The values at the first place that is wrong."""
    place = np.unravel_index(int(np.argmax(where)), np.shape(where))
    return ", ".join(f"{name}={np.broadcast_to(one, np.shape(where))[place]:g}" for name, one in values.items())
