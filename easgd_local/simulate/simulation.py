"""One simulation: a rule with p workers on a problem and a machine, from the start to the last step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from easgd_local.backend.cpu import CpuOps, Vector, vector
from easgd_local.center import BLOCK_BYTES
from easgd_local.optimizers import STEPS
from easgd_local.partition import share_out
from easgd_local.rules.base import Rule, WorkerView
from easgd_local.simulate.clock import Clock
from easgd_local.simulate.link import Link
from easgd_local.simulate.machine import IN_ROUNDS, Limits, Machine
from easgd_local.simulate.orders import ORDERS, Grid
from easgd_local.simulate.problems import Problem
from easgd_local.simulate.traffic import traffic
from easgd_local.simulate.worker import SimulatedWorker, World

MOST_WORKERS, MOST_GRADIENTS = 4096, 10**8
BLOWN_UP = 1e3  # times the error at the start: diverged


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Who runs, in which order of turns (default the rule's first), and for how long.

    steps: of each worker; under `free` and `none`, where workers need not keep pace, of each on average: the run ends
    when p·steps gradients are made.  target: an error, as a share of that at the start.  stops: at the target.
    points: how many times the center is measured.  block_bytes: of the toy's center.
    """

    rule: Rule
    workers: int
    turns: str | None = None
    steps: int = 1000
    seed: int = 0
    target: float = 0.05
    stops: bool = False
    points: int = 1000
    block_bytes: int = BLOCK_BYTES

    def __post_init__(self) -> None:
        rule, p = self.rule, self.workers
        if not 1 <= p <= MOST_WORKERS:
            raise ValueError(f"workers={p}: must lie between 1 and {MOST_WORKERS}; choose such a number.")
        if rule.sequential and p != 1:
            raise ValueError(f"workers={p}: the rule {rule.name} is sequential; use workers=1, or the rule easgd.")
        if self.turns is None:
            object.__setattr__(self, "turns", rule.orders[0])
        if self.turns not in rule.orders:
            raise ValueError(
                f"turns={self.turns}: the rule {rule.name} is defined for turns={' or '.join(rule.orders)}; leave "
                f"turns out for {rule.orders[0]}."
            )
        if not 1 <= self.steps * p <= MOST_GRADIENTS or self.steps < 1:
            raise ValueError(
                f"steps={self.steps}: with {p} workers it must be at least 1 and at most {MOST_GRADIENTS // p:,}, "
                f"or the simulation takes hours; try 1000."
            )
        if not 0 < self.target < 1:
            raise ValueError(f"target={self.target:g}: the share of the error at the start lies in (0, 1); try 0.05.")
        if self.points < 1:
            raise ValueError(f"points={self.points}: the center is measured at least once; try 1000.")
        rule.derived(p)  # says so where α would leave [0, 1]

    @property
    def period(self) -> int:
        """τ."""
        return self.rule.period


@dataclass(frozen=True)
class Outcome:
    """What a simulation gave. Seconds are virtual; the curve is of the vector that the rule reports.

    status: "done", "reached" (stopped at the target) or "diverged".  shares: of the workers' time, on average.
    memory_share, link_share: of the bandwidth of the center's memory, and of the workers' links, that was used.
    shared, x, local: vectors at the end.
    """

    scenario: Scenario
    status: str
    seconds: float
    gradients: int
    curve: Mapping[str, NDArray[np.float64]]  # seconds, gradients, error
    staleness: Mapping[int, int]
    shares: Mapping[str, float]  # compute, exchange, wait
    memory_share: float
    link_share: float
    limits: Limits
    shared: Mapping[str, Vector]
    x: list[Vector]
    local: list[dict[str, Vector]]

    @property
    def gradients_per_s(self) -> float:
        """Of all workers together."""
        return self.gradients / self.seconds if self.seconds else math.inf

    @cached_property
    def seconds_to_target(self) -> float:
        """When the target was first seen to be reached; infinite if it never was."""
        error = self.curve["error"]
        below = np.flatnonzero(error <= self.scenario.target * error[0])
        return float(self.curve["seconds"][below[0]]) if len(below) else math.inf


def simulate(scenario: Scenario, problem: Problem, machine: Machine) -> Outcome:
    """Runs it; `ValueError` where the rule cannot work with so many workers on this problem."""
    world = make_world(scenario, problem, machine)
    watch = Watch(world, scenario)
    team = make_team(world, scenario.seed)
    rounds, total = scenario.turns in IN_ROUNDS, scenario.steps * scenario.workers
    begun = iter(range(total))

    def go_on(t: int) -> bool:
        return t < scenario.steps if rounds else next(begun, None) is not None

    world.clock.run([partial(one.run, go_on, watch.stepped) for one in team], lambda: watch.status != "done")
    with np.errstate(all="ignore"):  # as in the workers
        watch.measure()
    return outcome(world, watch, team)


