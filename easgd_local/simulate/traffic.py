"""What an exchange moves, found by looking at which coordinates of the center a rule's operations touch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from easgd_local.backend.cpu import CpuOps, Vector
from easgd_local.backend.operations import OPERATIONS, Operation
from easgd_local.rules.base import Rule, WorkerView

FLOATS = 64  # of each vector of the probe


@dataclass(frozen=True)
class Traffic:
    """Floats per parameter that a worker reads and writes at the center in one exchange.

    turns: while it holds the blocks.  reads: in each of a rendezvous' times of reading.  moves_x: whether the exchange
    changes x, so that a gradient at x has to wait for it.
    """

    turns: float
    reads: tuple[float, ...]
    moves_x: bool

    @property
    def floats(self) -> float:
        """Of the whole exchange: the column "traffic" of the README's table of rules."""
        return self.turns + sum(self.reads)


def traffic(rule: Rule, workers: int) -> Traffic:
    """What the exchange of step 0 moves, of a worker that is neither the first nor the last of its round.

    A coordinate in hand is read once and written once, however many operations use it; what a rule does once for all
    workers (`open`, `close`) is not counted. PASSM+ is counted as in its full steps, those where all is written.
    """
    probe = Probe(rule, workers)
    rule.step(cast(WorkerView, probe))
    return Traffic(probe.turned, tuple(probe.were_read), probe.moves_x)


class Probe:
    """A worker with nothing to compute, whose operations only note what they touch: every vector is part of one."""

    def __init__(self, rule: Rule, workers: int) -> None:
        self.rank, self.workers, self.t, self.lr, self.update = 0, workers, 0, rule.lr, 1
        self.turned, self.were_read, self.moves_x = 0.0, list[float](), False
        at_center = ("c", *rule.shared, *rule.allotted)
        names = (*at_center, "x", "g", *rule.local, *rule.scratch)
        self._n = FLOATS * workers if rule.divides else FLOATS
        self._center = self._n * len(at_center)  # so many floats at the front belong to the center
        self._all = np.zeros(self._n * len(names), np.float32)
        self._vectors = dict(zip(names, np.split(self._all, len(names)), strict=True))
        self._read, self._written = (np.zeros(len(self._all), bool) for _ in "rw")
        self.own = slice(0, FLOATS)
        self.ops = cast(CpuOps, self)

    def open(self, y: Any) -> None:
        """Once for all workers."""

    def __getattr__(self, name: str) -> Any:
        if name in OPERATIONS:
            return lambda *values: self._note(OPERATIONS[name], values)
        vectors: dict[str, Vector] = self.__dict__["_vectors"]
        if name in vectors:
            return vectors[name]
        raise AttributeError(name)

    def _note(self, operation: Operation, values: tuple[Any, ...]) -> None:
        vectors = [value for value in values if isinstance(value, np.ndarray)]  # the optional one is read, here nowhere
        for number, vector in enumerate(vectors[: operation.vectors]):
            start = (vector.__array_interface__["data"][0] - self._all.__array_interface__["data"][0]) // 4
            place = slice(start, start + len(vector))
            if number in operation.reads:
                self._read[place] |= ~self._written[place]
            if number in operation.writes:
                self._written[place] = True

    def _count(self, keep: Callable[[float], None]) -> Iterator[slice]:
        self._read[:] = self._written[:] = False
        yield slice(0, self._n)
        center = slice(0, self._center)
        keep(float(np.count_nonzero(self._read[center]) + np.count_nonzero(self._written[center])) / self._n)
        x = self._center // self._n
        self.moves_x |= bool(self._written[x * self._n : (x + 1) * self._n].any())

    def _keep_turns(self, floats: float) -> None:
        self.turned = floats

    def turns(self) -> Iterator[slice]:
        """The exchange: all in one block."""
        return self._count(self._keep_turns)

    def read(self) -> Iterator[slice]:
        """A time of reading: all in one block."""
        return self._count(self.were_read.append)

    def grad(self, at: Vector | None = None, only: slice | None = None) -> Vector:
        """No gradient at all."""
        return self._vectors["g"]

    def optimize(self, g: Vector) -> None:
        """Nothing to move."""
