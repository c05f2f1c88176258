"""The pictures of simulations: error against time and gradients, staleness, shares; and speed over p × τ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from easgd_local.curves import BLUE, GREY, LOOKS, ORANGE, RED
from easgd_local.simulate.study import Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = (BLUE, ORANGE, "#2e8b57", "#7b4fa3", RED, "#5c4a3d", "#c08a00", "#1a1a1a")
SHARES = {"computing": BLUE, "exchange": ORANGE, "waiting": GREY, "memory in use": "#2e8b57"}
MOST = len(LINES)
ROUND_NUMBERS = [one * 10**power for power in range(1, 9) for one in (1, 2, 5)]


def runs(found: Sequence[Cell], measure: str, target: float) -> Figure:
    """Error against virtual seconds and gradients, staleness, and where the time went; a colour for each simulation."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    shown = telling(found)
    with rc_context(LOOKS):
        fig = Figure(figsize=(12.5, 9.5), layout="constrained")
        (by_time, by_gradients), (stale, shares) = fig.subplots(2, 2)
        for colour, cell in zip(LINES, shown, strict=False):
            curve = cell.best.curve
            for ax, x in ((by_time, "seconds"), (by_gradients, "gradients")):
                ax.plot(curve[x], np.where(curve["error"] > 0, curve["error"], np.nan), color=colour, linewidth=1.8)
            _staleness(stale, cell, colour)
        start = float(shown[0].best.curve["error"][0])
        for ax, label in ((by_time, "virtual time (s)"), (by_gradients, "gradients of all workers together")):
            ax.axhline(target * start, color="black", linestyle=":", linewidth=1.2)
            ax.set(xlabel=label, ylabel=f"{measure} of the center", yscale="log", ylim=_height(shown, target))
            ax.xaxis.set_major_formatter(thousands())
            decades(ax.yaxis)
        stale.set(xlabel="staleness (updates of a block by others between two visits)", ylabel="share of visits (%)")
        stale.set(xlim=(-0.5, None), ylim=(0, None))
        most = max(max(cell.best.staleness) for cell in shown)
        if most > 50:
            stale.set_xscale("symlog", linthresh=10)
            stale.set_xticks([0, *(one for one in ROUND_NUMBERS if 10 <= one <= most)])
            stale.xaxis.set_major_formatter(thousands())
        _shares(shares, shown)
        handles: dict[str, Any] = {
            _label(cell): line for cell, line in zip(shown, by_time.lines, strict=False)
        } | {f"{100 * target:g} % of the start": by_time.lines[-1]}  # fmt: skip
        fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncol=3, frameon=False)
        more = f"  ({len(shown)} of {len(found)} shown)" if len(shown) < len(found) else ""
        fig.suptitle(f"Simulated on a virtual clock{more}", fontsize=15, fontweight="bold")
    return fig


def telling(found: Sequence[Cell]) -> list[Cell]:
    """All simulations if they are few, else for each rule its fastest and, at the same τ, that with fewest workers."""
    if len(found) <= MOST:
        return list(found)
    chosen = []
    for rule in dict.fromkeys(cell.rule for cell in found):
        own = [cell for cell in found if cell.rule == rule]
        fastest = min(own, key=lambda cell: cell.seconds)
        chosen += [cell for cell in own if cell is fastest or (cell.tau, cell.workers) == (fastest.tau, own[0].workers)]
    return chosen[:MOST]


