"""`curves.png`: losses and test error of the center against seconds and against steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from easgd_local.metrics import Event
from easgd_local.wording import best, count_text, facts_of, is_finite, is_nan, percent_text, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, RED = "#1f5fa8", "#d9601a", "#8a8f98", "#c0222b"
LOOKS = {"font.size": 11, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}


def figure(config: dict[str, Any], summary: dict[str, Any], events: Sequence[Event]) -> Figure:
    """Loss above, test error below; against seconds on the left, against worker steps on the right."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(LOOKS):
        fig = Figure(figsize=(11.5, 8), layout="constrained")
        axes = fig.subplots(2, 2, sharex="col", sharey="row")
        against = (("seconds", "training time (s), evaluation not counted"), ("t", "worker steps"))
        for column, (x, label) in enumerate(against):
            _draw_losses(axes[0, column], x, events)
            _draw_error(axes[1, column], x, events)
            for row in (0, 1):
                _draw_deaths(axes[row, column], x, events)
            axes[1, column].set_xlabel(label)
        axes[0, 0].set_ylabel("loss")
        axes[1, 0].set_ylabel("center test error (%)")
        facts = facts_of(config, summary, events)
        status = facts.get("status", "no summary: still running, or killed")
        _finish(fig, axes, title(facts) + ("" if status == "done" else f"  ({status})"))
    return fig


def _draw_losses(ax: Axes, x: str, events: Sequence[Event]) -> None:
    centers = [e for e in events if e["kind"] == "center"]
    _line(ax, centers, x, "train_loss", color=BLUE, label="center training loss")
    _line(ax, centers, x, "test_loss", color=ORANGE, label="center test loss")
    ranks = sorted({e["rank"] for e in events if e["kind"] == "worker"})
    for rank in ranks:
        own = [e for e in events if e["kind"] == "worker" and e["rank"] == rank]
        label = "worker loss, each on its own minibatches" if rank == ranks[0] else None
        _line(ax, own, x, "loss", color=GREY, linewidth=0.8, alpha=0.45, zorder=1, label=label)  # behind the center
    _scale(ax, [line.get_ydata() for line in ax.lines], "{:g}")
    bad = sorted({e[x] for e in events for name in ("train_loss", "test_loss", "loss") if is_nan(e.get(name))})
    if bad:
        top = ax.get_xaxis_transform()  # x in data, y in parts of the panel
        ax.plot(
            bad, [0.97] * len(bad), "|", color=RED, markersize=10, transform=top, label="a loss is not finite (NaN)"
        )


def _draw_error(ax: Axes, x: str, events: Sequence[Event]) -> None:
    centers = [e for e in events if e["kind"] == "center"]
    _line(ax, centers, x, "test_error", color=ORANGE, factor=100, label="center test error")
    lowest = best(events)
    if lowest is not None:
        label = f"best: {percent_text(lowest['test_error'])} at step {count_text(lowest['t'])}"
        star: dict[str, Any] = {"color": ORANGE, "markersize": 13, "markeredgecolor": "black", "zorder": 5}
        ax.plot(lowest[x], 100 * lowest["test_error"], "*", label=label, **star)
    _scale(ax, [line.get_ydata() for line in ax.lines], "{:g}")


def _draw_deaths(ax: Axes, x: str, events: Sequence[Event]) -> None:
    for number, event in enumerate(e for e in events if e["kind"] == "death"):
        ax.axvline(event[x], color=RED, linestyle=":", linewidth=1.2, label=None if number else "a worker died")


def _line(ax: Axes, events: Sequence[Event], x: str, name: str, *, factor: float = 1, **style: Any) -> None:
    """A curve with gaps where the value is not finite; points marked when there are few, so that one alone shows."""
    points = [(e[x], factor * e[name] if is_finite(e[name]) else math.nan) for e in events if e.get(name) is not None]
    if any(is_finite(y) for _, y in points):
        marker = "o" if len(points) <= 40 else None
        size = 2.5 * style.setdefault("linewidth", 2) ** 0.7
        ax.plot(*zip(*points, strict=True), marker=marker, markersize=size, **style)


def _scale(ax: Axes, columns: Iterable[Any], form: str) -> None:
    """Logarithmic when the values are positive and span more than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = [y for column in columns for y in column if math.isfinite(y)]
    positive = [y for y in values if y > 0]
    decades = math.log10(max(positive) / min(positive)) if positive and min(values) >= 0 else 0
    if decades > 1:
        ax.set_yscale("log", nonpositive="mask")
    if 1 < decades <= 4:  # room for more than the powers of ten
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_formatter(NullFormatter())
    if decades <= 4:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: form.format(y)))


def _finish(fig: Figure, axes: Any, heading: str) -> None:
    """The title, one legend for all panels, and a word in each panel that has nothing to show."""
    from matplotlib.ticker import FuncFormatter

    named: dict[str, Any] = {}
    for ax in axes.flat:
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
        named.update({label: line for line, label in zip(*ax.get_legend_handles_labels(), strict=True)})
        if not ax.lines:
            ax.text(0.5, 0.5, "nothing was measured", transform=ax.transAxes, ha="center", color=GREY, fontsize=14)
            ax.set_yticks([])
    if named:
        fig.legend(named.values(), named.keys(), loc="outside lower center", ncol=3, frameon=False)
    else:
        for ax in axes[1]:
            ax.set_xticks([])
    fig.suptitle(heading, fontsize=15, fontweight="bold")
