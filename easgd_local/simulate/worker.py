"""A simulated worker: what a rule may touch (`rules.base.WorkerView`), with vectors of its own and virtual time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from easgd_local.backend.cpu import CpuOps, Vector
from easgd_local.memory import MainMemory
from easgd_local.optimizers import STEPS, Optimizer
from easgd_local.rules.base import Rule, WorkerView
from easgd_local.simulate.clock import Clock
from easgd_local.simulate.link import Link
from easgd_local.simulate.machine import Machine
from easgd_local.simulate.orders import Block, Grid, Order
from easgd_local.simulate.problems import Problem
from easgd_local.simulate.traffic import Traffic


@dataclass(frozen=True)
class World:
    """What all workers share: the rule, the problem, the machine, the center."""

    rule: Rule
    problem: Problem
    machine: Machine
    workers: int
    clock: Clock
    link: Link
    grid: Grid
    order: Order
    traffic: Traffic
    ops: CpuOps
    shared: Mapping[str, Vector]
    owned: list[slice]  # the coordinates that each worker alone writes, for rules that divide the model
    staleness: Counter[int] = field(default_factory=Counter)  # others' updates between two visits -> visits
    updates: Counter[int] = field(default_factory=Counter)  # block -> how many were made

    @property
    def hides(self) -> bool:
        """Whether an exchange goes on beside the gradient."""
        first = not self.rule.sequential  # those exchange after the gradient, in the end of a step
        return self.machine.overlap and first and not self.traffic.moves_x


class SimulatedWorker:
    """x, c and the other named vectors, the clock t, `grad`, `turns` and the operations; and where its time went.

    compute_s, exchange_s (moving bytes, and latencies) and wait_s (for its turn) add up to its time; where exchanges go
    on beside gradients they add up to more.
    """

    def __init__(
        self, rank: int, world: World, vectors: Mapping[str, Vector], step_time: Callable[[int], float]
    ) -> None:
        self.rank, self.workers, self.t, self.round = rank, world.workers, 0, 0
        self.ops, self.update, self._opens = world.ops, 0, False
        self.compute_s = self.exchange_s = self.wait_s = self.finished_s = 0.0
        self._world, self.kept, self._step_time = world, vectors, step_time
        self._vectors = {**world.shared, **vectors}
        self._vectors |= {name: world.shared[f"{name}{rank}"] for name in world.rule.allotted}
        self._seen, self._reads, self._beside_since_s = [0] * len(world.grid.blocks), 0, -1.0
        if world.rule.optimizer:
            state = {name: vectors[name] for name in (*world.rule.local, STEPS)}
            self._optimizer = Optimizer(world.rule.optimizer, vectors["x"], state, 0.0, MainMemory())
        self.ops.copy(self.x, self.c)  # x <- c
        world.rule.begin(cast(WorkerView, self))

    def __getattr__(self, name: str) -> Vector:
        try:
            return self.__dict__["_vectors"][name]
        except KeyError:
            raise AttributeError(f"{name}: the rule {self._world.rule.name} declares no such vector") from None

    # What rules use

    @property
    def lr(self) -> float:
        """η, constant."""
        return self._world.rule.lr

    @property
    def own(self) -> slice:
        """The coordinates that this worker alone writes."""
        return self._world.owned[self.rank]

    def turns(self) -> Iterator[slice]:
        """One exchange with the center, block by block, each held during its pass of the loop."""
        self._begin_exchange()
        yield from self._world.order.visit(self, self._world.traffic.turns)

    def read(self) -> Iterator[slice]:
        """The blocks of the center, to be read only, in a rendezvous."""
        self._begin_exchange()
        floats = self._world.traffic.reads
        self._reads += 1
        yield from self._world.order.read(self, floats[(self._reads - 1) % len(floats)])

    def grad(self, at: Vector | None = None, only: slice | None = None) -> Vector:
        """g at `at` (default x) at clock t, or some coordinates of it, after the time of a whole step."""
        g = self._world.problem.gradient(self.rank, self.t, self.x if at is None else at)
        if only is not None:
            g[: only.start] = g[only.stop :] = 0
        clock, step_s = self._world.clock, self._step_time(self.t)
        began_s = self._beside_since_s if self._beside_since_s >= 0 else clock.now_s
        try:
            clock.sleep(max(0.0, began_s + step_s - clock.now_s))
        finally:  # the end of the run may come first
            self.compute_s += min(step_s, clock.now_s - began_s)
        return g

    def optimize(self, g: Vector) -> None:
        """One step of the rule's local torch optimizer on x, with g."""
        self._optimizer.step(g, self.lr)

    # What orders use

    def wait(self) -> None:
        """Until somebody wakes it."""
        clock = self._world.clock
        before_s = clock.now_s
        try:
            clock.park()
        finally:
            self.wait_s += clock.now_s - before_s

    def move(self, places: int, floats: float) -> None:
        """Takes the time of moving so many of the center's places."""
        world = self._world
        before_s = world.clock.now_s
        try:
            if places:
                world.clock.sleep(places * world.machine.latency_s)
                world.link.transfer(world.machine.exchange_bytes(floats) * places / world.grid.places)
        finally:
            self.exchange_s += world.clock.now_s - before_s

    def take(self, block: Block, place: int) -> slice:
        """The block is in hand: its next update is ours, as visitor number `place` of the round (-1: no rounds)."""
        before = self._world.updates[block.number]
        self._world.staleness[before - self._seen[block.number]] += 1
        self.update, self._opens = before + 1, place == 0
        return block.coordinates

    def open(self, y: Vector) -> None:
        """y <- 0, part of the block in hand, at the first visit of the block in this round."""
        if self._opens:
            self.ops.fill(y, 0.0)

    def leave(self, block: Block) -> None:
        """Our update of the block is made."""
        self._seen[block.number] = self._world.updates[block.number] = self.update

    def _begin_exchange(self) -> None:
        if self._world.hides and self._beside_since_s < 0:
            self._beside_since_s = self._world.clock.now_s

    # The loop

    # Overflow and NaN end the run, and are not warned about. Here, as each greenlet has such settings of its own.
    @np.errstate(all="ignore")
    def run(self, go_on: Callable[[int], bool], stepped: Callable[[], None]) -> None:
        """Steps while `go_on(t)`, and says so after each."""
        while go_on(self.t):
            self._beside_since_s = -1.0
            self._world.rule.step(cast(WorkerView, self))
            self.t += 1
            stepped()
        self.finished_s = self._world.clock.now_s
