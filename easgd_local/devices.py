"""Where a worker computes: its vectors, its operations, its way to the center, and the way back to numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from easgd_local.backend.cpu import CpuOps, vector
from easgd_local.backend.cuda import CudaOps, Gpu, Transfer
from easgd_local.center import Center
from easgd_local.schedules import Calendar
from easgd_local.stream_turns import StreamTurns
from easgd_local.turns import FreeTurns, NoTurns, StrictTurns, TogetherTurns, Turns

Array = NDArray[np.float32]


class Place(Protocol):
    """What a worker needs of its device. `shared` are the center's vectors as rules see them in an exchange."""

    ops: Any
    shared: Mapping[str, Any]

    def vector(self, n: int) -> Any:
        """n zeros."""

    def load(self, y: Any, values: Array) -> None:
        """y <- values."""

    def host(self, x: Any) -> Array:
        """The values of x, for reading."""

    def turns(self, order: str, hold: Callable[[], None], first_round: int, close: Callable[[slice], None]) -> Turns:
        """The worker's way to the center in this order of turns."""


class OnCpu:
    """Main memory and NumPy; waits for turns in place."""

    def __init__(self, center: Center, rank: int, calendar: Calendar) -> None:
        self._center, self._rank, self._calendar = center, rank, calendar
        self.ops, self.shared = CpuOps(), center.vectors

    def vector(self, n: int) -> Array:
        return vector(n)

    def load(self, y: Array, values: Array) -> None:
        np.copyto(y, values)

    def host(self, x: Array) -> Array:
        return x

    def turns(self, order: str, hold: Callable[[], None], first_round: int, close: Callable[[slice], None]) -> Turns:
        center, rank = self._center, self._rank
        if order == "free":  # without common rounds a worker holds at its boundary
            return FreeTurns(center, rank, lambda: None)
        if order == "none":
            return NoTurns(center, rank, lambda: None)
        rounds = {"strict": StrictTurns, "together": TogetherTurns}[order]
        return rounds(center, rank, self._calendar, hold, first_round, close)


class OnGpu:
    """Memory and streams of a device; turns are waited for by the device. Close `gpu` before the center.

    Only strict turns can be enqueued yet. Rules' vectors are `DeviceVector`s.
    """

    def __init__(self, center: Center, rank: int, calendar: Calendar, gpu: Gpu) -> None:
        self.gpu, self.ops, self._transfer = gpu, CudaOps(gpu), Transfer(gpu)
        self._turns = StreamTurns(center, rank, calendar, gpu, self.ops)
        self.shared = self._turns.staged

    def vector(self, n: int) -> Any:
        new = self.gpu.allocate(n)
        self.gpu.training.fill(new.address, 0, n)
        return new

    def load(self, y: Any, values: Array) -> None:
        self.ops.wait_for_exchange()
        self._transfer.load(y, values)

    def host(self, x: Any) -> Array:
        self.ops.wait_for_exchange()
        return self._transfer.host(x)

    def turns(self, order: str, hold: Callable[[], None], first_round: int, close: Callable[[slice], None]) -> Turns:
        if order != "strict":
            raise ValueError(f"turns={order}: on a GPU turns are taken in stream order, strict only; use turns=strict.")
        self._turns.round = first_round
        return self._turns
