"""One run: workers and evaluator started, watched, evaluated at exact rounds, checkpointed, brought to an end."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import safetensors.torch

from easgd_local import checkpoint, evaluate, report, worker
from easgd_local.backend.cpu import Vector
from easgd_local.config import Config
from easgd_local.launcher import Child, Launcher, Message, Referee, warm_up
from easgd_local.metrics import Listener, Metrics, finite
from easgd_local.prepare import Prepared, prepare, vectors_of
from easgd_local.worker import Start

IDLE_S, HOLDING_S, VIEW_S = 0.02, 0.002, 0.1
EVALUATOR_START_S = 120.0


class View(Protocol):
    """What can be shown of a run: events as they come, and the workers' clocks a few times a second."""

    def __call__(self, event: dict[str, Any]) -> None: ...
    def tick(self, clocks: Sequence[int], *, waiting_for: dict[int, int], evaluating: Sequence[int]) -> None: ...


def train(config: Config, *, resume: str | Path | None = None, listeners: Sequence[Listener] = ()) -> dict[str, Any]:
    """Trains as the command line does; returns the summary that summary.json holds, and its folder as "folder".

    Raises `ValueError` or `MemoryError` for a configuration that cannot work, before anything is started.
    """
    warm_up()
    with prepare(config, None if resume is None else Path(resume)) as prepared:
        return Run(prepared, listeners).execute()


@dataclass
class Tally:
    """What is known of one worker, from its own reports."""

    rank: int
    state: str = "training"
    steps: int = 0
    exchanges: int = 0
    samples_per_s: float = 0.0
    wait_s: float = 0.0
    exchange_s: float = 0.0
    waited_for_s: list[float] = field(default_factory=list)


@dataclass
class Unsaved:
    """A checkpoint being assembled: the shared vectors once they are known, and each worker's clock, file and digest."""

    vectors: dict[str, Vector] | None = None
    saved: dict[int, tuple[int, str, str]] = field(default_factory=dict)


class Clock:
    """Seconds of training: since the start, less the time for which all the workers were held."""

    def __init__(self, seconds: float) -> None:
        self._before, self._began, self._held_at = seconds, 0.0, time.perf_counter()
        self.held_s = 0.0

    def start(self) -> None:
        """Training begins now."""
        self._began, self._held_at = time.perf_counter(), 0.0

    def hold(self) -> None:
        """All the workers are held now."""
        self._held_at = time.perf_counter()

    def release(self) -> None:
        """The workers go on now."""
        self.held_s += time.perf_counter() - self._held_at
        self._held_at = 0.0

    @property
    def seconds(self) -> float:
        now = self._held_at or time.perf_counter()
        return self._before + (now - self._began - self.held_s if self._began else 0.0)


