"""Draws the papers' figures from the rows that `run.py` has left.

    python bench/paper/draw.py                 every experiment that has rows, into docs/pictures/paper-NAME.png
    python bench/paper/draw.py cifar-tau --out figures
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from experiments import EXPERIMENTS, Experiment, Panel
from rows import Runs, read

from easgd_local.compare.measuring import Record
from easgd_local.curves import LOOKS
from easgd_local.simulate.figures import LINES, thousands

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "bench" / "results" / "paper"
PICTURES = ROOT / "docs" / "pictures"
MEASURES = {"train_loss": "training loss", "test_loss": "test loss", "test_error": "test error (%)"}
AGAINST = {"t": "steps of each worker", "samples": "samples of all workers"}
DASHES = ("-", "--")


def figure(experiment: Experiment, runs: Runs) -> Figure:
    """The center's training loss, test loss and test error, a column for each panel; lines: median over the seeds;
    bands: least to largest; a cross where a run has diverged."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    looks = _looks(experiment)
    with rc_context(LOOKS):
        columns = len(experiment.panels)
        if columns == 1:
            fig = Figure(figsize=(15, 5.2), layout="constrained")
            axes = fig.subplots(1, len(MEASURES), squeeze=False).T
        else:
            fig = Figure(figsize=(3.2 + 3.3 * columns, 9.6), layout="constrained")
            axes = fig.subplots(len(MEASURES), columns, sharex="col", sharey="row", squeeze=False)
        for panel, column in zip(experiment.panels, axes.T, strict=True):
            _draw_panel(column, experiment, panel, runs, looks)
        for ax, text in zip(axes[:, 0], MEASURES.values(), strict=True):
            ax.set_ylabel(text)
        for row, name in zip(axes, MEASURES, strict=True):
            _frame(row[0], name, runs)
        named = {
            text: line for ax in axes[0] for line, text in zip(*ax.get_legend_handles_labels(), strict=True)
        }  # fmt: skip
        count = min(7, max(1, len(named)))
        fig.legend(named.values(), named.keys(), loc="outside lower center", ncol=count, frameon=False)
        fig.suptitle(heading(experiment, runs), fontsize=13, fontweight="bold")
    return fig


def heading(experiment: Experiment, runs: Runs) -> str:
    """What is shown, on what, at which scale."""
    settings, seeds = runs.about["settings"], {one["seed"] for one in runs.compared}
    scale = "the full length" if runs.about["scale"] == 1 else f"{runs.about['scale']:g} of the full length"
    return (
        f"{experiment.source}\n{settings['model']} on {settings['data']}, {scale}, batches of "
        f"{settings['batch_size']}, n = {len(seeds)}"
    )


def short(experiment: Experiment, label: str) -> str:
    """The entry's name in the legend: without what the panel's title says, and without step sizes."""
    words = label.split()
    told = [word for word in words[1:] if word.partition("=")[0] in experiment.told]
    return " ".join([words[0], *told])


def _looks(experiment: Experiment) -> dict[str, tuple[str, str]]:
    """Colour and dash of each name in the legend, the same in all panels."""
    names = list(dict.fromkeys(short(experiment, label) for label in experiment.labels))
    return {name: (LINES[k % len(LINES)], DASHES[k // len(LINES) % len(DASHES)]) for k, name in enumerate(names)}


def _draw_panel(
    column: Sequence[Axes], experiment: Experiment, panel: Panel, runs: Runs, looks: dict[str, tuple[str, str]]
) -> None:
    column[0].set_title(panel.title)
    for label in panel.labels:
        own = [one for one in runs.compared if one["label"] == label and one["curve"]]
        name = short(experiment, label)
        for ax, measure in zip(column, MEASURES, strict=True):
            _draw(ax, experiment.against, measure, own, looks[name], name)
    for ax in column if len(experiment.panels) == 1 else column[-1:]:
        ax.set_xlabel(AGAINST[experiment.against])
        ax.locator_params(axis="x", nbins=5)
        ax.xaxis.set_major_formatter(thousands())


def _draw(ax: Axes, x: str, measure: str, runs: Sequence[Record], look: tuple[str, str], name: str) -> None:
    if not runs:
        return
    count = max(len(one["curve"]) for one in runs)
    points = [[one["curve"][k] for one in runs if k < len(one["curve"])] for k in range(count)]
    at = [float(np.median([point[x] for point in row])) for row in points]
    factor = 100 if measure == "test_error" else 1
    values = [factor * np.array([point[measure] for point in row]) for row in points]
    shown = [np.where(np.isfinite(one), one, np.nan) for one in values]
    middle, least, most = ([float(how(one)) for one in shown] for how in (np.median, np.min, np.max))
    colour, dash = look
    ax.plot(at, middle, color=colour, linestyle=dash, linewidth=1.7, label=name)
    ax.fill_between(at, least, most, color=colour, alpha=0.15, linewidth=0)
    last = max((k for k in range(count) if np.isfinite(middle[k])), default=None)
    if last is not None and any(one["status"] != "done" for one in runs):
        ax.plot(at[last], middle[last], color=colour, marker="X", markersize=9)


def _frame(ax: Axes, measure: str, runs: Runs) -> None:
    """The heights of a row of plots: what lies far above the start says no more than that it does."""
    factor = 100 if measure == "test_error" else 1
    values = [factor * point[measure] for one in runs.compared for point in one["curve"] if np.isfinite(point[measure])]
    starts = [factor * one["curve"][0][measure] for one in runs.compared if one["curve"]]
    start = max((one for one in starts if np.isfinite(one)), default=None)
    if start is not None:
        low, high = min(values), min(max(values), 1.1 * start)
        ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the papers' figures from the rows that run.py has left.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(EXPERIMENTS)}; default those with rows")
    parser.add_argument("--rows", type=Path, default=ROWS, help="folder of the rows (default bench/results/paper)")
    parser.add_argument("--out", type=Path, default=PICTURES, help="folder of the pictures (default docs/pictures)")
    given = parser.parse_args()
    drawn = 0
    for name in given.names or EXPERIMENTS:
        if name not in EXPERIMENTS:
            raise SystemExit(f"draw.py: error: {name}: no such experiment; choose of {', '.join(EXPERIMENTS)}.")
        runs = read(given.rows, name)
        if runs is not None:
            given.out.mkdir(parents=True, exist_ok=True)
            figure(EXPERIMENTS[name], runs).savefig(given.out / f"paper-{name}.png", dpi=100)
            print(given.out / f"paper-{name}.png")
            drawn += 1
        elif given.names:
            raise SystemExit(f"draw.py: error: {name}: there are no rows in {given.rows}; run run.py {name} first.")
    if not drawn:
        raise SystemExit(f"draw.py: error: there are no rows in {given.rows}; run run.py first.")


if __name__ == "__main__":
    main()
