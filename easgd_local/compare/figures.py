"""The picture of a comparison: test error against training seconds and against samples, a colour for each entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from easgd_local.compare.measuring import Record
from easgd_local.curves import LOOKS
from easgd_local.simulate.figures import LINES, decades, thousands

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES = ("-", "--", ":")
FEW = 40  # points that are marked one by one
FAR = 3  # times the median length, beyond which a picture is cut


def figure(records: Sequence[Record], target: float, heading: str) -> Figure:
    """Lines: at each evaluation the median over the seeds; bands: least to largest."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(one["label"] for one in records))
    with rc_context(LOOKS):
        fig = Figure(figsize=(12.5, 6.2), layout="constrained")
        axes = fig.subplots(1, 2, sharey=True)
        against = (("seconds", "training time (s), evaluation and start-up not counted"),
                   ("samples", "training samples of all workers together"))  # fmt: skip
        for ax, (x, text) in zip(axes, against, strict=True):
            for number, label in enumerate(labels):
                runs = [one for one in records if one["label"] == label and one["curve"]]
                _draw(ax, x, runs, LINES[number % len(LINES)], DASHES[number // len(LINES) % len(DASHES)])
            ax.axhline(100 * target, color="black", linestyle=(0, (1, 3)), linewidth=1.2, label="target")
            ax.set(xlabel=text, yscale="log")
            _cut(ax, x, records)
            ax.xaxis.set_major_formatter(thousands())
            decades(ax.yaxis)
        axes[0].set_ylabel("test error (%)")
        named = dict(zip(*axes[0].get_legend_handles_labels()[::-1], strict=True))
        fig.legend(named.values(), named.keys(), loc="outside lower center", ncol=min(4, len(named)), frameon=False)
        fig.suptitle(heading, fontsize=14, fontweight="bold")
    return fig


def _cut(ax: Axes, x: str, records: Sequence[Record]) -> None:
    """One entry that takes far longer than the others must not press them all to the edge."""
    ends = sorted(one["curve"][-1][x] for one in records if one["curve"])
    usual = ends[len(ends) // 2] if ends else 0
    if ends and ends[-1] > FAR * usual > 0:
        ax.set_xlim(-0.03 * FAR * usual, FAR * usual)
        ax.set_xlabel(f"{ax.get_xlabel()}\n(the longest goes on to {ends[-1]:,.3g})")


def _draw(ax: Axes, x: str, runs: Sequence[Record], colour: str, dash: str) -> None:
    """One entry: evaluations of equal number belong together; a run that ended early counts as far as it went."""
    if not runs:
        return
    count = max(len(one["curve"]) for one in runs)
    columns = [[one["curve"][k] for one in runs if k < len(one["curve"])] for k in range(count)]
    at = [float(np.median([point[x] for point in column])) for column in columns]
    errors = [np.array([100 * point["test_error"] for point in column]) for column in columns]
    shown = [np.where(one > 0, one, np.nan) for one in errors]  # none at all has no place on this axis
    middle, least, most = ([float(how(one)) for one in shown] for how in (np.median, np.min, np.max))
    bad = sum(one["status"] != "done" for one in runs)
    label = runs[0]["label"] + (f" ({bad} of {len(runs)} not done)" if bad else "")
    marker = "o" if count <= FEW else None
    ax.plot(at, middle, color=colour, linestyle=dash, linewidth=1.8, marker=marker, markersize=3, label=label)
    ax.fill_between(at, least, most, color=colour, alpha=0.15, linewidth=0)