class Run:
    """The course of one run. `execute` is called once."""

    def __init__(self, prepared: Prepared, listeners: Sequence[Listener] = ()) -> None:
        self._prepared, self._listeners = prepared, list(listeners)
        self._plan, self._center, self._calendar = prepared.plan, prepared.center, prepared.plan.calendar
        self._folder = prepared.plan.folder
        self._strict = self._plan.turns == "strict"
        self._clock = Clock(prepared.seconds)
        self._tallies = [Tally(rank) for rank in range(self._plan.layout.workers)]
        self._workers: dict[int, Child] = {}
        self._failures: list[dict[str, Any]] = []
        self._warnings = list(prepared.warnings)
        self._unsaved: dict[int, Unsaved] = {}
        self._next_round = self._calendar.next_snapshot(self._calendar.rounds_before(prepared.t))
        self._free_due = prepared.t
        self._pending: list[int] = []  # steps T whose evaluation waits for the workers to hold
        self._asked: tuple[int, int] | None = None  # (round, T) that the evaluator works on
        self._asked_at, self._evaluate_s = 0.0, 0.0
        self._scores: evaluate.Scores | None = None
        self._buffers: Vector | None = None
        self._interrupts, self._stopping, self._stop_requested = 0, False, ""
        self._held = False

    # From start to end

    def execute(self) -> dict[str, Any]:
        """Trains to the end, or until interrupted; writes the run folder; returns the summary."""
        checkpoint.discard_partial(self._folder)
        resume_t = self._prepared.t if self._prepared.t else None
        with (
            Metrics(self._folder, self._listeners, resume_t=resume_t) as self._metrics,
            _signals(self._interrupt),
            Launcher(self._folder / "logs") as self._launcher,
        ):
            self._referee = Referee(self._center, self._calendar, strict=self._strict)
            try:
                self._start()
                self._supervise()
                self._finish_evaluation()
                return self._end()
            finally:
                self._center.abort[0] = 1
                if self._referee.is_alive():
                    self._referee.close()

    def _start(self) -> None:
        plan, prepared = self._plan, self._prepared
        self._event(
            "start", rule=plan.rule.name, model=plan.model, data=prepared.config.data, workers=plan.layout.workers,
            steps=plan.calendar.steps, parameters=prepared.flat.parameters, threads=plan.threads, device="cpu",
            tau=plan.rule.period, **plan.rule.derived(plan.layout.workers),
        )  # fmt: skip
        for message in prepared.warnings:
            self._event("warning", message=message)
        self._evaluator: Child | None = self._launcher.start(
            "evaluator", evaluate.main, prepared.fds, (plan, prepared.description)
        )
        for rank, start in prepared.starts.items():
            self._start_worker(rank, start)
        if prepared.t == 0:
            self._center.take_snapshot()
            self._ask(-1, 0)
        while not self._all_ready() or self._asked:
            self._step(HOLDING_S)
            if self._interrupts or not self._workers:
                break
        self._referee.start()
        self._clock.start()
        for one in self._workers.values():
            self._go(one, 0)

    def _start_worker(self, rank: int, start: Start) -> None:
        args = (rank, self._plan, self._prepared.description, start)
        self._workers[rank] = self._launcher.start(f"worker-{rank}", worker.main, self._prepared.fds, args, rank)

    def _all_ready(self) -> bool:
        return all("ready" in one.said for one in self._workers.values())

    def _go(self, one: Child, t: int) -> None:
        with contextlib.suppress(OSError):  # dead already: its exit is about to be told
            one.conn.send(t)

    def _supervise(self) -> None:
        while self._workers:
            self._step(HOLDING_S if self._pending or self._stop_requested else IDLE_S)
            if self._interrupts > 1:
                break
            if self._interrupts and not self._stop_requested:
                self._request_stop("interrupted")
            if self._strict:
                self._watch_rounds()
            else:
                self._watch_clocks()
            self._hold_or_release()

    def _step(self, timeout_s: float) -> None:
        for child, message in self._launcher.poll(timeout_s):
            self._hear(child, message)
        self._show()

    # What children say

    def _hear(self, one: Child, message: Message) -> None:
        match message:
            case ("event", "worker", values):
                self._count(one, values)
            case ("event", kind, values):
                self._event(kind, rank=one.rank, **values)
            case ("ready",) if one.rank is not None and self._tallies[one.rank].state == "starting":
                self._rejoin(one)
            case ("saved", label, t, name, digest):
                assert one.rank is not None
                self._unsaved.setdefault(label, Unsaved()).saved[one.rank] = (t, name, digest)
                self._commit_complete()
            case ("finished",) | ("stopped",):
                assert one.rank is not None
                self._tallies[one.rank].state = message[0]
            case ("taken",):
                assert self._asked is not None
                if self._strict:
                    self._center.taken[0] = self._asked[0] + 1
            case ("evaluated", scores, buffers):
                self._evaluated(scores, buffers)
            case ("exit", cause):
                self._exited(one, cause)

    def _count(self, one: Child, values: dict[str, Any]) -> None:
        assert one.rank is not None
        tally = self._tallies[one.rank]
        tally.steps = values["t"]
        for name in ("exchanges", "wait_s", "exchange_s", "waited_for_s", "samples_per_s"):
            setattr(tally, name, values[name])
        self._event("worker", rank=one.rank, **{name: values[name] for name in values if name != "waited_for_s"})

    def _exited(self, one: Child, cause: str | None) -> None:
        if one is self._evaluator:
            self._evaluator, self._asked = None, None
            self._pending.clear()
            if cause and not self._stopping:
                self._warn(f"the evaluator died ({cause}): the center is not evaluated any more; see logs/evaluator.log.")
            return
        assert one.rank is not None
        rank, tally = one.rank, self._tallies[one.rank]
        del self._workers[rank]
        self._referee.retire(rank)
        if tally.state in ("finished", "stopped"):
            self._event(tally.state, rank=rank)
        else:
            self._died(rank, cause or "exited early")
        self._commit_complete()

    def _died(self, rank: int, cause: str) -> None:
        t = self._center.clock[rank]
        self._tallies[rank].state = "died"
        self._tallies[rank].steps = t
        self._failures.append({"rank": rank, "t": t, "cause": cause})
        self._event("death", rank=rank, t=t, cause=cause)
        policy = self._prepared.config.on_failure
        if policy == "stop":
            self._request_stop(f"worker {rank} died and on_failure=stop")
        elif policy == "respawn" and self._clock.seconds > 0 and not self._stop_requested and t > 0:
            self._tallies[rank].state = "starting"
            self._start_worker(rank, Start(joins=True))

    def _rejoin(self, one: Child) -> None:
        assert one.rank is not None
        first = self._referee.readmit(one.rank)
        t = first * self._calendar.tau if self._strict else max(self._center.clock[rank] for rank in self._workers)
        self._tallies[one.rank].state = "training"
        self._event("respawn", rank=one.rank, t=t)
        self._go(one, t)

    # Evaluations, checkpoints, stopping

    def _watch_rounds(self) -> None:
        """Strict turns: acts when the snapshot of the next round that anybody wants to see is complete."""
        round = self._next_round
        if round is None or self._asked or self._pending or self._stop_requested:
            return
        complete = (round + 1) * self._plan.layout.workers
        if any(self._center.turn[b] < complete for b in range(self._plan.layout.blocks)):
            return
        for t in self._calendar.checkpoint_steps(round):
            self._unsaved.setdefault(t, Unsaved()).vectors = _copies(self._center.snapshot)
        self._commit_complete()
        self._next_round = self._calendar.next_snapshot(round + 1)
        if (due := self._calendar.evaluation_steps(round)) and self._evaluator:
            self._pending = due[-1:]
            self._round = round
        else:
            self._center.taken[0] = round + 1

    def _watch_clocks(self) -> None:
        """Free turns have no common rounds: the mean of the workers' clocks decides, and everybody holds."""
        if self._asked or self._pending or self._stop_requested:
            return
        before, now = self._free_due, int(np.mean([self._center.clock[rank] for rank in self._workers] or [0]))
        self._free_due = max(before, now)
        periods = (self._calendar.evaluate_every, self._calendar.checkpoint_every)
        self._free_dates = [period > 0 and now // period > before // period for period in periods]
        if any(self._free_dates):
            self._pending, self._round = [now], -1

    def _hold_or_release(self) -> None:
        """Holds the workers while something waits for that, acts when all of them are held, and lets them go."""
        wanted = bool(self._pending or self._asked or self._stop_requested and not self._stopping)
        pause = self._center.pause
        if wanted and not pause[0] & 1:
            pause[0] += 1
        if wanted and not self._held and all(self._center.held[rank] == pause[0] for rank in self._training()):
            self._held = True
            self._clock.hold()
        if self._held and self._stop_requested and not self._stopping:
            self._stop_at_once()
        elif self._held and self._pending:
            self._act_while_held()
        if self._held and (self._stopping or not (self._pending or self._asked)):
            self._held = False
            self._clock.release()
            pause[0] += 1
        elif not wanted and pause[0] & 1:
            pause[0] += 1

    def _training(self) -> Iterator[int]:
        return (rank for rank in self._workers if self._tallies[rank].state == "training")

    def _act_while_held(self) -> None:
        t = self._pending.pop()
        evaluates = True
        if not self._strict:
            self._center.take_snapshot()
            evaluates, saves = self._free_dates
            if saves:
                self._unsaved.setdefault(t, Unsaved()).vectors = _copies(self._center.snapshot)
                self._center.save[0] = t + 1
        if evaluates and self._evaluator:
            self._ask(self._round, t)

    def _stop_at_once(self) -> None:
        """Tells every worker at which clock to save its state and leave: the earliest that all can reach."""
        self._stopping, center = True, self._center
        if self._evaluator:
            self._launcher.kill(self._evaluator)
        self._pending.clear()
        ranks = list(self._training())
        if self._strict:
            t = max((center.earliest_stop[rank] for rank in ranks), default=0)
            center.stop[0] = t + 1
        else:  # everybody holds between two steps, so everybody can stop right there
            t = int(np.mean([center.clock[rank] for rank in ranks] or [0]))
            center.save[0] = t + 1
            center.stop[0] = 1
        self._stop_t = t
        self._unsaved.setdefault(t, Unsaved())
        self._event("stop", t=t, reason=self._stop_requested)

    def _request_stop(self, reason: str) -> None:
        self._stop_requested = self._stop_requested or reason

    def _ask(self, round: int, t: int) -> None:
        if self._evaluator is not None:
            self._asked, self._asked_at = (round, t), time.perf_counter()
            with contextlib.suppress(OSError):
                self._evaluator.conn.send(t)

    def _evaluated(self, scores: evaluate.Scores, buffers: Vector) -> None:
        assert self._asked is not None
        (round, t), self._asked = self._asked, None
        self._scores, self._buffers = scores, buffers
        took = time.perf_counter() - self._asked_at
        self._evaluate_s += took
        self._event("center", t=t, round=round, evaluate_s=took, **asdict(scores))

    def _commit_complete(self) -> None:
        """Writes every checkpoint of which all parts are there."""
        expected = {rank for rank in self._workers if self._tallies[rank].state != "starting"}
        for t, parts in sorted(self._unsaved.items()):
            if parts.vectors is not None and parts.saved and expected <= set(parts.saved):
                self._commit(t, parts.vectors, parts.saved)
                del self._unsaved[t]

    def _commit(self, t: int, vectors: dict[str, Vector], saved: dict[int, tuple[int, str, str]]) -> None:
        partial = checkpoint.partial_folder(self._folder, t)
        files = {name: digest for _, name, digest in saved.values()}
        files["center.safetensors"] = checkpoint.save_vectors(partial, "center.safetensors", vectors)
        manifest = checkpoint.Manifest(
            t=t, workers=self._plan.layout.workers, n=self._plan.layout.n, seconds=self._clock.seconds,
            clocks={rank: clock for rank, (clock, _, _) in saved.items()}, files=files,
        )  # fmt: skip
        path = checkpoint.commit(self._folder, manifest, keep=self._prepared.config.keep)
        self._event("checkpoint", t=t, path=str(path))

    # The end

    def _finish_evaluation(self) -> None:
        """All the workers are gone: the last evaluation and checkpoint see the center as it is."""
        if self._clock.seconds and not self._held:
            self._clock.hold()
        self._referee.retire(-1)
        finished = any(tally.state == "finished" for tally in self._tallies)
        for t, parts in self._unsaved.items():
            if parts.vectors is None and (self._stopping and t == self._stop_t or finished and t == self._calendar.steps):
                parts.vectors = _copies(self._center.vectors)
        self._commit_complete()
        while self._asked and self._evaluator and not self._interrupts:
            self._step(HOLDING_S)
        if finished and self._evaluator and not self._interrupts:
            self._center.take_snapshot()
            self._ask(self._calendar.rounds_before(self._calendar.steps) - 1, self._calendar.steps)
            while self._asked and not self._interrupts:
                self._step(HOLDING_S)

    def _end(self) -> dict[str, Any]:
        summary = self._summary()
        self._event("end", t=summary["steps"], status=summary["status"])
        center = self._center.vectors["c"].copy()
        if self._plan.buffers == "recalibrate" and self._buffers is not None:
            center[self._prepared.flat.buffers] = self._buffers
        safetensors.torch.save_file(self._prepared.flat.state_dict(center), self._folder / "center.safetensors")
        (self._folder / "summary.json").write_text(json.dumps(finite(summary), indent=1) + "\n")
        report.write(self._folder)
        return summary | {"folder": str(self._folder)}

    def _summary(self) -> dict[str, Any]:
        plan, tallies = self._plan, self._tallies
        c = self._center.vectors["c"]
        if not np.isfinite(c).all():
            self._warn("the center holds values that are not finite: the run diverged; lower lr.")
        samples = sum(tally.steps for tally in tallies) * plan.batch_size
        resumed = sum(start.t for start in self._prepared.starts.values()) * plan.batch_size
        seconds = self._clock.seconds
        scores = asdict(self._scores) if self._scores else dict.fromkeys(("train_loss", "test_loss", "test_error"))
        return {
            "status": self._status(),
            "rule": plan.rule.name,
            "model": plan.model,
            "data": self._prepared.config.data,
            "workers": plan.layout.workers,
            "steps": max(tally.steps for tally in tallies),
            "exchanges": sum(tally.exchanges for tally in tallies),
            "seconds": seconds,
            "evaluate_s": self._evaluate_s,
            "samples": samples,
            "samples_per_s": (samples - resumed) / spent if (spent := seconds - self._prepared.seconds) > 0 else None,
            "wait_s": sum(tally.wait_s for tally in tallies),
            "exchange_s": sum(tally.exchange_s for tally in tallies),
            **scores,
            "center_sha256": self._center.sha256(),
            "parameters": self._prepared.flat.parameters,
            "vectors": vectors_of(plan),
            "worker_reports": [asdict(tally) for tally in tallies],
            "failures": self._failures,
            "warnings": self._warnings,
        }

    def _status(self) -> str:
        if self._interrupts:
            return "interrupted"
        finished = any(tally.state == "finished" for tally in self._tallies)
        finite_center = bool(np.isfinite(self._center.vectors["c"]).all())
        return "done" if finished and finite_center and not self._stopping else "failed"

    # Small things

    def _event(self, kind: str, *, t: int | None = None, rank: int | None = None, **values: Any) -> None:
        if t is None:
            t = self._prepared.t if rank is None else self._center.clock[rank]
        self._metrics.write(kind, t=t, seconds=self._clock.seconds, rank=rank, **values)

    def _warn(self, message: str) -> None:
        self._warnings.append(message)
        self._event("warning", message=message)

    def _show(self) -> None:
        """Lets the views draw the clocks, a few times a second."""
        now = time.monotonic()
        if now - getattr(self, "_shown_at", 0.0) < VIEW_S or math.isinf(now):
            return
        self._shown_at = now
        ranks = range(self._plan.layout.workers)
        clocks = [self._center.clock[rank] for rank in ranks]
        waiting = {rank: word - 1 for rank in ranks if (word := self._center.waiting_for[rank])}
        for listener in self._listeners:
            if hasattr(listener, "tick"):
                listener.tick(clocks, waiting_for=waiting, evaluating=list(self._workers) if self._held else [])

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += 1


def _copies(vectors: dict[str, Vector]) -> dict[str, Vector]:
    return {name: vector.copy() for name, vector in vectors.items()}


@contextlib.contextmanager
def _signals(handler: Any) -> Iterator[None]:
    """SIGINT and SIGTERM are answered by `handler` meanwhile (only the main thread can ask for that)."""
    try:
        old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