def make_world(scenario: Scenario, problem: Problem, machine: Machine) -> World:
    """The center at the problem's start, before anybody moves it."""
    rule, p, clock = scenario.rule, scenario.workers, Clock()
    copies = [f"{name}{i}" for name in rule.allotted for i in range(p)]
    shared = {name: vector(problem.n) for name in ("c", *rule.shared)} | dict(
        zip(copies, _rows(len(copies), problem.n), strict=True)
    )
    for name in ("c", *rule.copies, *copies):
        if name in shared:
            shared[name][:] = problem.start
    grid = Grid.of(p, problem.n, machine.parameters, scenario.block_bytes)
    order = ORDERS[str(scenario.turns)](grid, clock, lambda w, b: rule.close(cast(WorkerView, w), b))
    link = Link(clock, machine.link_bytes_per_s, machine.memory_bytes_per_s)
    owned = share_out(problem.layers, p) if rule.divides else []
    return World(rule, problem, machine, p, clock, link, grid, order, traffic(rule, p), CpuOps(), shared, owned)


def make_team(world: World, seed: int) -> list[SimulatedWorker]:
    """The workers at their starts. Their vectors lie in one piece of memory, each from a 64-byte line on."""
    names = ("x", *world.rule.local, *world.rule.scratch, *([STEPS] if world.rule.optimizer else []))
    rows = _rows(world.workers * len(names), world.problem.n)
    team = []
    for rank in range(world.workers):
        own = dict(zip(names, rows[rank * len(names) :], strict=False))
        if STEPS in own:
            own[STEPS] = own[STEPS][:1]
        team.append(SimulatedWorker(rank, world, own, world.machine.step_times(rank, world.workers, seed)))
    return team


class Watch:
    """Looks at the center every so many gradients, and ends what has diverged, or reached its target."""

    def __init__(self, world: World, scenario: Scenario) -> None:
        self._world, self.scenario, self.status, self.gradients = world, scenario, "done", 0
        self._every = max(1, scenario.steps * scenario.workers // scenario.points)
        self.rows: list[tuple[float, int, float]] = []
        self.measure()

    def stepped(self) -> None:
        """One more gradient is made."""
        self.gradients += 1
        if self._world.ops.nonfinite:
            self.status = "diverged"
        elif self.gradients % self._every == 0:
            self.measure()

    def measure(self) -> None:
        """One more point of the curve."""
        if self.rows and self.rows[-1][1] == self.gradients:
            return
        error = self._world.problem.error(self._world.shared[self._world.rule.reported])
        self.rows.append((self._world.clock.now_s, self.gradients, error))
        first = self.rows[0][2]
        if not error <= BLOWN_UP * first:
            self.status = "diverged"
        elif self.scenario.stops and error <= self.scenario.target * first:
            self.status = "reached"


def outcome(world: World, watch: Watch, team: list[SimulatedWorker]) -> Outcome:
    """The numbers of a simulation that has ended."""
    seconds, machine, p = world.clock.now_s, world.machine, world.workers
    lived = sum(one.finished_s or seconds for one in team) or 1.0
    shares = {name: sum(getattr(one, f"{name}_s") for one in team) / lived for name in ("compute", "exchange", "wait")}
    used_bytes_per_s = world.link.moved_bytes / seconds if seconds else 0.0
    memory, links = used_bytes_per_s / machine.memory_bytes_per_s, used_bytes_per_s / (p * machine.link_bytes_per_s)
    limits = Limits.of(
        machine,
        floats=world.traffic.floats,
        tau=world.rule.period,
        visits=world.grid.places,
        hides=world.hides,
        workers=p,
        turns=str(watch.scenario.turns),
    )
    columns: dict[str, Any] = dict(zip(("seconds", "gradients", "error"), np.array(watch.rows, float).T, strict=True))
    local = [{name: value for name, value in one.kept.items() if name != "x"} for one in team]
    return Outcome(
        watch.scenario, watch.status, seconds, watch.gradients, columns, dict(sorted(world.staleness.items())), shares,
        memory, links, limits, dict(world.shared), [one.x for one in team], local,
    )  # fmt: skip


def _rows(count: int, n: int) -> list[Vector]:
    """Zeros: `count` vectors of n, each from a 64-byte line on."""
    length = -(-n // 16) * 16
    memory = vector(count * length)
    return [memory[row * length : row * length + n] for row in range(count)]
