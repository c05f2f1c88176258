"""The pictures: maps of the spectral radius, ADMM's trajectory, maps of the mean squared error, double averaging."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from easgd_local.curves import BLUE, LOOKS, ORANGE, RED
from easgd_local.theory.domain import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DIVERGED, TINY = "#3d0008", "#000036"
LINES = (BLUE, ORANGE, "#2e8b57", "#7b4fa3", RED, "#5c4a3d", "#c08a00", "#1a1a1a")
Curves = Mapping[str, tuple[Array, Array]]  # label -> (x, y)


def stability_maps(u: Array, alpha: Array, radii: Mapping[str, Array], limits: Mapping[str, Array]) -> Figure:
    """EASGD's spectral radius over ηh and α, one panel for each kind of turns, each with its bound.

    u: (n,), alpha: (m,), a radius: (m, n), a limit: (n,).
    """
    with _figure(11.5, 5.6) as fig:
        axes = fig.subplots(1, len(radii), sharey=True, squeeze=False)[0]
        for ax, (name, radius) in zip(axes, radii.items(), strict=True):
            image = _radius_map(ax, u, alpha, radius, least=0, most=2)
            _edge(ax, u, alpha, radius, "spectral radius = 1, computed")
            ax.plot(u, limits[name], "--", color="black", linewidth=1.6, label="bound of α, by the formula")
            ax.set(title=name, xlabel="step size times curvature, ηh", ylim=(alpha[0], alpha[-1]))
            ax.set_xticks([0, 0.5, 1, 1.5, 2])
        axes[0].set_ylabel("moving rate α")
        axes[0].legend(loc="upper right")
        bar = fig.colorbar(image, ax=list(axes), extend="max", ticks=[0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2])
        bar.set_label("spectral radius of p visits; beyond 1 unstable")
    return fig


def admm_maps(eta: Array, rho: Array, radii: Mapping[str, Array], mark: tuple[float, float], note: str) -> Figure:
    """The spectral radius over η and ρ, one panel for each algorithm and p; `mark` is the trajectory's (η, ρ)."""
    least = min(0.999, *(float(radius.min()) for radius in radii.values()))
    most = max(1.001, *(float(radius.max()) for radius in radii.values()))
    ticks = [*np.linspace(least, 1, 5), *np.linspace(1, most, 5)[1:]]
    with _figure(4.1 * len(radii) + 1, 5) as fig:
        axes = fig.subplots(1, len(radii), sharey=True, squeeze=False)[0]
        for ax, (name, radius) in zip(axes, radii.items(), strict=True):
            image = _radius_map(ax, 1e3 * eta, rho, radius, least=least, most=most)
            _edge(ax, 1e3 * eta, rho, radius, "spectral radius = 1", width=2.2)
            if mark[0] <= eta[-1] and mark[1] <= rho[-1]:
                ax.plot(
                    1e3 * mark[0], mark[1], "*", color="gold", markeredgecolor="black", markersize=15, clip_on=False
                )
            ax.set(title=name, xlabel="step size η  (10⁻³, at curvature h = 1)")
            ax.set(xlim=(1e3 * eta[0], 1e3 * eta[-1]), ylim=(rho[0], rho[-1]))
        axes[0].set_ylabel("penalty ρ")
        bar = fig.colorbar(image, ax=list(axes), ticks=ticks, format="%.4f")
        bar.set_label("spectral radius of one cycle; red is unstable")
        fig.supxlabel(f"yellow line: spectral radius = 1      star: (η, ρ) of the trajectory      {note}", fontsize=11)
    return fig


def trajectories(curves: Curves, heading: str) -> Figure:
    """The largest |coordinate| of the state after each cycle, on a logarithmic scale."""
    with _figure(9.5, 5.6) as fig:
        ax = fig.subplots()
        for colour, (label, (x, y)) in zip(_colours(len(curves)), curves.items(), strict=True):
            ax.semilogy(x, y, color=colour, linewidth=2, label=label)
        ax.set(title=heading, xlabel="cycles (p turns each)", ylabel="largest |coordinate| of the state")
        ax.xaxis.set_major_formatter(_thousands())
        ax.margins(x=0)
        ax.legend(loc="upper left")
    return fig


