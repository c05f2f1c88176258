"""Where a worker computes: its vectors, its operations, its way to the center, and the way back to numpy."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from ctypes import c_float
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from easgd_local.backend.cpu import CpuOps
from easgd_local.backend.cuda import CudaOps, DeviceVector, Gpu, Transfer
from easgd_local.center import Center
from easgd_local.free_turns import FreeTurns
from easgd_local.graphics import Graphics
from easgd_local.link import Link
from easgd_local.memory import MainMemory, Memory
from easgd_local.schedules import Calendar
from easgd_local.stream_turns import ORDERS, StreamTurns
from easgd_local.turns import NoTurns, StrictTurns, TogetherTurns, Turns

Array = NDArray[np.float32]
Close = Callable[[slice], None]  # ends a round for a block
# What CUDA is told before it starts, unless the user said otherwise: as many queues as there can be, since of two
# streams in one queue one waits behind the other; room for steps that are enqueued behind an exchange; and a workspace
# for cuBLAS with which it gives the same bits every time.
ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_SCALE_LAUNCH_QUEUES": "4x", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"
}  # fmt: skip
LEGACY = 1  # the driver's handle of torch's default stream, whose own is 0: CU_STREAM_LEGACY


def set_environment() -> None:
    """Says so, in this process."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def take_seat(graphics: Graphics | None, rank: int) -> torch.device:
    """Makes torch compute for worker `rank` on its GPU, on its default stream as everywhere; where that is: the CPU
    without GPUs."""
    if graphics is None or graphics.pretended:
        return torch.device("cpu")
    set_environment()
    device = torch.device("cuda", graphics.device_of(rank))
    torch.cuda.init()
    torch.cuda.set_device(device)
    return device


class Place(Memory, Protocol):
    """What a worker needs of its device. `shared` are the center's vectors as rules see them in an exchange."""

    ops: Any
    shared: Mapping[str, Any]

    def load(self, y: Any, values: Array) -> None:
        """y <- values."""

    def host(self, x: Any) -> Array:
        """The values of x, for reading, when everything enqueued is done."""

    def turns(self, order: str, hold: Callable[[], None], first_round: int, close: Close | None) -> Turns:
        """The worker's way to the center in this order of turns."""

    def step_made(self) -> None:
        """The worker has made a step, or enqueued it: waits if it is too far ahead of its device."""

    def drain(self) -> None:
        """Returns when everything enqueued is done."""

    def settle(self) -> None:
        """Returns when `ops.nonfinite` counts all that was done."""

    def close(self, *, drained: bool) -> None:
        """Gives everything back; what is not drained is left to the end of the process."""


class OnCpu(MainMemory):
    """Main memory and NumPy; waits for turns in place."""

    def __init__(self, center: Center, rank: int, calendar: Calendar) -> None:
        super().__init__()
        self._center, self._rank, self._calendar = center, rank, calendar
        self.ops = CpuOps()
        self.shared: Mapping[str, Any] = center.vectors

    def load(self, y: Array, values: Array) -> None:
        np.copyto(y, values)

    def host(self, x: Array) -> Array:
        return x

    def turns(self, order: str, hold: Callable[[], None], first_round: int, close: Close | None) -> Turns:
        center, rank = self._center, self._rank
        if order == "free":
            return FreeTurns(center, rank, hold)
        if order == "none":
            return NoTurns(center, rank, hold)
        rounds = {"strict": StrictTurns, "together": TogetherTurns}[order]
        return rounds(center, rank, self._calendar, hold, first_round, close)

    def step_made(self) -> None: ...

    def drain(self) -> None: ...

    def settle(self) -> None: ...

    def close(self, *, drained: bool) -> None: ...


class OnGpu:
    """Memory and streams of a device; turns are waited for by the device. Rules' vectors are `DeviceVector`s.

    torch computes on the same device, on a stream of its own or, for a loop that has taken its seat (`seated`), on the
    one that is current when this is made; or, where the driver is one that only pretends, on the processor, in the
    memory that is taken for the device's.
    """

    def __init__(
        self, center: Center, rank: int, calendar: Calendar, graphics: Graphics, *, seated: bool = False
    ) -> None:
        self._pretended, number = graphics.pretended, graphics.device_of(rank)
        self.device, handle = torch.device("cpu") if graphics.pretended else torch.device("cuda", number), 0
        if seated and not graphics.pretended:
            handle = torch.cuda.current_stream(self.device).cuda_stream or LEGACY
        set_environment()
        self._torch_stream: torch.cuda.Stream | None = None
        self.gpu = Gpu(graphics.images_for(rank), number, handle)
        if not graphics.pretended and not handle:
            # torch's own streams come many at a time, more than the device has queues: so it gets one of ours.
            torch.cuda.set_device(self.device)
            self._torch_stream = torch.cuda.ExternalStream(self.gpu.training.handle, device=self.device)
            torch.cuda.set_stream(self._torch_stream)
        self.ops, self._transfer = CudaOps(self.gpu), Transfer(self.gpu)
        self._link = Link(center, self.gpu, self.ops, graphics.exchange)
        self._rank, self._calendar, self._words = rank, calendar, graphics.words
        self.shared: Mapping[str, Any] = self._link.shared

    def vector(self, n: int) -> DeviceVector:
        new = self.gpu.allocate(n)
        if n:
            self.gpu.training.fill(new.address, 0, n)
        return new

    def tensor(self, x: DeviceVector) -> Tensor:
        if self._pretended:
            return torch.from_numpy(np.ctypeslib.as_array((c_float * len(x)).from_address(x.address)))
        return torch.as_tensor(x, device=self.device) if len(x) else torch.empty(0, device=self.device)

    def touch(self, reads: Sequence[DeviceVector], writes: Sequence[DeviceVector]) -> None:
        self.ops.order(list(reads), list(writes))
        if self._pretended:  # torch does not queue behind the training stream
            self._turns.until(self.gpu.training.is_done)

    def load(self, y: DeviceVector, values: Array) -> None:
        self.ops.wait_for_exchange()
        self._transfer.load(y, values)

    def host(self, x: DeviceVector) -> Array:
        self.drain()
        return self._transfer.host(x)

    def turns(self, order: str, hold: Callable[[], None], first_round: int, close: Close | None) -> Turns:
        kind = ORDERS[order]
        self._turns: StreamTurns = kind(self._link, self._rank, self._calendar, self._words, hold, first_round, close)
        return self._turns

    def step_made(self) -> None:
        self._turns.step_made()

    def drain(self) -> None:
        self._turns.drain()

    def settle(self) -> None:
        self.ops.settle()

    def close(self, *, drained: bool) -> None:
        if self._torch_stream is not None:  # it goes with the rest
            torch.cuda.set_stream(torch.cuda.default_stream(self.device))
        if not drained:  # a stream may wait for somebody who never comes, and the driver would wait for the stream
            self.gpu.abandon()
        self.gpu.__exit__(None, None, None)


def place_of(
    center: Center, rank: int, calendar: Calendar, graphics: Graphics | None, *, seated: bool = False
) -> Place:
    """The worker's place: on its GPU, where a loop may have its seat already, or on the CPU without `graphics`."""
    if graphics is None:
        return OnCpu(center, rank, calendar)
    return OnGpu(center, rank, calendar, graphics, seated=seated)
