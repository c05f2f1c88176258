"""One run of a comparison, and what is kept of it: a record, as JSON."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

from easgd_local import metrics
from easgd_local.compare.entries import Entry
from easgd_local.compare.rivals import Rival
from easgd_local.config import Config
from easgd_local.data import Dataset
from easgd_local.rules.base import Rule

Record = dict[str, Any]
KEPT = (
    "steps", "workers", "seconds", "evaluate_s", "samples", "samples_per_s", "exchanges", "exchange_s", "wait_s",
    "train_loss", "test_loss", "test_error", "center_sha256", "parameters", "warnings",
)  # fmt: skip
SCORES = ("train_loss", "test_loss", "test_error")
FLOAT_BYTES = 4


class Interrupted(Exception):
    """The user has stopped the run."""


def measure(entry: Entry, config: Config, dataset: Dataset | None = None) -> Record:
    """Trains, and says how it went; what ends a run is told in the record, but for an interrupt: `Interrupted`."""
    from easgd_local.compare import rival_run
    from easgd_local.training import train

    assert config.out is not None
    began = time.perf_counter()
    known = {
        "label": entry.label, "seed": config.seed, "lr": config.rule.lr,
        "momentum": getattr(config.rule, "momentum", None), "wanted_steps": config.steps,
        "load": os.getloadavg()[0],
    }  # fmt: skip
    try:
        summary = rival_run.train(config, dataset) if entry.is_rival else train(config, dataset=dataset)
    except (ValueError, MemoryError, OSError, RuntimeError) as error:
        cause = f"{type(error).__name__}: {error}"
        return {**known, "status": "failed", "cause": cause, "curve": [], "wall_s": time.perf_counter() - began}
    if summary["status"] == "interrupted":
        raise Interrupted
    kept, points = {name: summary.get(name) for name in KEPT}, curve(Path(config.out), config)
    moved = moved_bytes(config.rule, summary["workers"], summary["exchanges"], summary["parameters"])
    made = {"wall_s": time.perf_counter() - began, "moved_bytes": moved, "curve": points}
    late = {"interrupts": summary["interrupts"]}  # signals that came too late for the run, but mean the comparison
    return known | kept | made | late | _fate(summary, points)


def _fate(summary: dict[str, Any], points: list[dict[str, float]]) -> dict[str, Any]:
    """Status done, diverged or failed, and the cause."""
    if summary["status"] == "done":
        return {"status": "done", "cause": None}
    deaths = [f"worker {one['rank']} died at step {one['t']}: {one['cause']}" for one in summary["failures"]]
    values = [summary.get("train_loss"), *(one["train_loss"] for one in points)]
    if not deaths and any(value is not None and not math.isfinite(value) for value in values):
        return {"status": "diverged", "cause": "the training loss is not finite"}
    return {"status": "failed", "cause": deaths[0] if deaths else "; ".join(summary["warnings"]) or "not known"}


def curve(folder: Path, config: Config) -> list[dict[str, float]]:
    """The evaluations of a run: worker steps t, training seconds, samples of all workers, and the scores."""
    per_step = config.batch_size * (config.workers or 1)
    events = [event for event in metrics.read(folder) if event["kind"] == "center"]
    return [
        {"t": one["t"], "seconds": one["seconds"], "samples": one["t"] * per_step}
        | {name: one[name] for name in SCORES}
        for one in events
    ]


def moved_bytes(rule: Rule, workers: int, exchanges: int, parameters: int) -> float:
    """What all workers together read and write to average, counted from what the algorithm touches.

    Our rules: floats at the center in each exchange (`simulate.traffic`). Torch's ring: in each of a process's
    meetings it sends 2(p - 1)/p n floats and receives as many.
    """
    from easgd_local.simulate.traffic import traffic

    floats = 4 * (workers - 1) / workers if isinstance(rule, Rival) else traffic(rule, workers).floats
    return floats * exchanges * parameters * FLOAT_BYTES
