"""What is counted in a run: training seconds without evaluation, each worker's share, and the summary at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from easgd_local.center import Center
from easgd_local.plan import Plan, Start


class Settings(Protocol):
    """What a run asks of its configuration."""

    @property
    def keep(self) -> int: ...
    @property
    def on_failure(self) -> str: ...
    @property
    def tensorboard(self) -> bool: ...
    def to_json(self) -> dict[str, Any]: ...


class Ready(Protocol):
    """What a run starts from, whoever wrote the training loop.

    `starts` says by rank where each worker takes up; `t`, `seconds` of training and `evaluate_s` of evaluation are what
    a resumed run has behind it.
    """

    starts: dict[int, Start]
    t: int
    seconds: float
    evaluate_s: float
    warnings: list[str]

    @property
    def config(self) -> Settings: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def center(self) -> Center: ...
    @property
    def model(self) -> str: ...
    @property
    def data(self) -> str | None: ...
    @property
    def parameters(self) -> int: ...
    @property
    def own_vectors(self) -> tuple[str, ...]:
        """Names of the vectors of n floats at each worker."""


class Clock:
    """Seconds of training: from the first step on, less the time for which all the workers were held."""

    def __init__(self, seconds: float) -> None:
        self._before, self._since = seconds, 0.0  # _since: when the clock last started to run; 0: it stands

    def start(self) -> None:
        """The workers step from now on."""
        self._since = time.perf_counter()

    def stop(self, at_s: float | None = None) -> None:
        """Nobody steps from now on, or has since `at_s` of time.perf_counter, which all processes share."""
        if self._since:
            self._before += max(0.0, (time.perf_counter() if at_s is None else at_s) - self._since)
            self._since = 0.0

    @property
    def runs(self) -> bool:
        """Whether the workers step."""
        return self._since != 0.0

    @property
    def seconds(self) -> float:
        return self._before + (time.perf_counter() - self._since if self._since else 0.0)


ADDED = ("samples", "exchanges", "wait_s", "exchange_s")


@dataclass
class Tally:
    """What is known of one worker, from its own reports. `state`: starting, training, finished, stopped or died.

    It took up at clock `first_t`. Its counts go on from those of its predecessors of this rank: workers that died, or
    those before the run was resumed.
    """

    rank: int
    state: str = "training"
    steps: int = 0
    first_t: int = field(default=0, repr=False)
    samples: int = 0
    exchanges: int = 0
    wait_s: float = 0.0
    exchange_s: float = 0.0
    waited_for_s: list[float] = field(default_factory=list)
    staleness: int | None = None  # updates by others between two visits of a block, at most
    before: dict[str, float] = field(default_factory=dict, repr=False)  # the predecessors' counts

    @classmethod
    def of(cls, rank: int, start: Start) -> Tally:
        """Of a worker that takes up there."""
        return cls(rank, "training", 0, start.t, before=dict(start.done), **start.done)  # type: ignore[arg-type]

    def count(self, values: dict[str, Any]) -> None:
        """Takes over what a worker's report says."""
        self.steps = values["t"]
        for name, value in self.with_predecessors(values).items():
            setattr(self, name, value)
        for name in ("waited_for_s", "staleness"):
            setattr(self, name, values[name])

    def with_predecessors(self, counts: Mapping[str, float]) -> dict[str, float]:
        """These counts of the worker on top of what its predecessors had done."""
        return {name: self.before.get(name, 0) + counts[name] for name in ADDED}

    @property
    def counts(self) -> dict[str, float]:
        """What this rank has done in all."""
        return {name: getattr(self, name) for name in ADDED}

    def replaced(self) -> Tally:
        """That of the worker that takes the place of this one."""
        return Tally(self.rank, "starting", self.steps, self.steps, before=self.counts, **self.counts)  # type: ignore[arg-type]


def summarize(
    prepared: Ready, tallies: Sequence[Tally], scores: dict[str, float], *, seconds: float, **known: Any
) -> dict[str, Any]:
    """The content of summary.json: of the run from its beginning, also where it was resumed."""
    plan = prepared.plan
    reports = [asdict(tally) | {"samples_per_s": tally.samples / seconds if seconds else None} for tally in tallies]
    for report in reports:
        del report["before"], report["first_t"]
    samples = sum(tally.samples for tally in tallies)
    return {
        "rule": plan.rule.name,
        "model": prepared.model,
        "data": prepared.data,
        "workers": plan.layout.workers,
        "steps": max(tally.steps for tally in tallies),
        "exchanges": sum(tally.exchanges for tally in tallies),
        "seconds": seconds,
        "samples": samples or None,  # a loop of the user's may not say
        "samples_per_s": samples / seconds if seconds and samples else None,
        "wait_s": sum(tally.wait_s for tally in tallies),
        "exchange_s": sum(tally.exchange_s for tally in tallies),
        **{name: scores.get(name) for name in ("train_loss", "test_loss", "test_error")},
        "scores": scores,
        "center_sha256": prepared.center.sha256(),
        "parameters": prepared.parameters,
        "vectors": _sizes(prepared),
        "worker_reports": reports,
        **known,
    }


def is_finite(prepared: Ready) -> bool:
    """Whether the center holds nothing but finite numbers."""
    return bool(np.isfinite(prepared.center.vectors["c"]).all())


def _sizes(prepared: Ready) -> dict[str, dict[str, int]]:
    """Name -> bytes of the vectors at the center and at each worker."""
    plan, size_bytes = prepared.plan, 4 * prepared.plan.layout.n
    own = dict.fromkeys(prepared.own_vectors, size_bytes)
    return {"shared": dict.fromkeys(plan.layout.shared, size_bytes), "local": own}
