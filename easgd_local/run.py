"""The course of a run: its workers watched, the center evaluated at exact rounds, checkpoints, the end."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import safetensors.torch
from torch import Tensor

from easgd_local import checkpoint, hardware, metrics, overhead, report
from easgd_local.backend.cpu import Vector
from easgd_local.chronicle import Chronicle
from easgd_local.evaluations import Evaluations
from easgd_local.graphics import device_name
from easgd_local.launcher import Child, Launcher, Message
from easgd_local.metrics import Listener
from easgd_local.plan import Start
from easgd_local.referee import NEVER, Referee
from easgd_local.reloads import HOPELESS, Reloads
from easgd_local.signals import signals
from easgd_local.summary import Clock, Ready, Tally, is_finite, summarize
from easgd_local.whole_file import whole_file

IDLE_S, BUSY_S = 0.02, 0.002


class Run:
    """The course of one run, whoever makes the workers' steps; `execute` is called once.

    The workers go their way alone. The run looks at the turn words to see a snapshot complete, asks all the workers to
    hold (`pause` odd) while the center is evaluated or a stop is arranged, and passes on what they report.
    """

    def __init__(self, prepared: Ready, listeners: Sequence[Listener] = ()) -> None:
        self._prepared, self._plan = prepared, prepared.plan
        self._center, self._calendar, self._folder = prepared.center, prepared.plan.calendar, prepared.plan.folder
        self._ranks = range(self._plan.layout.workers)
        self._in_rounds = self._plan.in_rounds
        self._clock = Clock(prepared.seconds)
        self._chronicle = Chronicle(prepared, self._clock, listeners)
        self._tallies = [Tally.of(rank, prepared.starts[rank]) for rank in self._ranks]
        self._reloads = Reloads(len(self._ranks), self._calendar.tau)
        self._joined = dict.fromkeys(self._ranks, -1)  # the clock at which a worker joined a run under way
        self._workers: dict[int, Child] = {}
        self._assembly = checkpoint.Assembly(
            self._folder,
            config=prepared.config.to_json(),
            workers=len(self._ranks),
            n=self._plan.layout.n,
            keep=prepared.config.keep,
        )
        self._next_round = self._calendar.next_snapshot(self._calendar.rounds_before(prepared.t))
        self._mean_t = prepared.t
        self._evaluations = Evaluations(self._center, self._chronicle, prepared.t, prepared.evaluate_s)
        self._interrupts, self._stop_reason, self._stop_t = 0, "", -1
        self._held, self._diverged, self._abandoned = False, False, False
        self._set_out_s = 0.0  # when the workers set out for the round, or clock, that is waited for
        self._failures: list[dict[str, Any]] = []
        crowded = len(self._ranks) * self._plan.threads > hardware.cores()
        self._overhead = overhead.watch(self._plan.rule, crowded=crowded, steps=self._calendar.steps)

    def execute(self) -> dict[str, Any]:
        """Trains to the end, or until interrupted; writes the run folder; returns the summary."""
        checkpoint.discard_partial(self._folder)
        with (
            self._chronicle.open(),
            signals(self._interrupt),
            self._processes() as self._launcher,
            Referee(self._center, self._calendar, self._plan.rule, self._plan.turns) as self._referee,
        ):
            self._start()
            self._supervise()
            self._finish()
            return self._conclude()

    @property
    def reason(self) -> str:
        """Why the run stopped before its end; "" if it did not."""
        return self._stop_reason

    # What kinds of runs differ in

    def _processes(self) -> contextlib.AbstractContextManager[Launcher]:
        """The children's launcher, while the run lasts."""
        raise NotImplementedError

    def _described(self) -> dict[str, Any]:
        """What the first event says beside what all runs say."""
        raise NotImplementedError

    @property
    def _evaluator(self) -> Child | None:
        """Who evaluates the center; None when nobody does."""
        raise NotImplementedError

    def _start_evaluator(self) -> None:
        """Before the workers start."""

    def _end_evaluation(self) -> None:
        """A stop does not wait for an evaluation."""

    def _start_worker(self, rank: int, start: Start) -> None:
        """Starts the process of a worker."""
        raise NotImplementedError

    def _dismiss_finished(self) -> None:
        """Lets the workers go when all have finished: until then a stop may want their state."""
        if self._all_finished():
            self._clock.stop()
            self._center.leave[0] = 1

    def _finish(self) -> None:
        """Nobody steps any more: the last checkpoint and evaluation see the center as it is."""
        raise NotImplementedError

    def center_state(self) -> dict[str, Tensor]:
        """The center's state dict, as it is now."""
        raise NotImplementedError

    def _result(self, buffers: slice) -> Vector:
        """A copy of what the rule reports, with the buffers of c, or those that were computed anew for it."""
        vectors = self._center.vectors
        c = vectors[self._plan.rule.reported].copy()
        c[buffers] = vectors["c"][buffers]
        if self._plan.buffers == "recalibrate" and self._evaluations.buffers is not None:
            c[buffers] = self._evaluations.buffers
        return c

    # The course

    def _start(self) -> None:
        plan, prepared = self._plan, self._prepared
        self._chronicle.event(
            "start", rule=plan.rule.name, workers=len(self._ranks), parameters=prepared.parameters,
            threads=plan.threads, device=device_name(plan.graphics), tau=self._calendar.tau,
            hyperparameters=plan.rule.derived(len(self._ranks)), **self._described(),
        )  # fmt: skip
        for message in prepared.warnings:
            self._chronicle.event("warning", message=message)
        self._start_evaluator()
        for rank, start in prepared.starts.items():
            self._start_worker(rank, start)
        if prepared.t == 0:
            self._center.take_whole_snapshot()
            self._ask(-1, 0)
        while self._workers and (self._evaluations.pending or not self._all_ready()):
            self._step(BUSY_S)
            if self._interrupts:
                break
        self._clock.start()
        self._set_out_s = time.monotonic()
        for one in self._workers.values():
            one.tell(0)

    def _all_ready(self) -> bool:
        return all("ready" in one.said for one in self._workers.values())

    def _supervise(self) -> None:
        """Until no worker is left, or an interrupt that will not wait for them."""
        while self._workers and not self._gives_up:
            self._step(BUSY_S if self._evaluations.due or self._stop_reason else self._patience_s())
            assert self._referee.is_alive(), "the referee died: nobody passes the turns of the dead any more"
            if self._interrupts and not self._stop_reason and not self._center.leave[0] and not self._all_finished():
                self._stop_reason = "interrupted"
            if not (self._evaluations.pending or self._stop_reason):
                self._watch_rounds() if self._in_rounds else self._watch_clocks()
                self._dismiss_finished()
            self._hold_or_release()
        self._launcher.kill_all(self._workers.values())

    def _patience_s(self) -> float:
        """How long to sleep between two looks at the workers: the longer they have been on the way, the longer."""
        return min(IDLE_S, max(BUSY_S, (time.monotonic() - self._set_out_s) / 10))

    def _all_finished(self) -> bool:
        return bool(self._workers) and all(self._tallies[rank].state == "finished" for rank in self._workers)

    def _save_stopped(self) -> None:
        """The center's part of the checkpoint that a stop has asked the workers for."""
        if self._stop_t >= 0 and not self._gives_up and not self._diverged:
            self._assembly.add_center(self._stop_t, self._center.state())

    def _finish_checkpoints(self) -> None:
        self._commit()
        checkpoint.discard_partial(self._folder)

    def _evaluate_now(self, round: int, t: int) -> None:
        while self._evaluations.asked and not self._gives_up:
            self._step(BUSY_S)
        self._center.take_whole_snapshot()
        self._ask(round, t)
        while self._evaluations.asked and not self._gives_up:
            self._step(BUSY_S)

    def _conclude(self) -> dict[str, Any]:
        if not is_finite(self._prepared):
            self._chronicle.warn("the center holds values that are not finite.")
        for sentence in self._reloads.sentences():
            self._chronicle.warn(sentence)
        if self._finished() and not self._diverged and (risen := self._evaluations.risen()):
            self._chronicle.warn(
                f"{risen}: the run has not learned, or has diverged; try less than lr={self._plan.rule.lr}."
            )
        evaluations = self._evaluations
        summary: dict[str, Any] = {"status": self._status(), "interrupts": self._interrupts} | summarize(
            self._prepared, self._tallies, evaluations.scores, seconds=self._clock.seconds,
            evaluate_s=evaluations.seconds, evaluated_at=evaluations.t if evaluations.scores else None,
            failures=self._failures, warnings=self._chronicle.warnings,
        )  # fmt: skip
        self._chronicle.event("end", t=summary["steps"], status=summary["status"])
        state = self.center_state()
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        with whole_file(self._folder / "center.safetensors") as part:
            part.write_bytes(safetensors.torch.save(tensors))
        with whole_file(self._folder / "summary.json") as part:
            part.write_text(json.dumps(metrics.finite(summary), indent=1) + "\n")
        report.write(self._folder)
        return summary | {"folder": str(self._folder)}

    def _status(self) -> str:
        stopped = self._stop_t >= 0 and not self._finished()
        if self._interrupts > (0 if stopped else 1):  # one alone does not stop what is complete, or becomes so
            return "interrupted"
        return "done" if self._finished() and is_finite(self._prepared) and not self._diverged else "failed"

    def _finished(self) -> bool:
        """Whether all went to the end: unasked, or because a stop came when some had got there already."""
        to_the_end = not self._stop_reason or (self._interrupts == 1 and self._stop_t >= self._calendar.steps)
        return to_the_end and any(tally.state in ("finished", "stopped") for tally in self._tallies)

    # What children say

    def _step(self, timeout_s: float) -> None:
        for child, message in self._launcher.poll(timeout_s):
            self._hear(child, message)
        evaluates = self._held or (self._evaluations.asked is not None and not self._clock.runs)
        self._chronicle.show(evaluating=self._ranks if evaluates else [])

    def _hear(self, one: Child, message: Message) -> None:
        match message, one.rank:
            case ("evaluated", scores, buffers, took_s), _:
                self._evaluated(scores, buffers, took_s)
            case ("taken",), _:
                self._evaluations.snapshot_taken()
            case ("exit", cause), None:
                self._evaluator_exited(cause)
            case ("event", "worker", values), int(rank):
                self._tallies[rank].count(values)
                shown = {name: value for name, value in values.items() if name != "waited_for_s"}
                self._chronicle.event("worker", rank=rank, **shown)
                if self._overhead and (advice := self._overhead.hear(rank, self._clock.seconds, values)):
                    self._chronicle.warn(advice)
            case ("warning", text), _:
                if text not in self._chronicle.warnings:
                    self._chronicle.warn(text)
            case ("event", "nonfinite", values), int(rank):
                self._chronicle.event("nonfinite", rank=rank, times=self._reloads.add(rank, values["t"]), **values)
                if self._reloads.hopeless(self._training(), self._center.clock.__getitem__):
                    self._diverge(f"no worker had finite values in {HOPELESS} exchanges one after the other")
            case ("ready",), int(rank) if self._tallies[rank].state == "starting":
                self._readmit(rank)
            case ("saved", label, clock, name, digest, counts), int(rank):
                counted = self._tallies[rank].with_predecessors(counts)
                self._assembly.add_worker(label, rank, clock, name, digest, counted)
                self._commit()
            case (("finished" | "stopped") as state,), int(rank):
                self._tallies[rank].state = state
                self._referee.retire(rank)  # it has made its last exchange
            case ("exit", cause), int(rank):
                self._worker_exited(rank, cause)

    def _worker_exited(self, rank: int, cause: str | None) -> None:
        del self._workers[rank]
        self._referee.retire(rank)
        for word in (self._center.waiting_for, self._center.held, self._center.earliest_stop):
            word[rank] = 0  # it waits for nobody and holds no more, and writes no more itself
        if self._tallies[rank].state in ("finished", "stopped"):
            self._chronicle.event(self._tallies[rank].state, rank=rank)
        elif self._tallies[rank].state == "training" or (self._tallies[rank].state == "starting" and self._stop_t < 0):
            self._worker_died(rank, cause or "exited before its last step")
        self._commit()

    def _worker_died(self, rank: int, cause: str) -> None:
        t, tally, policy = self._center.clock[rank], self._tallies[rank], self._prepared.config.on_failure
        made_a_step, tally.state, tally.steps = t > tally.first_t, "died", t
        self._failures.append({"rank": rank, "t": t, "cause": cause})
        self._chronicle.event("death", rank=rank, t=t, cause=cause)
        if policy == "stop":
            self._stop_reason = self._stop_reason or f"worker {rank} died and on_failure is stop"
        elif policy == "respawn" and made_a_step and not self._stop_reason:
            # One that dies before its first step would do so again and again.
            self._tallies[rank] = tally.replaced()
            self._start_worker(rank, Start(joins=True))

    def _readmit(self, rank: int) -> None:
        round = self._referee.readmit(rank)
        t = round * self._calendar.tau if self._in_rounds else max(self._center.clock[i] for i in self._ranks)
        if t >= self._calendar.steps:  # no step is left for it
            self._tallies[rank].state = "died"
            self._referee.retire(rank)
            self._launcher.kill(self._workers[rank])
            return
        tally = self._tallies[rank]
        tally.state, tally.steps, tally.first_t, self._joined[rank] = "training", t, t, t
        self._chronicle.event("respawn", rank=rank, t=t)
        self._workers[rank].tell(t)

    def _evaluator_exited(self, cause: str | None) -> None:
        """An evaluator that is no worker is gone."""
        raise NotImplementedError

    # Evaluation and checkpoints

    def _watch_rounds(self) -> None:
        """Strict turns: acts when the snapshot of the next round that anybody wants to see is complete."""
        round = self._next_round
        if round is None:
            return
        complete = (round + 1) * len(self._ranks)
        if any(self._center.turn[b] < complete for b in range(self._plan.layout.blocks)):
            return
        for t in self._calendar.checkpoint_steps(round):
            self._assembly.add_center(t, self._center.state())
        self._commit()
        self._next_round = self._calendar.next_snapshot(round + 1)
        steps = self._calendar.evaluation_steps(round)
        if steps and self._evaluator:
            self._evaluations.due = round, steps[-1]
        else:
            self._center.taken[0] = round + 1
            self._set_out_s = time.monotonic()

    def _watch_clocks(self) -> None:
        """Free turns have no common rounds: the mean of the workers' clocks decides, and everybody holds."""
        clocks = [self._center.clock[rank] for rank in self._training()]
        before, now = self._mean_t, sum(clocks) // len(clocks) if clocks else 0
        if any(period and now // period > before // period for period in self._periods()):
            self._evaluations.due = -1, now
        else:
            self._mean_t = max(before, now)

    def _periods(self) -> tuple[int, int]:
        return self._calendar.evaluate_every, self._calendar.checkpoint_every

    def _hold_or_release(self) -> None:
        """Holds the workers as long as something needs that; acts as soon as all of them hold."""
        pause = self._center.pause
        if self._holding_wanted() and not pause[0] & 1:
            pause[0] += 1
        all_hold = pause[0] & 1 and all(self._center.held[rank] == pause[0] for rank in self._training())
        if all_hold and not self._held:
            self._held = True
            held_ns = [self._center.held_ns[rank] for rank in self._training()]
            self._clock.stop(max(held_ns) / 1e9 if held_ns else None)
        if all_hold and self._stop_wanted():
            self._stop()
        elif all_hold and self._evaluations.due:
            self._act_while_held(*self._evaluations.due)
        if pause[0] & 1 and not self._holding_wanted():
            if self._held and self._training():
                self._clock.start()
            self._held, self._set_out_s = False, time.monotonic()
            pause[0] += 1

    @property
    def _gives_up(self) -> bool:
        """Whether the run ends without waiting for the workers."""
        return self._interrupts > 1 or self._abandoned

    def _stop_wanted(self) -> bool:
        return bool(self._stop_reason) and self._stop_t < 0

    def _holding_wanted(self) -> bool:
        return self._evaluations.pending or self._stop_wanted()

    def _training(self) -> list[int]:
        return [rank for rank in self._workers if self._tallies[rank].state == "training"]

    def _act_while_held(self, round: int, t: int) -> None:
        self._evaluations.due, evaluates = None, True
        if not self._in_rounds:
            evaluates, saves = (period > 0 and t // period > self._mean_t // period for period in self._periods())
            self._mean_t = t
            self._center.take_whole_snapshot()
            if saves:
                self._assembly.add_center(t, self._center.state())
                self._center.save[0] = t + 1
        if evaluates:
            self._ask(round, t)

    def _stop(self) -> None:
        """Tells the workers at which clock to save their state and leave: the earliest that all of them can reach."""
        center = self._center
        for rank in self._training():
            if center.clock[rank] < self._joined[rank]:  # it still waits for its first turn, perhaps far ahead
                self._tallies[rank].state = "died"
                self._launcher.kill(self._workers[rank])
        ranks = self._training()
        ahead = self._waits_for_the_rest()
        if not (ahead and self._in_rounds and self._evaluations.asked is None):  # else the end is evaluated as usual
            self._end_evaluation()
        self._launcher.kill_all(one for rank, one in self._workers.items() if self._tallies[rank].state == "starting")
        self._evaluations.forget()
        center.taken[0] = NEVER  # nobody reads snapshots any more, so nobody waits to write one
        if self._in_rounds:
            earliest = max((center.earliest_stop[rank] for rank in ranks), default=self._calendar.steps)
            self._stop_t = self._calendar.steps if ahead else min(earliest, self._calendar.steps)
            center.stop[0] = self._stop_t + 1
        else:  # everybody holds between two steps and stops right there
            clocks = [center.clock[rank] for rank in ranks] or [self._calendar.steps]
            self._stop_t = max(sum(clocks) // len(clocks), center.save[0])  # a label that no checkpoint has yet
            center.save[0] = self._stop_t + 1
            center.stop[0] = 1
        self._assembly.drop_after(self._stop_t)
        self._chronicle.event("stop", t=self._stop_t, reason=self._stop_reason)

    def _waits_for_the_rest(self) -> bool:
        """Whether a stop comes so late that all go to the end: some have got there already."""
        return any(self._tallies[rank].state == "finished" for rank in self._workers)

    def _ask(self, round: int, t: int) -> None:
        self._evaluations.ask(self._evaluator, round, t)

    def _evaluated(self, scores: dict[str, Any], buffers: Vector | None, took_s: float) -> None:
        if not self._evaluations.answer(scores, buffers, took_s):
            return
        if not math.isfinite(scores.get("train_loss", 0.0)):
            self._diverge("the center's training loss is not finite")

    def _diverge(self, seen: str) -> None:
        if self._diverged:
            return
        self._diverged = True
        self._stop_reason = self._stop_reason or "diverged"
        self._chronicle.warn(f"{seen}: diverged; try less than lr={self._plan.rule.lr}.")

    def _commit(self) -> None:
        joined = {rank: self._joined[rank] for rank in self._workers if self._tallies[rank].state != "starting"}
        counts = {rank: tally.counts for rank, tally in enumerate(self._tallies)}
        seconds, evaluate_s = self._clock.seconds, self._evaluations.seconds
        for t, folder in self._assembly.commit(joined, seconds, evaluate_s=evaluate_s, counts=counts):
            self._chronicle.event("checkpoint", t=t, path=str(folder))

    # What others ask of it

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupt()

    def interrupt(self) -> None:
        """Asks the run to stop: the first time with a checkpoint of all workers, the second time at once."""
        self._interrupts += 1

    def stop(self, reason: str) -> None:
        """Asks the run to stop with a checkpoint of the workers that are left: one so stopped has failed."""
        self._stop_reason = self._stop_reason or reason
