"""What a run folder tells: `curves.png` and `report.md`, from config.json, metrics.jsonl and summary.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from easgd_local import metrics
from easgd_local.curves import figure
from easgd_local.metrics import Event
from easgd_local.wording import UNKNOWN, count_text, facts_of, flattened, summary_rows, title, worker_rows

WORKER_HEAD = (
    "worker", "state", "steps", "exchanges", "samples/s", "exchange (s)", "waiting (s)", "waited for",
    "stale by (updates)",
)  # fmt: skip


def write(folder: str | Path) -> None:
    """Writes `report.md` and `curves.png` into the run folder; copes with a run that was cut short at any moment."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder; a report is made of a run folder, the one given to --out.")
    config, summary, events = _object(folder / "config.json"), _object(folder / "summary.json"), metrics.read(folder)
    (folder / "report.md").write_text(markdown(config, summary, events), encoding="utf-8")
    figure(config, summary, events).savefig(folder / "curves.png", dpi=140)


def markdown(config: dict[str, Any], summary: dict[str, Any], events: Sequence[Event]) -> str:
    """The report: numbers first, then the picture, then everything needed to judge and to repeat them."""
    facts = facts_of(config, summary, events)
    deaths = summary.get("failures") or [e for e in events if e["kind"] == "death"]
    failures = [[str(death.get(name, UNKNOWN)) for name in ("rank", "t", "cause")] for death in deaths]
    warnings = summary.get("warnings") or [e.get("message", "") for e in events if e["kind"] == "warning"]
    places = (summary.get("vectors") or {}).items()
    vectors = [(place, name, count_text(size)) for place, sizes in places for name, size in sizes.items()]
    digest = f"`{summary.get('center_sha256') or UNKNOWN}`"
    parts = [
        f"# {title(facts)}",
        table(("what", "value"), [*summary_rows(facts, events), ("center_sha256", digest)]),
        "![center loss and test error against seconds and worker steps](curves.png)",
        "The losses of the center are measured on the center itself, by evaluation; the losses of the workers are "
        "means over their own minibatches, at their own copies of the model.",
        "## Workers",
        table(WORKER_HEAD, worker_rows(summary)),
        "Stale by: how many updates of a block others made, at most, between two visits of the worker.",
        "## Vectors",
        table(("place", "name", "size (bytes)"), vectors),
        "## Failures",
        table(("worker", "step", "cause"), failures),
        "## Warnings",
        "\n".join(f"- {_cell(w)}" for w in warnings) or "None.",
    ]
    for name in ("effective", "hardware", "versions", "config"):
        parts += [f"## {name.capitalize()}", table(("what", "value"), flattened(config.get(name) or {}))]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The rows as a table in Markdown; "None." without any."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines) if rows else "None."


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").replace("<", "&lt;").split())


def _object(path: Path) -> dict[str, Any]:
    return metrics.restored(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
