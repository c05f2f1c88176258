"""How the numbers of a run are put into words, for the report and the live view alike.

Each number has its unit; NaN is shown as NaN, and what is missing as not known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from easgd_local.metrics import Event

UNKNOWN = "not known"
# What every evaluation of the center tells, or every event.
CENTER = {"kind", "t", "seconds", "round", "evaluate_s", "train_loss", "test_loss", "test_error", "nonfinite"}


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


NAMED = ("rule", "model", "data", "workers", "tau", "lr", "momentum")


def title(facts: dict[str, Any]) -> str:
    """The run in one line: rule, model, data, p, τ, η, δ; what is not known is left out."""
    work = " on ".join(str(facts[name]) for name in ("model", "data") if facts.get(name) is not None)
    named = (("p", "workers"), ("τ", "tau"), ("η", "lr"), ("δ", "momentum"))
    letters = [f"{letter} = {facts[name]:g}" for letter, name in named if facts.get(name) is not None]
    return ",  ".join(part for part in (str(facts.get("rule") or "run"), work, *letters) if part)


def best(events: Iterable[Event]) -> Event | None:
    """The center event with the least test error; the earliest of equals."""
    tested = [e for e in events if e["kind"] == "center" and is_finite(e.get("test_error"))]
    return min(tested, key=lambda e: e["test_error"], default=None)


def further_scores(event: Event) -> dict[str, float]:
    """What an evaluation of the user's own has measured beside the losses and the test error."""
    return {name: value for name, value in event.items() if name not in CENTER and isinstance(value, int | float)}


def summary_rows(summary: dict[str, Any], events: Sequence[Event] = ()) -> list[tuple[str, str]]:
    """(what, value with unit) of a finished run."""
    get = summary.get
    lowest = best(events)
    evaluated, steps = get("evaluated_at"), get("steps")
    at = "" if evaluated is None or evaluated == steps else f" at step {count_text(evaluated)}"
    scores = [
        ("center training loss", loss_text(get("train_loss")) + at, "train_loss"),
        ("center test loss", loss_text(get("test_loss")) + at, "test_loss"),
        ("center test error", percent_text(get("test_error")) + at, "test_error"),
    ]
    measured = set(get("scores") or [name for *_, name in scores])  # a user's own evaluation may measure less, or more
    rows = [
        ("status", str(get("status") or UNKNOWN)),
        ("worker steps", count_text(get("steps"))),
        ("exchanges, all workers together", count_text(get("exchanges"))),
        *((what, value) for what, value, name in scores if name in measured),
        *((f"center {name}", loss_text(value) + at) for name, value in further_scores(get("scores") or {}).items()),
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
        place = [what for what, _ in rows].index("training time")
        rows.insert(place, ("best center test error", f"{percent_text(lowest['test_error'])} {at}"))
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
            count_text(r.get("staleness")),
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


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def is_nan(value: Any) -> bool:
    return value is not None and not is_finite(value)


def facts_of(config: dict[str, Any], summary: dict[str, Any], events: Sequence[Event]) -> dict[str, Any]:
    """What is known of the run; the summary's word counts most. A run cut short has its last center for a result."""
    flags = {name.split(".")[-1]: value for name, value in flattened(config.get("config") or {}) if value is not None}
    named: dict[str, Any] = {name: flags[name] for name in NAMED if name in flags}
    started = [e for e in events if e["kind"] == "start"][-1:]
    measured = ("train_loss", "test_loss", "test_error", "seconds", "evaluate_s")
    centers = [{name: e.get(name) for name in measured} for e in events if e["kind"] == "center"][-1:]
    sources: list[dict[str, Any]] = [named, *started, *centers, summary]
    facts = {name: value for source in sources for name, value in source.items() if value is not None}
    return facts if summary else {**facts, "steps": max((e["t"] for e in events), default=None)}


def flattened(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        rows += flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return rows