def sweep(table: Mapping[str, Sequence[Sequence[Cell]]], target: float) -> Figure:
    """Time to the target over p and τ, one panel for each rule: `table[rule]` has a row of cells for each τ."""
    from matplotlib import rc_context
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    finite = [cell.seconds for rows in table.values() for row in rows for cell in row if math.isfinite(cell.seconds)]
    norm = LogNorm(min(finite, default=1), max([*finite, 3 * min(finite, default=1)]))
    height = max(len(rows) for rows in table.values())
    width = max(len(row) for rows in table.values() for row in rows)
    with rc_context(LOOKS):
        fig = Figure(figsize=(max(6.0, 2.2 + 0.95 * width * len(table)), 2.6 + 0.8 * height), layout="constrained")
        axes = fig.subplots(1, len(table), squeeze=False)[0]
        for ax, (rule, rows) in zip(axes, table.items(), strict=True):
            seconds = np.array([[cell.seconds for cell in row] for row in rows])
            shown = np.ma.masked_invalid(seconds)
            image = ax.imshow(shown, norm=norm, cmap="viridis_r", aspect="auto")
            ax.set_facecolor("#e4e4e4")
            ax.grid(False)
            ax.set(title=rule, xlabel="workers p", ylabel="period τ (steps)")
            ax.set_xticks(range(len(rows[0])), [f"{cell.workers:,}" for cell in rows[0]])
            ax.set_yticks(range(len(rows)), [f"{row[0].tau}" for row in rows])
            for y, row in enumerate(rows):
                for x, cell in enumerate(row):
                    _write(ax, x, y, cell, row[0], norm)
        bar = fig.colorbar(image, ax=list(axes), extend="neither")
        bar.set_label("virtual seconds to the target")
        decades(bar.ax.yaxis)
        heading = f"Time to {100 * target:g} % of the error at the start\n×: how much faster than the first column"
        fig.suptitle(heading, fontsize=12, fontweight="bold")
    return fig


def _write(ax: Axes, x: int, y: int, cell: Cell, first: Cell, norm: Any) -> None:
    """The cell's number, and its speed-up over the fewest workers."""
    if not math.isfinite(cell.seconds):
        ax.text(x, y, cell.fate.replace(" ", "\n"), ha="center", va="center", fontsize=9, color=RED)
        return
    faster = first.seconds / cell.seconds if cell is not first and math.isfinite(first.seconds) else None
    shade = norm(cell.seconds)
    text = f"{cell.seconds:,.3g} s" + (f"\n{faster:.2g}×" if faster else "")
    ax.text(x, y, text, ha="center", va="center", fontsize=9, color="white" if shade > 0.5 else "black")


def _staleness(ax: Axes, cell: Cell, colour: str) -> None:
    values, visits = np.array(list(cell.best.staleness)), np.array(list(cell.best.staleness.values()), float)
    ax.vlines(values, 0, 100 * visits / visits.sum(), color=colour, linewidth=1.2, alpha=0.6)
    ax.plot(values, 100 * visits / visits.sum(), "o", color=colour, markersize=4, alpha=0.9)


def _shares(ax: Axes, shown: Sequence[Cell]) -> None:
    """Four bars for each simulation: of the workers' time, and of the memory's bandwidth."""
    keys = ("compute", "exchange", "wait")
    for place, (name, colour) in enumerate(SHARES.items()):
        heights = [100 * (it.best.shares[keys[place]] if place < 3 else it.best.memory_share) for it in shown]
        at = np.arange(len(shown)) + 0.2 * (place - 1.5)
        ax.bar(at, heights, 0.2, color=colour, label=name if place < 3 else "center's memory bandwidth in use")
    ax.set_xticks(range(len(shown)), [f"{it.rule}\np = {it.workers:,}\nτ = {it.tau}" for it in shown], fontsize=9)
    ax.set(ylabel="share (%)", ylim=(0, 105))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncol=2, frameon=False, fontsize=9)


def _label(cell: Cell) -> str:
    return f"{cell.rule}, p = {cell.workers:,}, τ = {cell.tau}, η = {cell.best.scenario.rule.lr:.3g}"


def _height(shown: Sequence[Cell], target: float) -> tuple[float, float]:
    """From below the least error to a little above the start: what blows up leaves the picture."""
    start = float(shown[0].best.curve["error"][0])
    errors = np.concatenate([cell.best.curve["error"] for cell in shown])
    least = min(float(np.min(errors[errors > 0], initial=start)), target * start)
    return least / 1.5, 2 * start


def decades(axis: Any) -> None:
    """Plain numbers at 1, 2 and 5 times the powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(thousands())
    axis.set_minor_formatter(NullFormatter())


def thousands() -> Any:
    """Numbers with commas between thousands."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda x, _: f"{x:,.10g}")
