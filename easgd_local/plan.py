"""What the processes of a run agree on before it starts, and where each worker takes up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from easgd_local import faults
from easgd_local.center import Layout
from easgd_local.graphics import Graphics
from easgd_local.rules.base import Rule
from easgd_local.schedules import Calendar


class Stopped(BaseException):
    """The launcher has asked the workers to stop at this clock; state is saved. No error, so nobody's to catch."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the processes of a run must agree on, fully resolved, whoever wrote the training loop.

    turns: one of the rule's orders.  buffers: what is done with BatchNorm's statistics, "average", "recalibrate" or,
    in loops, "local".  threads: of each worker.  report_every: steps of a worker between two events.
    """

    rule: Rule
    calendar: Calendar
    layout: Layout
    turns: str
    buffers: str
    threads: int
    seed: int
    folder: Path
    report_every: int
    graphics: Graphics | None = None  # the GPUs on which workers compute; None: on the CPU
    faults: tuple[faults.Fault, ...] = ()

    @property
    def in_rounds(self) -> bool:
        """Whether the order of turns has common rounds, so that "the center after round k" is one exact vector."""
        return self.turns in ("strict", "together")


@dataclass(frozen=True)
class Start:
    """Where a worker takes up: at clock t, from `saved` (a checkpoint's folder) or from the center.

    `run_t` is the step of the run, whose rounds it makes from here on, where its own clock differs: the loops of users
    need not all be equally long. One that `joins` a run under way, in place of a worker that died, is told its clock
    when it is ready. `done` is what a worker of this rank has counted before, see `summary.Tally`.
    """

    t: int = 0
    saved: Path | None = None
    joins: bool = False
    run_t: int | None = None
    drawn: int | None = None  # how many batches a worker had drawn that there was in its place
    done: Mapping[str, float] = field(default_factory=dict)
