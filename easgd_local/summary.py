"""What is counted in a run: training seconds without evaluation, each worker's share, and the summary at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from easgd_local.evaluate import Scores
from easgd_local.prepare import Prepared


class Clock:
    """Seconds of training: from the first step on, less the time for which all the workers were held."""

    def __init__(self, seconds: float) -> None:
        self._before, self._since = seconds, 0.0  # _since: when the clock last started to run; 0: it stands

    def start(self) -> None:
        """The workers step from now on."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Nobody steps from now on."""
        self._before, self._since = self.seconds, 0.0

    @property
    def seconds(self) -> float:
        return self._before + (time.perf_counter() - self._since if self._since else 0.0)


ADDED = ("samples", "exchanges", "wait_s", "exchange_s")


@dataclass
class Tally:
    """What is known of one worker, from its own reports. `state`: starting, training, finished, stopped or died."""

    rank: int
    state: str = "training"
    steps: int = 0
    samples: int = 0
    exchanges: int = 0
    wait_s: float = 0.0
    exchange_s: float = 0.0
    waited_for_s: list[float] = field(default_factory=list)
    staleness: int | None = None  # updates by others between two visits of a block, at most
    predecessors: Tally | None = field(default=None, repr=False)

    def count(self, values: dict[str, Any]) -> None:
        """Takes over what a worker's report says, on top of what its predecessors of this rank had done."""
        self.steps = values["t"]
        for name in ADDED:
            setattr(self, name, getattr(self.predecessors, name, 0) + values[name])
        for name in ("waited_for_s", "staleness"):
            setattr(self, name, values[name])

    def replaced(self) -> Tally:
        """That of the worker that takes the place of this one."""
        done = {name: getattr(self, name) for name in ADDED}
        return Tally(self.rank, "starting", self.steps, **done, predecessors=replace(self, predecessors=None))


def summarize(
    prepared: Prepared, tallies: Sequence[Tally], scores: Scores | None, *, seconds: float, **known: Any
) -> dict[str, Any]:
    """The content of summary.json. Rates are over the seconds of this launch; a resumed run has earlier ones too."""
    plan, spent = prepared.plan, seconds - prepared.seconds
    reports = [asdict(tally) | {"samples_per_s": tally.samples / spent if spent else None} for tally in tallies]
    for report in reports:
        del report["predecessors"]
    samples = sum(tally.samples for tally in tallies)
    unscored = dict.fromkeys(("train_loss", "test_loss", "test_error"))
    return {
        "rule": plan.rule.name,
        "model": plan.model,
        "data": prepared.config.data,
        "workers": plan.layout.workers,
        "steps": max(tally.steps for tally in tallies),
        "exchanges": sum(tally.exchanges for tally in tallies),
        "seconds": seconds,
        "samples": samples,
        "samples_per_s": samples / spent if spent else None,
        "wait_s": sum(tally.wait_s for tally in tallies),
        "exchange_s": sum(tally.exchange_s for tally in tallies),
        **(asdict(scores) if scores else unscored),
        "center_sha256": prepared.center.sha256(),
        "parameters": prepared.flat.parameters,
        "vectors": _sizes(prepared),
        "worker_reports": reports,
        **known,
    }


def is_finite(prepared: Prepared) -> bool:
    """Whether the center holds nothing but finite numbers."""
    return bool(np.isfinite(prepared.center.vectors["c"]).all())


def _sizes(prepared: Prepared) -> dict[str, dict[str, int]]:
    """Name -> bytes of the vectors at the center and at each worker."""
    plan, size_bytes = prepared.plan, 4 * prepared.plan.layout.n
    own = ("x", "g", *plan.rule.local, *plan.rule.scratch)
    return {"shared": dict.fromkeys(plan.layout.shared, size_bytes), "local": dict.fromkeys(own, size_bytes)}
