"""The machine that is simulated: how long steps take, what the links carry, and where one of them is full."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

FLOAT_BYTES, CHUNK = 4, 64  # steps whose random numbers are drawn together
IN_ROUNDS = ("strict", "together")  # orders of turns in which all workers keep the slowest one's pace


def quantity(default: Any, help: str) -> Any:
    """A field of the machine, with the sentence that the command line shows for it."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a worker's step t takes, rank i, in seconds:

        step_s / speed_i · straggler (of the last worker) · exp(σz - σ²/2)     z standard normal, σ = spread

    so that the mean does not depend on the spread. Speeds are given to the workers in turn. An exchange moves the
    rule's floats per parameter through the worker's own link, and through the center's memory, which all links share;
    every block of the center costs the latency once. `overlap`: an exchange that leaves x alone goes on beside the
    gradient of the same step, as on a GPU; else one follows the other, as on CPUs.
    """

    step_s: float = quantity(0.1, "seconds of one step of a worker, without exchange")
    spread: float = quantity(0.0, "σ of the logarithm of a step's time; 0 for constant times")
    straggler: float = quantity(1.0, "how much longer the last worker's steps take")
    speeds: tuple[float, ...] = quantity((1.0,), "relative speeds of the workers, given to them in turn")
    parameters: float = quantity(25.6e6, "parameters of the model whose exchange is timed, whatever the problem has")
    link_gb_per_s: float = quantity(12.0, "bandwidth of each worker's link, 10^9 bytes a second; inf for no limit")
    memory_gb_per_s: float = quantity(100.0, "bandwidth of the center's memory, shared by all; inf for no limit")
    latency_s: float = quantity(1e-5, "seconds that each visit of a block costs beside its transfer")
    overlap: bool = quantity(False, "let the exchange go on beside the gradient where the rule allows it, as on a GPU")

    def __post_init__(self) -> None:
        for name in ("step_s", "straggler", "parameters", "link_gb_per_s", "memory_gb_per_s"):
            value, endless = getattr(self, name), name.endswith("gb_per_s")
            if not 0 < value or not (endless or value < math.inf):
                raise ValueError(
                    f"{name}={value:g}: must be positive{'' if endless else ' and finite'}; the default is "
                    f"{DEFAULTS[name]:g}."
                )
        for name in ("spread", "latency_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name):g}: must be at least 0 and finite; 0 is none.")
        if self.spread > 3:
            raise ValueError(f"spread={self.spread:g}: beyond 3 a few steps take nearly all the time; try 0.2.")
        wrong = [speed for speed in self.speeds if not 0 < speed < math.inf]
        if wrong or not self.speeds:
            raise ValueError(f"speeds={wrong[0] if wrong else ''}: each must be positive and finite; 1 is usual.")
        object.__setattr__(self, "speeds", tuple(map(float, self.speeds)))

    @property
    def link_bytes_per_s(self) -> float:
        return 1e9 * self.link_gb_per_s

    @property
    def memory_bytes_per_s(self) -> float:
        return 1e9 * self.memory_gb_per_s

    def mean_step_s(self, rank: int, workers: int) -> float:
        """The mean time of one step of worker `rank`."""
        late = self.straggler if rank == workers - 1 else 1.0
        return self.step_s / self.speeds[rank % len(self.speeds)] * late

    def step_times(self, rank: int, workers: int, seed: int) -> Callable[[int], float]:
        """t -> seconds of step t of worker `rank`: a pure function of (seed, rank, t)."""
        mean_s, spread = self.mean_step_s(rank, workers), self.spread
        if not spread:
            return lambda t: mean_s
        chunk, factors = -1, np.zeros(CHUNK)

        def step_time(t: int) -> float:
            nonlocal chunk, factors
            if t // CHUNK != chunk:
                chunk = t // CHUNK
                z = np.random.default_rng([seed, rank, chunk, 1]).standard_normal(CHUNK)
                factors = np.exp(spread * z - spread**2 / 2)
            return mean_s * float(factors[t % CHUNK])

        return step_time

    def exchange_bytes(self, floats: float) -> float:
        """Bytes of an exchange that moves so many floats per parameter."""
        return FLOAT_BYTES * floats * self.parameters


DEFAULTS: dict[str, Any] = {one.name: one.default for one in fields(Machine)}


@dataclass(frozen=True)
class Limits:
    """Where the machine is full, for a rule that moves B bytes every τ steps and takes its turns without waiting.

    A worker makes an exchange every cycle = τ·step + latencies + B/min(b, M) seconds (with `overlap`, where the rule
    allows it, step + the longer of the two hide: max(step, exchange) + (τ - 1)·step). Of unequal workers it is the
    slowest's where all keep pace, else that of their mean rate. The memory is full with

        p = M·cycle/B workers,   and a link with steps of less than (B/b)/τ seconds, whatever p is.
    """

    exchange_bytes: float
    exchange_s: float
    cycle_s: float
    memory_full_at: float  # workers

    @classmethod
    def of(
        cls,
        machine: Machine,
        *,
        floats: float,
        tau: int,
        visits: int,
        hides: bool,
        workers: int = 1,
        turns: str = "strict",
    ) -> Limits:
        """`visits`: blocks of an exchange, each of which costs the latency; `hides`: beside the gradient."""
        size_bytes = machine.exchange_bytes(floats)
        moving_s = size_bytes / min(machine.link_bytes_per_s, machine.memory_bytes_per_s)
        exchange_s = moving_s + visits * machine.latency_s
        cycles_s = []
        for rank in range(workers):
            step_s = machine.mean_step_s(rank, workers)
            first_s = max(step_s, exchange_s) if hides else step_s + exchange_s
            cycles_s.append(first_s + (tau - 1) * step_s)
        cycle_s = max(cycles_s) if turns in IN_ROUNDS else workers / sum(1 / one for one in cycles_s)
        full_at = machine.memory_bytes_per_s * cycle_s / size_bytes if size_bytes else math.inf
        return cls(size_bytes, exchange_s, cycle_s, full_at)