def error_maps(lr: Array, beta: Array, errors: Mapping[tuple[int, float], Array], heading: str) -> Figure:
    """The center's mean squared error over η and β: p from top to bottom, t from left to right, one colour scale."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    workers, times = list(dict.fromkeys(p for p, _ in errors)), list(dict.fromkeys(t for _, t in errors))
    colours = colormaps["jet"].with_extremes(over=DIVERGED, under=TINY)
    with _figure(2.05 * len(times) + 2.4, 1.95 * len(workers) + 1.3) as fig:
        axes = fig.subplots(len(workers), len(times), sharex=True, sharey=True, squeeze=False)
        for (p, t), error in errors.items():
            ax, shown = axes[workers.index(p), times.index(t)], np.minimum(error, 1e300)  # infinite: beyond the scale
            image = ax.pcolormesh(lr, beta, shown, cmap=colours, norm=LogNorm(1e-3, 1e3), rasterized=True)
            ax.grid(False)
            ax.set(xticks=[0, 1, 2], yticks=[0, 1, 2], xlim=(0, 2), ylim=(0, 2))
        for ax, t in zip(axes[0], times, strict=True):
            ax.set_title(f"t = {'∞' if np.isinf(t) else f'{t:,.0f}'}")
        for ax, p in zip(axes[:, 0], workers, strict=True):
            ax.set_ylabel(f"p = {p:,}", fontweight="bold")
        fig.supxlabel("step size η  (at curvature h = 1)")
        fig.supylabel("center's moving rate β = pα")
        bar = fig.colorbar(image, ax=axes, extend="both", aspect=35)
        bar.set_label("mean squared error of the center (darkest red: divergent, or above 1000)", fontsize=12)
        fig.suptitle(heading, fontsize=13, fontweight="bold")
    return fig


def averaging(averages: Curves, centers: Curves, heading: str) -> Figure:
    """t·variance in units of the Cramér-Rao bound σ²/(p h²): averages solid, centers dashed, the bound a line."""
    with _figure(9.5, 6) as fig:
        ax = fig.subplots()
        for colour, (label, (t, y)) in zip(_colours(len(averages)), averages.items(), strict=True):
            ax.loglog(t, _positive(y), color=colour, linewidth=2, label=f"average of c₀ … cₜ,  {label}")
        for colour, (label, (t, y)) in zip(_colours(len(centers)), centers.items(), strict=True):
            ax.loglog(t, _positive(y), color=colour, linestyle="--", linewidth=1.4, label=f"center cₜ alone,  {label}")
        ax.axhline(1, color="black", linewidth=1.4, label="Cramér-Rao bound")
        ax.set(title=heading, xlabel="steps t", ylabel="t · variance,  in units of σ²/(p h²)")
        ax.set_ylim(bottom=1e-2)
        ax.margins(x=0)
        ax.legend(loc="upper left")
    return fig


@contextlib.contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(LOOKS):
        yield Figure(figsize=(width, height), layout="constrained")


def _radius_map(ax: Axes, x: Array, y: Array, radius: Array, *, least: float, most: float) -> Any:
    from matplotlib.colors import TwoSlopeNorm

    ax.grid(False)
    norm = TwoSlopeNorm(1, vmin=least, vmax=most)
    return ax.pcolormesh(x, y, radius, cmap="RdBu_r", norm=norm, shading="nearest", rasterized=True)


def _edge(ax: Axes, x: Array, y: Array, radius: Array, label: str, *, width: float = 4) -> None:
    """The line at which the radius crosses 1. Rounding aside: along an axis it may be 1 without crossing it."""
    if radius.min() < 1 < radius.max() - 1e-9:
        ax.contour(
            x, y, np.where(abs(radius - 1) < 1e-9, 1 - 1e-9, radius), levels=[1], colors="gold", linewidths=width
        )
        ax.plot([], [], color="gold", linewidth=width, label=label)


def _positive(y: Array) -> Array:
    """A gap where a logarithmic scale has no place."""
    return np.where(y > 0, y, np.nan)


def _colours(number: int) -> Sequence[str]:
    return [LINES[k % len(LINES)] for k in range(number)]


def _thousands() -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda x, _: f"{x:,.10g}")
