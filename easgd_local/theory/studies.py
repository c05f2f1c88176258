"""The four studies of `easgd-local theory`: what each computes, its key numbers, its tables and its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from easgd_local.figure_folder import Table
from easgd_local.theory import domain, drift, figures, moments, stability
from easgd_local.theory.domain import Array

START = 1000.0  # where x and c begin in the paper's example of ADMM
EDGE = 1e-9  # a radius of 1 up to rounding is not beyond 1


@dataclass(frozen=True)
class Study:
    """Sentences with the key numbers; file stem -> table; file stem -> Matplotlib figure."""

    lines: Sequence[str]
    tables: Mapping[str, Table]
    figures: Mapping[str, Any]


def stability_study(*, workers: int, points: int) -> Study:
    """The spectral radius over ηh × α for exclusive turns and for stale differences, side by side."""
    p, u, alpha = domain.count(workers), np.linspace(0, 2, _grid(points)), np.linspace(0, 1, points)
    grid_u, grid_alpha = np.meshgrid(u, alpha)
    radii = {
        f"exclusive turns, p = {p}": stability.easgd_round_robin_radius(grid_u, grid_alpha, p),
        f"stale differences, p = {p}": stability.easgd_stale_radius(grid_u, grid_alpha, p),
    }
    limits = {name: stability.easgd_alpha_limit(u, 1, name.startswith("stale"), p) for name in radii}
    lines = [
        f"{name}: stable on {_percent(radius <= 1 + EDGE)} of 0 ≤ ηh ≤ 2, 0 ≤ α ≤ 1; largest stable α "
        + ", ".join(
            f"{stability.easgd_alpha_limit(at, 1, 'stale' in name, p):.3f} at ηh = {at:g}" for at in (0.01, 0.1, 1)
        )
        + "."
        for name, radius in radii.items()
    ]
    lines.append(
        f"negative α: with β = 1, ηh = 0.01 the least radius is {1 - np.sqrt(0.01):.3g}, at "
        f"α = {drift.momentum_alpha(0.01, 1):.3g}, where SGD has 0.99: EASGD is then momentum 0.81 (heavy ball)."
    )
    exclusive, stale = radii.values()
    columns = {"lr_times_curvature": grid_u, "alpha": grid_alpha, "radius_exclusive": exclusive, "radius_stale": stale}
    return Study(lines, {"stability": columns}, {"stability": figures.stability_maps(u, alpha, radii, limits)})


def admm_study(*, workers: Sequence[int], lr: float, rho: float, rounds: int, points: int) -> Study:
    """Figure 1 of Zhang et al. 2015: ADMM's spectral radius over η × ρ; a trajectory; EASGD with α = ηρ beside it."""
    eta, rhos = (np.linspace(0, most, _grid(points) + 1)[1:] for most in (1e-2, 10))
    grid_eta, grid_rho = np.meshgrid(eta, rhos)
    most, alpha = max(map(domain.count, workers)), _alpha(lr, rho)
    last = f"EASGD with α = ηρ, p = {most}"
    radii = {f"ADMM, p = {p}": stability.admm_round_robin_radius(grid_eta, grid_rho, p) for p in workers}
    radii[last] = stability.easgd_round_robin_radius(grid_eta, grid_eta * grid_rho, most)
    matrices = {f"ADMM, p = {p}": stability.admm_round_robin_matrix(lr, rho, p) for p in workers}
    matrices[last] = stability.easgd_round_robin_matrix(lr, alpha, most)
    sizes = {name: _sizes(name, matrix, rounds) for name, matrix in matrices.items()}
    bound = stability.easgd_alpha_limit(lr)
    lines = [
        f"{name}: spectral radius {stability.spectral_radius(matrices[name]):.10f} at η = {lr:g}, ρ = {rho:g}, h = 1; "
        f"from {START:g} the largest |coordinate| falls to {size.min():.4g} at cycle {size.argmin():,} and is "
        f"{size[-1]:.4g} after {rounds:,}; unstable on {_percent(radii[name] > 1 + EDGE)} of the map."
        for name, size in sizes.items()
    ]
    lines.append(
        f"EASGD's bound at η = {lr:g}, h = 1: α = {bound:.6g}, which is ρ = {bound / lr:.4g}; the map ends at ρ = 10."
    )
    lowest = float((stability.easgd_alpha_limit(eta) / eta).min())
    note = f"EASGD's bound: from ρ = {lowest:.4g} up, above the map"
    cycles = np.arange(rounds + 1.0)
    heading = f"Round robin of ADMM and of EASGD without noise  (η = {lr:g}, ρ = {rho:g}, h = 1, start {START:g})"
    curves = {name: (cycles, size) for name, size in sizes.items()}
    return Study(
        lines,
        {
            "admm-map": {"lr": grid_eta, "rho": grid_rho, **_columns(radii)},
            "admm-trajectory": {"cycle": cycles, **_columns(sizes)},
        },
        {
            "admm-map": figures.admm_maps(eta, rhos, radii, (lr, rho), note),
            "admm-trajectory": figures.trajectories(curves, heading),
        },
    )


def _alpha(lr: float, rho: float) -> float:
    """EASGD's α = ηρ, which must be one."""
    alpha = float(domain.step_size(lr) * domain.penalty(rho))
    if alpha > 1:
        raise ValueError(
            f"lr={lr:g}, rho={rho:g}: EASGD's α = ηρ = {alpha:g} beside ADMM must be at most 1; lower one."
        )
    return alpha


