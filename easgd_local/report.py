"""What a run folder tells: `curves.png` and `report.md`, from config.json, metrics.jsonl and summary.json.

Also how numbers are put into words, for the live view as well: each with its unit, NaN as NaN, missing as not known.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easgd_local import metrics
from easgd_local.metrics import Event

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNKNOWN = "not known"
BLUE, ORANGE, GREY, RED = "#1f5fa8", "#d9601a", "#8a8f98", "#c0222b"
LOOKS = {"font.size": 11, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
WORKER_HEAD = ("worker", "state", "steps", "exchanges", "samples/s", "exchange (s)", "waiting (s)", "waited for")


def write(folder: str | Path) -> None:
    """Writes `report.md` and `curves.png` into the run folder; copes with a run that was cut short at any moment."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder; a report is made of a run folder, the one given to --out.")
    config, summary, events = _object(folder / "config.json"), _object(folder / "summary.json"), metrics.read(folder)
    (folder / "report.md").write_text(markdown(config, summary, events), encoding="utf-8")
    figure(config, summary, events).savefig(folder / "curves.png", dpi=140)


# ---- numbers in words ----------------------------------------------------------------------------------------------


def loss_text(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def percent_text(fraction: float | None) -> str:
    return UNKNOWN if fraction is None else f"{100 * fraction:.2f} %" if math.isfinite(fraction) else "NaN"


def count_text(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if value == 0 or abs(value) >= 100 else f"{value:.3g}" if math.isfinite(value) else "NaN"


def seconds_text(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.0f} s" if value >= 1000 else f"{value:.3g} s"


def clock_text(seconds: float) -> str:
    """Hours, minutes, seconds: 0:01:05."""
    whole = max(0, int(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def title(facts: dict[str, Any]) -> str:
    """The run in one line: rule, model, data, p, τ; what is not known is left out."""
    work = " on ".join(str(facts[name]) for name in ("model", "data") if facts.get(name) is not None)
    named = (("p", "workers"), ("τ", "tau"))
    letters = [f"{letter} = {facts[name]}" for letter, name in named if facts.get(name) is not None]
    return ",  ".join(part for part in (str(facts.get("rule") or "run"), work, *letters) if part)


def best(events: Iterable[Event]) -> Event | None:
    """The center event with the least test error; the earliest of equals."""
    tested = [e for e in events if e["kind"] == "center" and _is_finite(e.get("test_error"))]
    return min(tested, key=lambda e: e["test_error"], default=None)


def summary_rows(summary: dict[str, Any], events: Sequence[Event] = ()) -> list[tuple[str, str]]:
    """(what, value with unit) of a finished run."""
    get = summary.get
    lowest = best(events)
    rows = [
        ("status", str(get("status") or UNKNOWN)),
        ("worker steps", count_text(get("steps"))),
        ("exchanges", count_text(get("exchanges"))),
        ("center training loss", loss_text(get("train_loss"))),
        ("center test loss", loss_text(get("test_loss"))),
        ("center test error", percent_text(get("test_error"))),
        ("training time", seconds_text(get("seconds"))),
        ("evaluation time, not counted above", seconds_text(get("evaluate_s"))),
        ("samples", count_text(get("samples"))),
        ("samples/s, all workers together", count_text(get("samples_per_s"))),
        ("exchange, summed over the workers", _share_text(get("exchange_s"), summary)),
        ("waiting, summed over the workers", _share_text(get("wait_s"), summary)),
        ("parameters", count_text(get("parameters"))),
    ]
    if lowest is not None:
        at = f"at step {count_text(lowest['t'])}, {seconds_text(lowest['seconds'])}"
        rows.insert(6, ("best center test error", f"{percent_text(lowest['test_error'])} {at}"))
    return rows


def worker_rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row a worker, under WORKER_HEAD."""
    return [
        (
            str(r.get("rank", "?")),
            str(r.get("state") or UNKNOWN),
            *(count_text(r.get(name)) for name in ("steps", "exchanges", "samples_per_s")),
            *(_fixed(r.get(name)) for name in ("exchange_s", "wait_s")),
            waited_text(r.get("waited_for_s")),
        )
        for r in summary.get("worker_reports") or []
    ]


def waited_text(waited_for_s: Sequence[float | None] | None) -> str:
    """Whom a worker waited for longest, at most three: "3 (1.20 s), 0 (0.45 s)"."""
    if waited_for_s is None:
        return UNKNOWN
    longest = sorted(((s, rank) for rank, s in enumerate(waited_for_s) if s and s >= 0.005), key=lambda pair: -pair[0])
    return ", ".join(f"{rank} ({s:.2f} s)" for s, rank in longest[:3]) or "nobody"


def _share_text(spent_s: float | None, summary: dict[str, Any]) -> str:
    workers, seconds = summary.get("workers"), summary.get("seconds")
    if spent_s is None or not workers or not seconds:
        return seconds_text(spent_s)
    return f"{seconds_text(spent_s)}, {100 * spent_s / (workers * seconds):.1f} % of their time"


def _fixed(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.2f}"


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_nan(value: Any) -> bool:
    return value is not None and not _is_finite(value)


# ---- report.md -----------------------------------------------------------------------------------------------------


def markdown(config: dict[str, Any], summary: dict[str, Any], events: Sequence[Event]) -> str:
    """The report: numbers first, then the picture, then everything needed to judge and to repeat them."""
    facts = _facts(config, summary, events)
    deaths = summary.get("failures") or [e for e in events if e["kind"] == "death"]
    failures = [[str(death.get(name, UNKNOWN)) for name in ("rank", "t", "cause")] for death in deaths]
    warnings = summary.get("warnings") or [e.get("message", "") for e in events if e["kind"] == "warning"]
    places = (summary.get("vectors") or {}).items()
    vectors = [(place, name, count_text(size)) for place, sizes in places for name, size in sizes.items()]
    digest = f"`{summary.get('center_sha256') or UNKNOWN}`"
    parts = [
        f"# {title(facts)}",
        _table(("what", "value"), [*summary_rows(facts, events), ("center_sha256", digest)]),
        "![center loss and test error against seconds and worker steps](curves.png)",
        "The losses of the center are measured on the center itself, by evaluation; the losses of the workers are "
        "means over their own minibatches, at their own copies of the model.",
        "## Workers",
        _table(WORKER_HEAD, worker_rows(summary)),
        "## Vectors",
        _table(("place", "name", "size (bytes)"), vectors),
        "## Failures",
        _table(("worker", "step", "cause"), failures),
        "## Warnings",
        "\n".join(f"- {_cell(w)}" for w in warnings) or "None.",
    ]
    for name in ("hardware", "versions", "config"):
        parts += [f"## {name.capitalize()}", _table(("what", "value"), _flat(config.get(name) or {}))]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines) if rows else "None."


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").replace("<", "&lt;").split())


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return rows


def _object(path: Path) -> dict[str, Any]:
    return metrics.restored(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _facts(config: dict[str, Any], summary: dict[str, Any], events: Sequence[Event]) -> dict[str, Any]:
    """What is known of the run; the summary's word counts most. A run cut short has its last center for a result."""
    flags = {name.split(".")[-1]: value for name, value in _flat(config.get("config") or {}) if value is not None}
    named: dict[str, Any] = {name: flags[name] for name in ("rule", "model", "data", "workers", "tau") if name in flags}
    started = [e for e in events if e["kind"] == "start"][-1:]
    measured = ("train_loss", "test_loss", "test_error", "seconds", "evaluate_s")
    centers = [{name: e.get(name) for name in measured} for e in events if e["kind"] == "center"][-1:]
    sources: list[dict[str, Any]] = [named, *started, *centers, summary]
    facts = {name: value for source in sources for name, value in source.items() if value is not None}
    return facts if summary else {**facts, "steps": max((e["t"] for e in events), default=None)}


# ---- curves.png ----------------------------------------------------------------------------------------------------


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
        facts = _facts(config, summary, events)
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
    bad = sorted({e[x] for e in events for name in ("train_loss", "test_loss", "loss") if _is_nan(e.get(name))})
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
    points = [(e[x], factor * e[name] if _is_finite(e[name]) else math.nan) for e in events if e.get(name) is not None]
    if any(_is_finite(y) for _, y in points):
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
