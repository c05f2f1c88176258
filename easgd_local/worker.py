"""One worker process: the loop around a rule's `step`, and what the rule may touch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from easgd_local import checkpoint, data, faults, models
from easgd_local.backend.cpu import CpuOps, Vector
from easgd_local.center import Center, Layout
from easgd_local.devices import OnCpu, Place
from easgd_local.gradient import Gradient
from easgd_local.learning_rate import LearningRate
from easgd_local.optimizers import STEPS, Optimizer
from easgd_local.partition import overlap, partition
from easgd_local.rules.base import Rule
from easgd_local.schedules import Calendar
from easgd_local.turns import Aborted, TogetherTurns

REPORT_S = 2.0  # a slow worker reports at least this often


class Stopped(Exception):
    """The launcher has asked the workers to stop at this clock; state is saved."""


class GradientOf(Protocol):
    """What a worker needs to know of its model and data."""

    n: int
    buffers: slice
    loss: float
    samples_per_step: int

    @property
    def layers(self) -> list[slice]: ...
    def __call__(self, ops: CpuOps, t: int, at: Vector, only: slice | None = None) -> Vector: ...
    def zero(self, ops: CpuOps) -> Vector: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Plan:
    """Everything that the processes of a run must agree on, fully resolved: a function of the configuration."""

    rule: Rule
    learning_rate: LearningRate
    calendar: Calendar
    layout: Layout
    model: str
    shape: tuple[int, int, int]
    classes: int
    batch_size: int
    sampling: str
    seed: int
    weight_decay: float
    turns: str
    precision: str
    buffers: str
    threads: int
    folder: Path
    report_every: int
    evaluation_samples: int
    faults: tuple[faults.Fault, ...] = ()

    @property
    def in_rounds(self) -> bool:
        """Whether the order of turns has common rounds, so that "the center after round k" is one exact vector."""
        return self.turns in ("strict", "together")

    def sampler(self, rank: int, samples: int) -> data.Sampler:
        """The order of samples of worker `rank`."""
        order = data.shard if self.sampling == "shard" else data.independent
        return order(self.seed, rank, self.layout.workers, self.batch_size, samples)


class Worker:
    """What a rule may touch: x, c and its other named vectors, the clock t, `grad`, `turns` and the operations.

    Vectors have n floats; `x` and the local ones belong to this process, `c` and the shared ones to all. Buffers
    are the worker's own affair: at each exchange it adds its share to the center's and takes them over,
    c <- c + (x - c)/p, x <- c, and rules see nothing of it.
    """

    def __init__(
        self,
        rank: int,
        center: Center,
        plan: Plan,
        gradient: GradientOf,
        post: Callable[..., None],
        t: int,
        place: Place | None = None,
    ) -> None:
        self.rank, self.workers, self.t = rank, plan.layout.workers, t
        self._place = OnCpu(center, rank, plan.calendar) if place is None else place
        self._first_t = t  # where it takes up: a checkpoint of this step exists
        self.ops, self._gradient, self._post = self._place.ops, gradient, post
        self._center, self._plan, self._rule = center, plan, plan.rule
        self._exchanged_buffers = self._place.vector(gradient.buffers.stop - gradient.buffers.start)
        self._allocate()
        first_round = plan.calendar.rounds_before(t)
        self._turns = self._place.turns(
            plan.turns, self._hold_in_wait, first_round, lambda b: self._rule.close(self, b)
        )
        self._reloaded_at, self._saved_label = -1, center.save[0]
        self._made = self._reported = self._exchanges = 0  # steps made, steps reported, exchanges made
        self._turns_s, self._losses = 0.0, 0.0
        self._reported_at = time.perf_counter()

    def _allocate(self) -> None:
        rule, n, vector, shared = self._rule, self._gradient.n, self._place.vector, self._place.shared
        self._kept = {name: vector(n) for name in ("x", *rule.local)}
        self._vectors = self._kept | {name: vector(n) for name in rule.scratch} | dict(shared)
        self._vectors |= {name: shared[f"{name}{self.rank}"] for name in rule.allotted}
        if rule.optimizer:
            trained = slice(0, self._gradient.layers[-1].stop)
            self._kept[STEPS] = vector(1)
            state = {name: self._kept[name][trained] for name in rule.local} | {STEPS: self._kept[STEPS]}
            decay = self._plan.weight_decay if rule.decoupled else 0.0
            self._optimizer, self._trained = Optimizer(rule.optimizer, self.x[trained], state, decay), trained

    def __getattr__(self, name: str) -> Vector:
        try:
            return self.__dict__["_vectors"][name]
        except KeyError:
            raise AttributeError(f"{name}: the rule {self._rule.name} declares no such vector") from None

    # What rules use

    @property
    def lr(self) -> float:
        """η at the present t."""
        return self._plan.learning_rate(self.t)

    @property
    def opens(self) -> bool:
        """Whether this is the first visit to the block in hand in this round."""
        return self._turns.opens

    @property
    def update(self) -> int:
        """The number, from 1, of the update of the block in hand."""
        return self._turns.update

    @cached_property
    def own(self) -> slice:
        """The coordinates of the layers that this worker owns."""
        layers = self._gradient.layers
        mine = partition([layer.stop - layer.start for layer in layers], self.workers)[self.rank]
        return slice(layers[mine[0]].start, layers[mine[-1]].stop)

    def turns(self) -> Iterator[slice]:
        """One exchange with the center, block by block, each held during its pass of the loop."""
        began, waited = time.perf_counter(), self._turns.wait_s
        dies = faults.due(self._plan.faults, "kill-in-exchange", self.rank, self.t)
        for number, block in enumerate(self._turns.visit()):
            yield overlap(block, slice(0, self._gradient.buffers.start))
            self._exchange_buffers(overlap(block, self._gradient.buffers))
            if dies and number == self._center.layout.blocks // 2:
                faults.kill()
        self._exchanges += 1
        self._turns_s += time.perf_counter() - began - (self._turns.wait_s - waited)
        if self.ops.nonfinite:
            self._reload()

    def read(self) -> Iterator[slice]:
        """The blocks of the center, to be read only, in a rendezvous."""
        assert isinstance(self._turns, TogetherTurns), "only a rendezvous has a time for reading"
        for block in self._turns.read():
            yield overlap(block, slice(0, self._gradient.buffers.start))

    def _exchange_buffers(self, b: slice) -> None:
        d = self._exchanged_buffers[: b.stop - b.start]
        self.ops.difference(d, self.x[b], self.c[b], 1 / self.workers)
        self.ops.add(self.c[b], d)  # c <- c + (x - c)/p
        self.ops.copy(self.x[b], self.c[b])

    def grad(self, at: Vector | None = None, only: slice | None = None) -> Vector:
        """g at `at` (default x) on the minibatch of clock t, or some coordinates of it. Read-only; valid until the next
        call."""
        point = self._kept["x"] if at is None else at
        if self._reloaded_at == self.t:  # the point is what it was before it was reloaded
            return self._gradient.zero(self.ops)
        if point is not self.x:  # buffers such as running statistics are part of x wherever the gradient is taken
            self.ops.copy(point[self._gradient.buffers], self.x[self._gradient.buffers])
        g = self._gradient(self.ops, self.t, point, only)
        if point is not self.x:
            self.ops.copy(self.x[self._gradient.buffers], point[self._gradient.buffers])
        return g

    def optimize(self, g: Vector) -> None:
        """One step of the rule's local torch optimizer on the trainable part of x, with g."""
        self._optimizer.step(g[self._trained], self.lr)

    # The loop

    def run(self) -> None:
        """Steps until the calendar's last; raises `Stopped` after saving its state when the launcher asks for that."""
        plan = self._plan
        while self.t < plan.calendar.steps:
            self._boundary()
            began = time.perf_counter() - self._turns.wait_s
            if faults.due(plan.faults, "nan", self.rank, self.t):
                self.ops.fill(self.x[: self._gradient.n // 2], float("nan"))
            self._rule.step(self)
            self._losses += self._gradient.loss
            self._made += 1
            self.t += 1
            faults.keep_pace(plan.faults, self.rank, self.t, time.perf_counter() - self._turns.wait_s - began)
            if self.t % plan.report_every == 0 or time.perf_counter() - self._reported_at > REPORT_S:
                self._report()
        self._boundary()
        self._report()
        self._post("finished")
        self._linger()

    def _linger(self) -> None:
        """Until all have finished: if the others are stopped before, this worker's state belongs to the checkpoint."""
        while not self._center.leave[0]:
            if self._center.abort[0] or self._center.stop[0]:
                self._boundary()
            time.sleep(1e-3)

    def _boundary(self) -> None:
        """Between two steps: publishes the clock, holds, saves, stops."""
        center, t, plan = self._center, self.t, self._plan
        center.clock[self.rank] = t
        if center.abort[0]:
            raise Aborted
        self._hold(t)
        if faults.due(plan.faults, "kill", self.rank, t):
            faults.kill()
        if faults.due(plan.faults, "raise", self.rank, t):
            raise RuntimeError("injected fault")
        stop, label = center.stop[0], center.save[0]
        stops = stop > 0 and t >= stop - 1
        if self._in_rounds and (stops or (t > self._first_t and plan.calendar.checkpoint_due(t))):
            self._save(t)
        elif label != self._saved_label:
            self._saved_label = label
            self._save(label - 1)
        if stops:
            self._report()
            raise Stopped

    def _hold_in_wait(self) -> None:
        self._hold(self.t + 1)  # in the middle of step t the worker can stop at t + 1 at the earliest

    def _hold(self, earliest_stop: int) -> None:
        """While the launcher's pause word is odd: says so and waits."""
        center = self._center
        while (pause := center.pause[0]) & 1:
            # 1. earliest_stop, 2. held, in this order: who reads held = pause also reads our earliest_stop.
            center.earliest_stop[self.rank] = earliest_stop
            center.held[self.rank] = pause
            while center.pause[0] == pause:
                if center.abort[0]:
                    raise Aborted
                time.sleep(0.5e-3)

    @property
    def _in_rounds(self) -> bool:
        return self._plan.in_rounds

    def take_up(self, saved: Path | None) -> None:
        """The state to start from: a checkpoint's, or the center while nobody moves it yet."""
        if saved is None:
            self._place.load(self.x, self._center.vectors["c"])  # x <- c
            self._rule.begin(self)
            return
        vectors = checkpoint.load_vectors(saved, checkpoint.worker_file(self.rank))
        for name, value in self._kept.items():
            self._place.load(value, vectors[name])

    def join(self, t: int) -> None:
        """Takes the place of a worker that died: spends the exchange of step t on reading the center."""
        self.t = t
        if self._in_rounds:
            self._turns.round = self._plan.calendar.rounds_before(t)
        self._turns.counts = False  # it brings nothing
        for block in self._turns.visit():
            self.ops.copy(self.x[block], self.c[block])  # x <- c, buffers too
        if isinstance(self._turns, TogetherTurns):
            for block in self._turns.read():
                self.ops.copy(self.x[block], self.c[block])  # x <- c, as it is after the round
        self._turns.counts = True
        self._turns.stale = 0  # nobody was stale before it came
        self._rule.begin(self)
        self.t += 1

    def _reload(self) -> None:
        """After an exchange that met non-finite values: the worker goes on from the center, its past forgotten."""
        for name in self._kept.keys() - {"x"}:
            self.ops.fill(self._kept[name], 0.0)
        self._rule.begin(self)
        self._post("event", "nonfinite", t=self.t, count=self.ops.nonfinite)
        self.ops.nonfinite = 0
        self._reloaded_at = self.t

    def _save(self, label: int) -> None:
        folder, name = checkpoint.partial_folder(self._plan.folder, label), checkpoint.worker_file(self.rank)
        kept = {one: self._place.host(value) for one, value in self._kept.items()}
        digest = checkpoint.save_vectors(folder, name, kept)
        self._post("saved", label, self.t, name, digest)

    def _report(self) -> None:
        now, steps, plan = time.perf_counter(), self._made - self._reported, self._plan
        if not steps:
            return
        samples = self._gradient.samples_per_step
        self._post(
            "event", "worker", t=self.t, loss=self._losses / steps, samples=self._made * samples,
            samples_per_s=steps * samples / (now - self._reported_at), wait_s=self._turns.wait_s,
            exchange_s=self._turns_s, exchanges=self._exchanges, waited_for_s=self._turns.waited_for_s,
            staleness=None if plan.turns == "none" else self._turns.stale,
        )  # fmt: skip
        self._losses, self._reported, self._reported_at = 0.0, self._made, now


@dataclass(frozen=True)
class Start:
    """Where a worker takes up: at clock t, from `saved` (a checkpoint's folder) or from the center.

    One that `joins` a run under way, in place of a worker that died, is told its clock when it is ready.
    """

    t: int = 0
    saved: Path | None = None
    joins: bool = False


def main(conn: Connection, fds: list[int], rank: int, plan: Plan, description: dict[str, Any], start: Start) -> None:
    """The worker process: sets up, says "ready", waits for the word to go, steps to the end, says how it ended."""
    torch.set_num_threads(plan.threads)
    center = Center.attach(plan.layout, fds[0])
    dataset = data.from_memfd(fds[1] if len(fds) > 1 else None, description)
    model = models.build(plan.model, shape=plan.shape, classes=plan.classes)
    sampler = plan.sampler(rank, len(dataset.train))
    gradient = Gradient(
        model, dataset, sampler, rank=rank, precision=plan.precision,
        weight_decay=0.0 if plan.rule.decoupled else plan.weight_decay,
    )  # fmt: skip

    def post(kind: str, *args: Any, **values: Any) -> None:
        conn.send((kind, *args, values) if values else (kind, *args))

    try:
        with np.errstate(all="ignore"):  # overflow and NaN are counted in the exchange, not warned about
            worker = Worker(rank, center, plan, gradient, post, start.t)
            if not start.joins:
                worker.take_up(start.saved)
            post("ready")
            t = conn.recv()
            if start.joins:
                worker.join(t)
            worker.run()
    except Stopped:
        post("stopped")
    except Aborted:
        pass
    finally:
        gradient.close()