def _sizes(name: str, matrix: Array, rounds: int) -> Array:
    """The largest |coordinate| after each cycle, from x = c = START and, for ADMM, λ = 0."""
    state = np.full(len(matrix), START)
    if name.startswith("ADMM"):
        state[0:-1:2] = 0  # λ, x, λ, x, ..., c
    return np.nan_to_num(np.abs(stability.trajectory(matrix, state, rounds)).max(axis=1), nan=np.inf, posinf=np.inf)


def moments_study(*, workers: Sequence[int], times: Sequence[float], start: float, sigma: float, points: int) -> Study:
    """The mean squared error of the center of synchronous EASGD over η × β, for some p and t: supplement, figure 5."""
    lr = (np.arange(_grid(points)) + 0.5) * 2 / points
    beta, errors = lr.copy(), {}
    grid_lr, grid_beta = np.meshgrid(lr, beta)
    for p in workers:
        for t in times:
            errors[p, t] = _mean_squared_error(t, grid_lr, grid_beta, p, start, sigma)
    lines = []
    for (p, t), error in errors.items():
        row, column = np.unravel_index(int(error.argmin()), error.shape)
        where = f"at η = {lr[column]:.3g}, β = {beta[row]:.3g}" if np.ptp(error) > EDGE * error.min() else "everywhere"
        lines.append(
            f"p = {p:,}, t = {_time(t)}: least mean squared error {error.min():.4g} {where}; above 1000 or divergent "
            f"on {_percent(error > 1e3)} of the map."
        )
    lines.append(
        f"p → ∞: p·MSE → {moments.center_mse_limit(lr=0.1, beta=0.9):.7f} σ²/h² at η = 0.1, β = 0.9, h = 1 as t → ∞."
    )
    table = {
        "workers": np.repeat([p for p, _ in errors], grid_lr.size),
        "t": np.repeat([t for _, t in errors], grid_lr.size),
        "lr": np.tile(grid_lr.ravel(), len(errors)),
        "beta": np.tile(grid_beta.ravel(), len(errors)),
        "mean_squared_error": np.concatenate([error.ravel() for error in errors.values()]),
    }
    heading = f"Synchronous EASGD on the noisy quadratic:  σ = {sigma:g},  h = 1,  start {start:g}"
    return Study(lines, {"moments": table}, {"moments": figures.error_maps(lr, beta, errors, heading)})


def _mean_squared_error(t: float, lr: Array, beta: Array, p: int, start: float, sigma: float) -> Array:
    """E (c_t - x*)²; infinite where unstable and t is."""
    error, alpha = np.full(lr.shape, np.inf), beta / p
    fine = alpha < stability.easgd_alpha_limit(lr, 1, True, p) if np.isinf(t) else np.ones(lr.shape, dtype=bool)
    given: dict[str, Any] = {"lr": lr[fine], "alpha": alpha[fine], "workers": p}
    error[fine] = moments.center_mean(t, **given, start=start) ** 2 + moments.center_variance(t, **given, sigma=sigma)
    return error


def averaging_study(*, workers: int, lr: Sequence[float], beta: float, steps: int, points: int) -> Study:
    """t·Var of the double average, which reaches the Cramér-Rao bound at constant η and β, and of the center alone."""
    p = domain.count(workers)
    longest = domain.clock(steps, start=2, endless=False).item()
    t = np.unique(np.geomspace(1, longest, _grid(points)).round())
    averages, centers, lines = {}, {}, []
    table: dict[str, Any] = {"t": t}
    for one in lr:
        given: dict[str, Any] = {"lr": one, "alpha": beta / p, "workers": p}
        moments.center_variance(np.inf, **given)  # refuses what is not stable
        label, unit = f"η = {one:g}", moments.cramer_rao_bound(workers=p)
        averages[label] = (t, t * moments.double_average_variance(t, **given) / unit)
        centers[label] = (t, t * moments.center_variance(t, **given) / unit)
        last, near = averages[label][1][-1], np.abs(averages[label][1] - 1) < 0.01
        reached = f"within 1 % from t = {t[near].min():,.0f}" if near.any() else "not within 1 % yet"
        lines.append(
            f"{label}, β = {beta:g}, p = {p}: t·Var of the double average is {last:.6f} σ²/(p h²) at t = {t[-1]:,.0f}, "
            f"{reached} (measured at {len(t)} points); of the center alone {centers[label][1][-1]:.4g}."
        )
        table |= {f"average_lr_{one:g}": averages[label][1], f"center_lr_{one:g}": centers[label][1]}
    heading = f"Double averaging reaches the best rate at constant step size  (β = {beta:g}, p = {p})"
    return Study(lines, {"averaging": table}, {"averaging": figures.averaging(averages, centers, heading)})


def _grid(points: int) -> int:
    if points < 2:
        raise ValueError(f"points={points}: a grid needs at least 2 points on each side; the default is 200.")
    return points


def _percent(where: Any) -> str:
    return f"{100 * np.mean(where):.1f} %"


def _time(t: float) -> str:
    return "∞" if np.isinf(t) else f"{t:,.0f}"


def _columns(named: Mapping[str, Array]) -> dict[str, Array]:
    """ "ADMM, p = 3" is the column admm_p3."""
    return {f"{name.split()[0].strip(',').lower()}_p{name.rpartition(' ')[2]}": one for name, one in named.items()}
