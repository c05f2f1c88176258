"""Stability of a cycle of turns at the center, on F(x) = h x²/2 in one dimension, without noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from easgd_local.theory import domain
from easgd_local.theory.domain import Array, Grid

PIECE = 2**20  # matrix elements at a time: 8 MB


def easgd_round_robin_matrix(lr: Grid, alpha: Grid, workers: int, curvature: Grid = 1.0) -> Array:
    """The map of one cycle of EASGD's round robin on (x^1, ..., x^p, c), τ = 1: Zhang et al. 2015, equations 12, 13.

        (x^i, c) <- [[1 - ηh - α, α], [α, 1 - α]] (x^i, c)     for i = 1, ..., p in turn

    lr (η), alpha (α) and curvature (h) broadcast to a shape S; returns (*S, p + 1, p + 1). `ValueError` unless η ≥ 0,
    0 ≤ α ≤ 1, p ≥ 1 and h > 0.
    """
    eta, alpha, h = np.broadcast_arrays(
        domain.step_size_or_none(lr), domain.share(alpha), domain.curvature_of(curvature)
    )
    p, stay = domain.count(workers), (1 - eta * h - alpha)[..., None]
    alpha = alpha[..., None]
    cycle = np.broadcast_to(np.eye(p + 1), (*eta.shape, p + 1, p + 1)).copy()
    for i in range(p):  # a turn from the left changes two rows
        x, c = cycle[..., i, :].copy(), cycle[..., p, :].copy()
        cycle[..., i, :] = stay * x + alpha * c
        cycle[..., p, :] = alpha * x + (1 - alpha) * c
    return cycle


def easgd_stale_matrix(lr: Grid, alpha: Grid, workers: int, curvature: Grid = 1.0) -> Array:
    """The map of one step of EASGD on (x^1, ..., x^p, c) when all take their difference from the old center.

        x^i <- (1 - ηh - α) x^i + α c,     c <- (1 - pα) c + α Σ_i x^i

    Synchronous EASGD (Zhang et al. 2015, equations 5 and 6), or turns in which all read before anyone commits.
    Arguments, shapes and errors as in `easgd_round_robin_matrix`, but α may be any number from 0.
    """
    eta, alpha, h = np.broadcast_arrays(
        domain.step_size_or_none(lr), domain.rate(alpha), domain.curvature_of(curvature)
    )
    p = domain.count(workers)
    step = (1 - eta * h - alpha)[..., None, None] * np.eye(p + 1)
    step[..., :p, p] = step[..., p, :p] = alpha[..., None]
    step[..., p, p] = 1 - p * alpha
    return step


def admm_round_robin_matrix(lr: Grid, rho: Grid, workers: int, curvature: Grid = 1.0) -> Array:
    """The map of one cycle of ADMM's round robin on (λ^1, x^1, ..., λ^p, x^p, c): Zhang et al. 2015, section 4.

        λ^i <- λ^i - (x^i - c),   x^i <- [(1 - ηh) x^i + ηρ(λ^i + c)]/(1 + ηρ),   c <- (1/p) Σ_j (x^j - λ^j)

    for i = 1, ..., p in turn. lr (η), rho (ρ) and curvature (h) broadcast to a shape S; returns
    (*S, 2p + 1, 2p + 1). `ValueError` unless η ≥ 0, ρ ≥ 0, p ≥ 1 and h > 0.
    """
    eta, rho, h = np.broadcast_arrays(domain.step_size_or_none(lr), domain.penalty(rho), domain.curvature_of(curvature))
    p, keep, pull = domain.count(workers), (1 - eta * h)[..., None], (eta * rho)[..., None]
    cycle = np.broadcast_to(np.eye(2 * p + 1), (*eta.shape, 2 * p + 1, 2 * p + 1)).copy()
    for i in range(p):
        multiplier, x, c = cycle[..., 2 * i, :], cycle[..., 2 * i + 1, :], cycle[..., 2 * p, :]
        multiplier -= x - c
        x[...] = (keep * x + pull * (multiplier + c)) / (1 + pull)
        c[...] = (cycle[..., 1 : 2 * p : 2, :] - cycle[..., 0 : 2 * p : 2, :]).mean(axis=-2)
    return cycle


def spectral_radius(matrix: Grid) -> Any:
    """The largest |eigenvalue| of each square matrix: (*S, m, m) -> S; `ValueError` for other shapes, NaN, infinity."""
    array = np.asarray(matrix, dtype=np.float64)
    if array.ndim < 2 or array.shape[-1] != array.shape[-2] or not array.shape[-1]:
        raise ValueError(
            f"matrix of shape {array.shape}: eigenvalues need square matrices; the last two axes are theirs."
        )
    if not np.isfinite(array).all():
        raise ValueError("matrix with NaN or infinity: its eigenvalues are not defined; check what it was made of.")
    return np.abs(np.linalg.eigvals(array)).max(axis=-1)


def easgd_round_robin_radius(lr: Grid, alpha: Grid, workers: int, curvature: Grid = 1.0) -> Any:
    """Spectral radius of `easgd_round_robin_matrix`, of the broadcast shape, without holding all the matrices.

    The turns are one map T up to the names of the workers, so with P the renaming of worker i + 1 to i the cycle is
    (PT)^p: the eigenvalues are z^p with (z^p - 1 + ηh + α)(z - 1 + α) = α². Arguments as there.
    """
    p = domain.count(workers)
    domain.share(alpha)

    def turn(eta: Array, alpha: Array, h: Array) -> Array:
        matrix = np.zeros((len(eta), p + 1, p + 1))
        matrix[:, np.arange(p - 1), np.arange(1, p)] = 1
        matrix[:, p - 1, 0], matrix[:, p - 1, p] = 1 - eta * h - alpha, alpha
        matrix[:, p, 0], matrix[:, p, p] = alpha, 1 - alpha
        return matrix

    return _in_pieces(lambda *some: spectral_radius(turn(*some)) ** p, p + 1, lr, alpha, curvature)


def easgd_stale_radius(lr: Grid, alpha: Grid, workers: Grid, curvature: Grid = 1.0) -> Any:
    """Spectral radius of `easgd_stale_matrix`: max(|γ|, |φ|) with the γ, φ of `moments`. All arguments broadcast.

    The differences between workers decay by 1 - ηh - α, which lies between φ and γ.
    """
    eta, alpha, h = domain.step_size_or_none(lr), domain.rate(alpha), domain.curvature_of(curvature)
    p = domain.counts(workers)
    a, q2 = eta * h + (p + 1) * alpha, eta * h * p * alpha
    root = np.sqrt(a * a - 4 * q2)  # real: (ηh - pα)² + 2α(ηh + pα) + α²
    return np.maximum(np.abs(1 - (a - root) / 2), np.abs(1 - (a + root) / 2))


def admm_round_robin_radius(lr: Grid, rho: Grid, workers: int, curvature: Grid = 1.0) -> Any:
    """Spectral radius of `admm_round_robin_matrix`, of the broadcast shape, without holding all the matrices."""
    p = domain.count(workers)
    domain.penalty(rho)

    def radius(eta: Array, rho: Array, h: Array) -> Any:
        return spectral_radius(admm_round_robin_matrix(eta, rho, p, h))

    return _in_pieces(radius, 2 * p + 1, lr, rho, curvature)


def _in_pieces(radius: Callable[..., Any], side: int, lr: Grid, other: Grid, curvature: Grid) -> Any:
    """The radius at each point of the broadcast arguments; `side` is that of a matrix, which bounds the memory."""
    eta, other, h = np.broadcast_arrays(
        domain.step_size_or_none(lr), np.asarray(other, np.float64), domain.curvature_of(curvature)
    )
    flat, most = [one.reshape(-1) for one in (eta, other, h)], max(PIECE // side**2, 1)
    parts = [radius(*(one[start : start + most] for one in flat)) for start in range(0, max(eta.size, 1), most)]
    return np.concatenate(parts).reshape(eta.shape)[()]


def easgd_alpha_limit(lr: Grid, curvature: Grid = 1.0, stale: bool = False, workers: Grid | None = None) -> Any:
    """The largest stable moving rate α; 0 where ηh ≥ 2, as then no α is.

        exclusive turns:    (4 - 2ηh)/(4 - ηh)             for every p: Zhang et al. 2015, section 4
        stale differences:  2(2 - ηh)/(2 + p(2 - ηh))      about 2/(p + 1); one worker is the formula above

    The first is where the map of one turn, a symmetric matrix, gets the eigenvalue -1. Below it no vector grows, for
    any p. Beyond it the cycle is unstable for every odd p (z = -1 solves the equation in `easgd_round_robin_radius`);
    for even p it stays stable a little further, less and less as p grows: at ηh = 1 up to 0.707 with p = 2, 0.669 with
    p = 8, instead of 2/3. The second is exact for every p. lr, curvature and workers broadcast. `ValueError` unless
    η ≥ 0, h > 0, p ≥ 1; stale needs workers.

    >>> float(easgd_alpha_limit(1.0)), float(easgd_alpha_limit(1.0, stale=True, workers=2))
    (0.6666666666666666, 0.5)
    """
    u = domain.step_size_or_none(lr) * domain.curvature_of(curvature)
    p = None if workers is None else domain.counts(workers)
    room = np.maximum(2 - u, 0.0)  # 2 - ηh
    if not stale:
        return 2 * room / (2 + room)
    if p is None:
        raise ValueError("workers=None: with stale differences the bound of α depends on p; give workers.")
    return 2 * room / (2 + p * room)


def easgd_is_stable(lr: Grid, alpha: Grid, curvature: Grid = 1.0) -> Any:
    """Whether EASGD's round robin stays bounded for every number of workers: Zhang et al. 2015, section 4.

        0 ≤ ηh ≤ 2  and  0 ≤ α ≤ (4 - 2ηh)/(4 - ηh)

    Of the broadcast shape, boolean. `ValueError` unless η ≥ 0, 0 ≤ α ≤ 1 and h > 0.
    """
    eta, h = domain.step_size_or_none(lr), domain.curvature_of(curvature)
    return (eta * h <= 2) & (domain.share(alpha) <= easgd_alpha_limit(eta, h))


def trajectory(matrix: Grid, start: Grid, rounds: int) -> Array:
    """The states start, M start, M² start, ..., M^rounds start: (rounds + 1, m).

    What grows beyond the largest float64 is infinite, or NaN, from there on. `ValueError` for a matrix that is not
    (m, m), a start that is not (m,), NaN or infinity in them, and rounds < 0.
    """
    array, state = domain.finite("matrix", matrix), domain.finite("start", start)
    if array.ndim != 2 or array.shape != (state.size, state.size) or state.ndim != 1:
        raise ValueError(
            f"start of shape {state.shape}: a matrix of shape {array.shape} does not act on it; match them."
        )
    if rounds < 0:
        raise ValueError(f"rounds={rounds}: there cannot be fewer than no rounds; give 0 or more.")
    states = np.empty((rounds + 1, state.size))
    states[0] = state
    with np.errstate(over="ignore", invalid="ignore"):
        for number in range(rounds):
            np.matmul(array, states[number], out=states[number + 1])
    return states
