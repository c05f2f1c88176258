"""What is known of a run while it runs, from its events and its workers' clocks."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from easgd_local.metrics import Event
from easgd_local.wording import (
    best,
    clock_text,
    count_text,
    further_scores,
    loss_text,
    percent_text,
    title,
)

SMOOTHING = 0.3  # weight of the newest worker event in what is shown
RATE_OVER_S = 60  # seconds of the past that the time left is estimated from


@dataclass
class Row:
    """One worker, as far as it is known."""

    rank: int
    t: int = 0
    loss: float | None = None  # worker loss, smoothed
    samples_per_s: float | None = None
    waiting: float | None = None  # share of the training time, smoothed
    state: str = "training"
    last: Event = field(default_factory=dict)  # its last event
    clocks: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=RATE_OVER_S))  # (s, t), 1 s apart

    @property
    def alive(self) -> bool:
        return self.state not in ("died", "finished")

    def report(self, event: Event) -> None:
        """Takes over an event of the worker."""
        self.t = max(self.t, event["t"])
        self.loss = _smoothed(self.loss, event.get("loss"))
        self.samples_per_s = event.get("samples_per_s")
        if event.get("wait_s") is not None:
            self.waiting = _smoothed(self.waiting, self._share_waiting(event))
        self.last = event

    def _share_waiting(self, event: Event) -> float | None:
        """Of the time since the last event; a respawned worker counts its waiting from 0 again."""
        waited_s = event["wait_s"] - self.last.get("wait_s", 0.0)
        lasted_s = event["seconds"] - self.last.get("seconds", 0.0)
        return min(1.0, waited_s / lasted_s) if waited_s >= 0 and lasted_s > 0 else None

    def at(self, now: float, t: int) -> None:
        """The worker's clock is t, now in seconds."""
        self.t = t
        if not self.clocks or now - self.clocks[-1][0] >= 1:
            self.clocks.append((now, t))

    def left_s(self, steps: int) -> float | None:
        """Seconds to the last step at the pace of the last minute; None while there is no pace to speak of."""
        moved = [clock for clock in self.clocks if clock[1] > self.clocks[0][1]]
        if not moved:
            return None
        (since, first), (now, t) = self.clocks[0], moved[-1]
        return (steps - self.t) * (now - since) / (t - first)


class Board:
    """What is known of the run, from its events and clocks; how it is shown is for `Screen` and `Lines` to say. `now`
    tells the time in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now, self.began = now, now()
        self.start: Event = {}
        self.rows: dict[int, Row] = {}
        self.center: Event | None = None
        self.best: Event | None = None
        self.checkpoint: Event | None = None
        self.evaluating = False  # whether the center is being evaluated, and nobody steps

    def observe(self, event: Event) -> None:
        """Takes over an event of the run."""
        kind = event["kind"]
        if kind == "start":
            self.start = event
            self.rows = {rank: _fresh(rank, event) for rank in range(event.get("workers") or 0)}
        elif kind == "worker":
            self.row(event["rank"]).report(event)
        elif kind == "center":
            self.center, self.best = event, best(e for e in (self.best, event) if e)
        elif kind == "checkpoint":
            self.checkpoint = event
        elif kind == "respawn":
            self.rows[event["rank"]] = _fresh(event["rank"], event)
        elif kind in ("death", "finished"):
            row = self.row(event["rank"])
            row.t, row.state = event["t"], "died" if kind == "death" else "finished"

    def tick(self, clocks: Sequence[int], waiting_for: Mapping[int, int], evaluating: Collection[int]) -> None:
        """The workers' clocks now, who waits for whom, and who is held for an evaluation."""
        now, self.evaluating = self.now(), bool(evaluating)
        for rank, t in enumerate(clocks):
            row = self.row(rank)
            if row.alive:
                row.at(now, int(t))
                busy = f"waiting for worker {waiting_for[rank]}" if rank in waiting_for else "training"
                row.state = "evaluating" if rank in evaluating else busy

    def row(self, rank: int) -> Row:
        return self.rows.setdefault(rank, Row(rank))

    def heading(self) -> str:
        counts = [f"{count_text(self.start[name])} {name}" for name in ("steps", "parameters") if self.start.get(name)]
        places = [f"{name} {self.start[name]}" for name in ("device", "threads") if self.start.get(name)]
        return ",  ".join([title(self.start), *counts, *places])

    def center_facts(self) -> list[str]:
        """The center's losses, named, at which step, and the best so far."""
        if self.center is None:
            return ["not evaluated yet"]
        facts = [f"at step {count_text(self.center['t'])}"]
        for name, shown in (("train_loss", "center training loss"), ("test_loss", "center test loss")):
            if name in self.center:
                facts.append(f"{shown} {loss_text(self.center[name])}")
        if self.center.get("test_error") is not None:
            facts.append(f"test error {percent_text(self.center['test_error'])}")
        facts += [f"{name} {loss_text(value)}" for name, value in further_scores(self.center).items()]
        if self.best is not None:
            facts.append(f"best {percent_text(self.best['test_error'])} at step {count_text(self.best['t'])}")
        return facts

    def time_facts(self) -> list[str]:
        steps, alive = self.start.get("steps"), [row for row in self.rows.values() if row.alive]
        lefts = [row.left_s(steps) for row in alive] if steps else []
        known = [left for left in lefts if left is not None]
        left = "about " + clock_text(max(known)) if known and len(known) == len(lefts) else "not known yet"
        return [f"elapsed {clock_text(self.now() - self.began)}", *([f"left {left}"] if lefts else [])]

    def rate_facts(self) -> list[str]:
        rates = [row.samples_per_s for row in self.rows.values() if row.alive and row.samples_per_s is not None]
        return [f"{count_text(sum(rates))} samples/s together"] if rates else []


def _smoothed(old: float | None, new: float | None) -> float | None:
    """Exponential mean. A value that is not finite is shown as it is, and forgotten at the next one that is."""
    if new is None or old is None or not math.isfinite(old) or not math.isfinite(new):
        return old if new is None else new
    return (1 - SMOOTHING) * old + SMOOTHING * new


def _fresh(rank: int, event: Event) -> Row:
    """A worker that starts with this event: its training and its waiting count from here."""
    return Row(rank, event["t"], last={"seconds": event["seconds"]})
