"""A run whose workers' steps are made by the user's own training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from easgd_local.attachment import Proposal
from easgd_local.center import Center
from easgd_local.flat import Naming
from easgd_local.gathering import WorkerFailed, admit, check_alike
from easgd_local.launcher import Child, Launcher, Message
from easgd_local.metrics import Listener
from easgd_local.plan import Plan, Start
from easgd_local.run import Run
from easgd_local.summary import Settings


@dataclass
class Gathered:
    """A run that is ready to start: all workers have attached and wait for the center. `filler` has it already."""

    config: Settings
    plan: Plan
    center: Center
    proposal: Proposal
    starts: dict[int, Start]
    t: int
    seconds: float
    evaluate_s: float
    warnings: list[str]
    workers: list[Child]
    filler: Child | None
    start_again: Callable[[int], Child]

    @property
    def model(self) -> str:
        return self.proposal.model

    @property
    def data(self) -> None:
        return None

    @property
    def parameters(self) -> int:
        return self.proposal.parameters

    @property
    def own_vectors(self) -> tuple[str, ...]:
        """Names of the vectors of n floats at each worker."""
        return self.proposal.own_vectors


class LoopRun(Run):
    """The course of a run of the user's loop; `execute` is called once. `error` is what ended it, if anything did.

    The center is evaluated by the first of the workers, while all of them hold.
    """

    _prepared: Gathered

    def __init__(self, gathered: Gathered, launcher: Launcher, listeners: Sequence[Listener] = ()) -> None:
        super().__init__(gathered, listeners)
        self._given = launcher
        self.error: Exception | None = None
        self._namings: dict[int, Naming] = {}  # by rank, at the end, with what is not in the vector
        self._asked_to_save: set[tuple[int, int]] = set()  # (step, rank) of those whose loops are over
        self._evaluates_at_end = False  # asked already

    def _processes(self) -> contextlib.AbstractContextManager[Launcher]:
        return contextlib.nullcontext(self._given)

    def _described(self) -> dict[str, Any]:
        return {"model": self._prepared.model}

    def _start_worker(self, rank: int, start: Start) -> None:
        if start.joins:
            self._workers[rank] = self._prepared.start_again(rank)  # it is answered when it attaches
            return
        self._workers[rank] = self._prepared.workers[rank]
        if self._workers[rank] is not self._prepared.filler:
            admit(self._workers[rank], self._center, self._plan, start)

    # What workers say

    def _hear(self, one: Child, message: Message) -> None:
        match message, one.rank:
            case ("attach", proposal), int(rank):
                self._admit_again(one, rank, proposal)
            case ("unattached",), int(rank):
                self._launcher.kill(one)
            case ("own", naming), int(rank):
                self._namings[rank] = naming
            case ("event", "log", values), int(rank):
                self._chronicle.event("log", rank=rank, **values)
            case ("failed evaluation", text, trace), int(rank):
                error = ValueError(f"worker {rank}: {text}")
                error.__cause__ = WorkerFailed(trace)
                self._abandon(error)
            case ("finished",), int(rank):
                super()._hear(one, message)
                self._save_finished([*self._assembly.pending, *([self._stop_t] if self._stop_t >= 0 else [])])
            case _:
                super()._hear(one, message)

    def _admit_again(self, one: Child, rank: int, proposal: Proposal) -> None:
        try:
            check_alike(self._prepared.proposal, proposal, rank)
        except ValueError as error:
            self._abandon(error)
            return
        admit(one, self._center, replace(self._plan, faults=()), Start(joins=True))  # a fault strikes once

    def _worker_exited(self, rank: int, cause: str | None) -> None:
        one = self._workers[rank]
        if one.refused:
            self._abandon(ValueError(f"worker {rank}: {one.failure}"))
        if self._evaluations.asked and self._evaluations.evaluator is one:  # its answer will not come
            self._evaluations.snapshot_taken()
            self._evaluations.asked = None
        if self._abandoned:
            self._tallies[rank].state = "stopped"  # by us
        super()._worker_exited(rank, cause)
        if not self._workers and not self._finished() and self.error is None and self._stop_t < 0:
            self.error = RuntimeError(
                f"all workers died, the last of them worker {rank}: {cause or 'it exited'}; see {self._folder}/logs."
            )
            self.error.__cause__ = WorkerFailed(one.traceback) if one.traceback else None

    def _abandon(self, error: Exception) -> None:
        self.error, self._abandoned = self.error or error, True
        self._stop_reason = self._stop_reason or str(error)

    # Checkpoints of workers whose loops are over while others' go on

    def _watch_rounds(self) -> None:
        round, calendar = self._next_round, self._calendar
        if round is not None:
            dates = calendar.evaluation_steps(round) + calendar.checkpoint_steps(round)
            if max(max(self._center.clock[rank], self._joined[rank]) for rank in self._ranks) < min(dates):
                return  # the round is over, but whether any loop comes to that step is not known yet
        before = set(self._assembly.pending)
        super()._watch_rounds()
        self._save_finished([t for t in self._assembly.pending if t not in before])

    def _save_finished(self, steps: Sequence[int]) -> None:
        """Asks those whose clocks stand below these steps for their part of the checkpoints, once for each."""
        for t in steps:
            for rank, one in self._workers.items():
                asked = (t, rank) in self._asked_to_save or rank in self._assembly.savers(t)
                if self._tallies[rank].state == "finished" and not asked:
                    self._asked_to_save.add((t, rank))
                    one.tell(("save", t))

    def _waits_for_the_rest(self) -> bool:
        return False  # the rest may be long

    def _stop(self) -> None:
        super()._stop()
        self._save_finished([self._stop_t])

    def _step(self, timeout_s: float) -> None:
        super()._step(timeout_s)
        if self._stop_t >= 0 and self._all_finished() and set(self._workers) <= self._assembly.savers(self._stop_t):
            self._center.leave[0] = 1  # those whose loops were over when the others stopped

    # Evaluation

    @property
    def _evaluator(self) -> Child | None:
        """The first of the workers; rather none that took the place of another one, the later the less: its first
        exchange may still wait for those who hold."""
        able = [rank for rank in self._workers if self._tallies[rank].state in ("training", "finished")]
        if not able or not self._prepared.proposal.evaluates:
            return None
        return self._workers[min(able, key=lambda rank: (self._joined[rank], rank))]

    # The end

    def _dismiss_finished(self) -> None:
        if not self._all_finished():
            return
        self._clock.stop()
        if self._evaluates_at_end:
            self._keep_statistics()
            self._center.leave[0] = 1
            return
        self._evaluates_at_end = True
        t = max(self._center.clock[rank] for rank in self._ranks)
        self._center.take_whole_snapshot()
        self._save_end(t)
        if not (self._evaluations.scores and self._evaluations.t == t):  # the last of the periodic ones was of the end
            self._ask(self._calendar.rounds_before(t) - 1, t)

    def _keep_statistics(self) -> None:
        """The center ends with the statistics that were computed for it."""
        buffers = self._evaluations.buffers
        if self._plan.buffers == "recalibrate" and buffers is not None:
            self._center.vectors["c"][self._buffer_coordinates()] = buffers

    def _save_end(self, t: int) -> None:
        """A checkpoint of the end, to go on from with a longer loop, where runs have checkpoints."""
        every, clocks = self._calendar.checkpoint_every, [self._center.clock[rank] for rank in self._workers]
        if not every or (t % every == 0 and min(clocks) == t):
            return
        self._assembly.add_center(t, self._center.state())
        self._center.save[0] = t + 1

    def _finish(self) -> None:
        self._clock.stop()
        self._center.take_whole_snapshot()
        self._save_stopped()
        self._finish_checkpoints()

    def center_state(self) -> dict[str, Tensor]:
        naming = self._namings[min(self._namings)] if self._namings else self._prepared.proposal.naming
        return naming.state_dict(self._result(self._buffer_coordinates()))

    def _buffer_coordinates(self) -> slice:
        entries = self._prepared.proposal.entries
        return slice(min((e.start for e in entries if e.is_buffer), default=self._plan.layout.n), self._plan.layout.n)
