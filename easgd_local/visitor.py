"""A worker as it visits the center: its vectors, the exchange, and the moment between two steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from easgd_local import checkpoint, faults
from easgd_local.backend.cpu import Vector
from easgd_local.center import Center
from easgd_local.devices import OnCpu, Place
from easgd_local.partition import overlap
from easgd_local.plan import Plan, Stopped
from easgd_local.respondent import Respondent
from easgd_local.turns import Aborted

REPORT_S = 2.0  # a slow worker reports at least this often


class Visitor:
    """What every worker has, whoever makes its steps: x, c and other named vectors, the clock t, turns and operations.

    Vectors have n floats; `x` and the local ones (`kept`, and `scratch`, which is never saved) belong to this process,
    `c` and the shared ones to all. Buffers, the coordinates `buffers`, are the worker's own affair, of which rules see
    nothing: at each exchange it adds its share to the center's and is drawn to the result,

        d <- x - c',  c' = c + (x - c)/p,  c <- c'     with x as it was when the exchange began
        x <- x - d                                     when the step is made: forward passes change x meanwhile
    """

    def __init__(
        self, rank: int, center: Center, plan: Plan, buffers: slice, post: Callable[..., None], t: int, *,
        kept: tuple[str, ...], scratch: tuple[str, ...], place: Place | None = None, run_t: int | None = None,
    ) -> None:  # fmt: skip
        self.rank, self.workers, self.t = rank, plan.layout.workers, t
        self._place = OnCpu(center, rank, plan.calendar) if place is None else place
        self._first_t = t  # where it takes up: a checkpoint of this step exists
        self.ops, self._buffers, self._post = self._place.ops, buffers, post
        self._center, self._plan, self._rule = center, plan, plan.rule
        self._own_buffers, self._off_buffers = (self._place.vector(buffers.stop - buffers.start) for _ in range(2))
        self._has_buffers, self._buffers_pending = buffers.stop > buffers.start, False
        vector, shared = self._place.vector, self._place.shared
        self._kept = {name: vector(buffers.stop) for name in ("x", *kept)}
        self._vectors = self._kept | {name: vector(buffers.stop) for name in scratch} | dict(shared)
        self._vectors |= {name: shared[f"{name}{rank}"] for name in self._rule.allotted}
        first_round = plan.calendar.rounds_before(t if run_t is None else run_t)
        close = (lambda b: self._rule.close(self, b)) if self._rule.closes else None
        hold = self._hold_in_wait if plan.in_rounds else _go_on  # else a worker holds between two steps only
        self._turns = self._place.turns(plan.turns, hold, first_round, close)
        self._respondent = Respondent(center, rank) if plan.graphics and plan.in_rounds else None
        if self._respondent:
            self._respondent.start()
        self._reloaded_at, self._saved_label, self._saved_t = -1, center.save[0], -1
        self._made_last = False  # whether no step follows
        self._made = self._reported = self._exchanges = 0  # steps made, steps reported, exchanges made
        self._turns_s, self._losses_known = 0.0, 0
        self._losses: Any = 0.0
        self._reported_at = time.perf_counter()

    def __getattr__(self, name: str) -> Vector:
        """A vector of the rule, by its letter; found at once from then on."""
        vectors = self.__dict__.get("_vectors", {})
        if name not in vectors:
            raise AttributeError(f"{name}: the rule {self._rule.name} declares no such vector")
        vector: Vector = vectors[name]
        self.__dict__[name] = vector
        return vector

    def drain(self) -> None:
        """Returns when everything enqueued on the device is done."""
        self._place.drain()

    def finish_exchange(self) -> None:
        """Before the process ends by an exception: what it has enqueued is done, so that the center has all of it."""
        with contextlib.suppress(Exception, Aborted):
            self.drain()

    def _settle(self) -> None:
        """After the last step: everything enqueued is done, and what was not finite in it is reported."""
        self.drain()
        self._place.settle()
        if self.ops.nonfinite:
            self._post("warning", f"worker {self.rank} held values that were not finite in its last exchanges.")

    def close(self, *, drained: bool) -> None:
        """Gives the device back; what is not drained is left to the end of the process."""
        if self._respondent:
            self._respondent.end()
        self._place.close(drained=drained)

    # The exchange

    @property
    def update(self) -> int:
        """The number, from 1, of the update of the block in hand."""
        return self._turns.update

    def turns(self) -> Iterator[slice]:
        """One exchange with the center, block by block, each held during its pass of the loop."""
        began, waited = time.perf_counter(), self._turns.wait_s
        dies = faults.due(self._plan.faults, "kill-in-exchange", self.rank, self.t)
        if self._has_buffers:
            self.ops.copy(self._own_buffers, self.x[self._buffers])
        for number, block in enumerate(self._turns.visit()):
            yield overlap(block, slice(0, self._buffers.start))
            self._exchange_buffers(overlap(block, self._buffers))
            if dies and number == self._center.layout.blocks // 2:
                faults.kill()
        self._exchanges += 1
        self._turns_s += time.perf_counter() - began - (self._turns.wait_s - waited)
        if self.ops.nonfinite:
            self._reload()

    def open(self, y: Vector) -> None:
        """y <- 0, part of the block in hand, at the first visit of the block in this round."""
        self._turns.open(y)

    def read(self) -> Iterator[slice]:
        """The blocks of the center, to be read only, in a rendezvous."""
        for block in self._turns.read():
            yield overlap(block, slice(0, self._buffers.start))

    def _exchange_buffers(self, b: slice) -> None:
        if b.stop <= b.start:
            return
        own = slice(b.start - self._buffers.start, b.stop - self._buffers.start)
        x, d = self._own_buffers[own], self._off_buffers[own]
        self.ops.difference(d, x, self.c[b], 1 / self.workers)
        self.ops.add(self.c[b], d)  # c <- c + (x - c)/p
        self.ops.copy(d, x)
        self.ops.subtract(d, self.c[b])  # d <- x - c
        self._buffers_pending = True

    def _draw_buffers(self) -> None:
        """x <- x - d for the buffers of the latest exchange."""
        if self._buffers_pending:
            self._buffers_pending = False
            self.ops.subtract(self.x[self._buffers], self._off_buffers)

    # Between two steps

    def _linger(self) -> None:
        """Until all have finished: if the others are stopped before, this worker's state belongs to the checkpoint."""
        center = self._center
        while not center.leave[0] or center.save[0] != self._saved_label:
            if center.abort[0] or center.stop[0] or center.save[0] != self._saved_label:
                self._boundary()
            self._while_held()
            time.sleep(1e-3)

    def _boundary(self) -> None:
        """Between two steps: publishes the clock, holds, saves, stops."""
        self._halt(self.t)
        self._save_or_stop()
        self._enter_step()

    def _enter_step(self) -> None:
        """From here to the next boundary the processor may wait for the device."""
        if self._respondent and not self._made_last:
            self._respondent.enter(self.t)

    def _halt(self, earliest_stop: int) -> None:
        if self._respondent:
            self._respondent.leave()
        center, t, plan = self._center, self.t, self._plan
        center.clock[self.rank] = t
        if center.abort[0]:
            raise Aborted
        self._hold(earliest_stop)
        if faults.due(plan.faults, "kill", self.rank, t):
            faults.kill()
        if faults.due(plan.faults, "raise", self.rank, t):
            raise RuntimeError("injected fault")

    def _save_or_stop(self) -> None:
        label, stops = self._center.save[0], self._stops
        if label != self._saved_label:
            self._saved_label = label
            self._save(label - 1)
        elif self._in_rounds and (stops or self._checkpoint_due) and self._saved_t != self.t:
            self._saved_t = self.t  # once: a loop that ends may come here twice, and the file may be committed
            self._save(self.t)
        if stops:
            self._depart()
            raise Stopped

    def _depart(self) -> None:
        """The last words before a stop."""
        self._report()

    @property
    def _stops(self) -> bool:
        return 0 < self._center.stop[0] <= self.t + 1

    @property
    def _checkpoint_due(self) -> bool:
        return self.t > self._first_t and self._plan.calendar.checkpoint_due(self.t)

    def _while_held(self) -> None:
        """What a worker does while it holds, or has finished and waits for the others."""

    def _hold_in_wait(self) -> None:
        # In the middle of step t the worker can stop at t + 1 at the earliest, unless it makes no step any more.
        self._hold(self.t if self._made_last else self.t + 1)

    def _hold(self, earliest_stop: int) -> None:
        """While the launcher's pause word is odd: says so and waits."""
        center = self._center
        while (pause := center.pause[0]) & 1:
            if not self._in_rounds:  # then the center is looked at as it is
                self._place.drain()
            center.say_held(self.rank, pause, earliest_stop)
            while center.pause[0] == pause:
                if center.abort[0]:
                    raise Aborted
                self._while_held()
                time.sleep(0.5e-3)

    @property
    def _in_rounds(self) -> bool:
        return self._plan.in_rounds

    def take_up(self, saved: Path | None) -> None:
        """The state to start from: a checkpoint's, or the center while nobody moves it yet."""
        if saved is None:
            self._place.load(self.x, self._center.vectors["c"])  # x <- c
            self._begin()
            return
        vectors = checkpoint.load_vectors(saved, checkpoint.worker_file(self.rank))
        for name, value in self._kept.items():
            self._place.load(value, vectors[name])

    def _begin(self) -> None:
        """Sets the local vectors, x apart, when x has been set to c."""
        raise NotImplementedError

    def join(self, t: int) -> None:
        """Takes the place of a worker that died: spends the exchange of step t on reading the center."""
        self.t = t
        if self._in_rounds:
            self._turns.round = t // self._plan.calendar.tau
        self._turns.counts = False  # it brings nothing
        for block in self._turns.visit():
            self.ops.copy(self.x[block], self.c[block])  # x <- c, buffers too
        if self._plan.turns == "together":
            for block in self._turns.read():
                self.ops.copy(self.x[block], self.c[block])  # x <- c, as it is after the round
        self._turns.counts = True
        if self._turns.stale is not None:
            self._turns.stale = 0  # nobody was stale before it came
        self._begin()
        self.t += 1 - self._plan.calendar.ahead

    def _reload(self) -> None:
        """After an exchange that met non-finite values: the worker goes on from the center, its past forgotten."""
        if self._buffers_pending:  # not finite as they may be, they are the center's now
            self.ops.copy(self.x[self._buffers], self._own_buffers)
            self._draw_buffers()
        for name in self._kept.keys() - {"x"}:
            self.ops.fill(self._kept[name], 0.0)
        self._begin()
        self._post("event", "nonfinite", t=self.t, count=self.ops.nonfinite)
        self.ops.nonfinite = 0
        self._reloaded_at = self.t

    def _save(self, label: int) -> None:
        folder, name = checkpoint.partial_folder(self._plan.folder, label), checkpoint.worker_file(self.rank)
        kept = {one: self._place.host(value) for one, value in self._kept.items()}
        digest = checkpoint.save_vectors(folder, name, kept)
        self._post("saved", label, self.t, name, digest, self._counts())

    # What it tells

    def _count_step(self, loss: Any) -> None:
        """A step is made: the clock moves."""
        self._made += 1
        self.t += 1
        if loss is not None:
            self._losses += loss  # a tensor stays on its device until the report
            self._losses_known += 1

    def _report_now_and_then(self) -> None:
        if self.t % self._plan.report_every == 0 or time.perf_counter() - self._reported_at > REPORT_S:
            self._report()

    @property
    def samples_per_step(self) -> int | None:
        """Samples in a step of this worker; None where nobody has said."""
        return None

    def _counts(self) -> dict[str, float]:
        """What this process has done, as `summary.Tally` adds it up."""
        samples = self._made * (self.samples_per_step or 0)
        return {
            "samples": samples, "exchanges": self._exchanges, "wait_s": self._turns.wait_s, "exchange_s": self._turns_s
        }  # fmt: skip

    def _report(self) -> None:
        now, steps = time.perf_counter(), self._made - self._reported
        if not steps:
            return
        samples = self.samples_per_step
        self._post(
            "event", "worker", t=self.t, loss=float(self._losses) / self._losses_known if self._losses_known else None,
            samples_per_s=None if samples is None else steps * samples / (now - self._reported_at),
            **self._counts(), waited_for_s=self._turns.waited_for_s,
            staleness=None if self._plan.turns == "none" else self._turns.stale,
        )  # fmt: skip
        self._losses, self._losses_known, self._reported, self._reported_at = 0.0, 0, self._made, now


def _go_on() -> None: ...
