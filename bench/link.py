"""What does the link between host and device carry?

GB = 10^9 bytes a second over the link, both directions counted, for a sequence of blocks that lie one behind the other
in host memory pinned where it lies, as the center is:

- to device, back, both: by the copy engines; both at once on two streams.
- zero-copy: by the kernel `copy` from mapped host memory to the device, and back, and by `pull` with c mapped: reads c
  and writes it, x and d being on the device.

The bound is the same bytes in one copy each way, by the copy engines, timed alternately with the blocks. `enqueue_us`
is the host's time for one block: what is enqueued slower than it is carried shows the host, not the link.

First the result is checked: what went to the device and came back is equal to the bit, and `pull` equals the CPU's.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, NoReturn, Protocol

import harness
import numpy as np

from easgd_local import linux
from easgd_local.backend.cpu import CpuOps
from easgd_local.backend.cuda import CudaOps, DeviceVector, Gpu, Transfer
from easgd_local.backend.driver import Driver, DriverError
from easgd_local.backend.resources import DeviceMemory, Event, HostMemory, Stream
from easgd_local.devices import set_environment
from easgd_local.graphics import Graphics, look

QUESTION = "What does the link between host and device carry?"
BLOCKS_BYTES = (64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20)
TOTAL_BYTES, QUICK_TOTAL_BYTES = 256 << 20, 32 << 20
REPETITIONS, QUICK_REPETITIONS = 21, 3
CHECKED_FLOATS, CHECKED_BLOCK_BYTES = 100_003, 64 << 10
ALPHA = 0.45
HOLD_CYCLES = 1_000_000  # about half a millisecond
HOST_CYCLES_PER_S, MOST_HOLDS = 4e9, 4  # no GPU's clock is that fast
MOST_HOLD_CYCLES = 200_000_000  # a tenth of a second at 2 GHz
MOST_BLOCKS = 500  # in a sequence, that it may fit into the device's queue: else the host is what is timed
NO_GPU = 2  # exit code

Enqueue = Callable[[], None]


# What all benches of a GPU share


def driver_for(bench: str) -> Driver:
    """The machine's driver; without a GPU the process ends with one sentence."""
    try:
        return Driver.open()
    except DriverError as error:
        give_up(f"{bench}: no GPU: {str(error).rstrip('.')}; run it on a machine with one.")


def graphics_for(bench: str, given: argparse.Namespace) -> Graphics:
    """The GPUs and their kernels; what is missing ends the process with one sentence. Starts CUDA in this process."""
    set_environment()
    driver = driver_for(bench)
    if driver.pretended and given.results and given.results.resolve().is_relative_to(harness.RESULTS):
        give_up(f"{bench}: results={given.results}: the driver only pretends to be one; give a folder outside of it.")
    if not driver.pretended:
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_device(0)  # torch holds the context, or it would end when `look` is through with it
    try:
        return look()
    except ValueError as error:
        give_up(f"{bench}: {error}")


def give_up(sentence: str) -> NoReturn:
    """Ends the process."""
    print(sentence, file=sys.stderr)
    raise SystemExit(NO_GPU)


def about(bench: str, graphics: Graphics) -> harness.Row:
    """`harness.about` with the driver's version; where the driver only pretends to be one, the row says so."""
    common = harness.about(bench)
    version = Driver.open().version
    common["versions"]["cuda_driver"] = f"{version // 1000}.{version % 1000 // 10}"
    return {**common, "pretended": True} if graphics.pretended else common


def record(rows: Iterable[harness.Row], common: harness.Row, given: argparse.Namespace) -> list[harness.Row]:
    """`harness.record`, but pretended rows go nowhere by themselves."""
    if "pretended" in common:
        given = argparse.Namespace(**{**vars(given), "quick": True})
    return harness.record(rows, common, given)


class Rig:
    """GPU 0 with kernels, operations and a clock. What torch enqueues goes to the same stream as the operations."""

    def __init__(self, graphics: Graphics) -> None:
        self.pretended, self.stream = graphics.pretended, None
        if not graphics.pretended:
            import torch

            torch.cuda.set_device(0)
            self.stream = torch.cuda.Stream()
            torch.cuda.set_stream(self.stream)
        self.gpu = Gpu(graphics.images_for(0), 0, self.stream.cuda_stream if self.stream else 0)
        self.ops, self.transfer = CudaOps(self.gpu), Transfer(self.gpu)

    def timer(self, enqueue: Enqueue, before: Enqueue = lambda: None) -> Timer:
        """For what is enqueued behind `before`."""
        return TimerByClock(self, enqueue, before) if self.pretended else TimerByEvents(self, enqueue, before)

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.gpu.__exit__(*exc)


class Timer(Protocol):
    """A call: seconds of the device for what is enqueued, and of the host for enqueueing it."""

    def __call__(self) -> tuple[float, float]: ...


class TimerByEvents:
    """The device is held back until all is enqueued, or it would wait for the host meanwhile. If that was not long
    enough, the next try holds it longer, and so do all later calls; after `MOST_HOLDS` tries the last one counts, and
    later calls begin anew: more than the device's queue takes cannot be enqueued beforehand, however long it waits."""

    def __init__(self, rig: Rig, enqueue: Enqueue, before: Enqueue) -> None:
        self._rig, self._enqueue, self._before, self._hold = rig, enqueue, before, HOLD_CYCLES

    def __call__(self) -> tuple[float, float]:
        for _ in range(MOST_HOLDS):
            early, device_s, host_s = self._try()
            if not early:
                return device_s, host_s
            self._hold = min(max(2 * self._hold, int(HOST_CYCLES_PER_S * host_s)), MOST_HOLD_CYCLES)
        self._hold = HOLD_CYCLES
        return device_s, host_s

    def _try(self) -> tuple[bool, float, float]:
        """Whether the device set off too early, and the two times."""
        import torch

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._before()
        torch.cuda._sleep(self._hold)
        begin.record(self._rig.stream)
        began = time.perf_counter()
        self._enqueue()
        host_s, early = time.perf_counter() - began, begin.query()
        end.record(self._rig.stream)
        end.synchronize()
        return early, begin.elapsed_time(end) / 1e3, host_s


class TimerByClock:
    """The host's clock, for a driver that only pretends."""

    def __init__(self, rig: Rig, enqueue: Enqueue, before: Enqueue) -> None:
        self._training, self._enqueue, self._before = rig.gpu.training, enqueue, before

    def __call__(self) -> tuple[float, float]:
        self._before()
        self._training.synchronize()
        began = time.perf_counter()
        self._enqueue()
        host_s = time.perf_counter() - began
        self._training.synchronize()
        return time.perf_counter() - began, host_s


# The link


class Ends:
    """Both ends of the link: n floats in pinned host memory to be sent, n to be received, and the same on the device.

    Everything enqueued starts when the training stream has got there, and that stream goes on when all of it is done.
    A context manager: at its end nothing enqueued may be under way.
    """

    def __init__(self, gpu: Gpu, n: int) -> None:
        self.gpu, self.n, self._stack = gpu, n, ExitStack()
        half = -(-4 * n // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = shared_memory(2 * half)
        self.sent, self.received = (np.frombuffer(memory, np.float32, n, offset) for offset in (0, half))
        address, own = ctypes.addressof(ctypes.c_char.from_buffer(memory)), self._stack.enter_context
        host = own(HostMemory.register(gpu.driver, address, 2 * half))
        self._sent, self._received = address, address + half
        self.mapped_sent, self.mapped_received = (mapped_at(host.device_address(at), n) for at in (0, half))
        memories = [own(DeviceMemory.allocate(gpu.driver, 4 * n)).handle for _ in range(2)]
        self.target, self.source = (DeviceVector(address, n, address) for address in memories)
        self._into, self._out = (own(Stream.create(gpu.driver)) for _ in range(2))
        self._ready, self._in, self._gone = (own(Event.create(gpu.driver)) for _ in range(3))

    def to_device(self, block_bytes: int) -> None:
        """target <- sent"""
        self._set_off()
        for b in self.blocks(block_bytes):
            self._copy_in(b)
        self._meet()

    def back(self, block_bytes: int) -> None:
        """received <- source"""
        self._set_off()
        for b in self.blocks(block_bytes):
            self._copy_out(b)
        self._meet()

    def both(self, block_bytes: int) -> None:
        """target <- sent  and  received <- source, at once"""
        self._set_off()
        for b in self.blocks(block_bytes):
            self._copy_in(b)
            self._copy_out(b)
        self._meet()

    def blocks(self, block_bytes: int) -> Iterator[slice]:
        """One behind the other; the last may be shorter."""
        floats = block_bytes // 4
        for start in range(0, self.n, floats):
            yield slice(start, min(start + floats, self.n))

    def _copy_in(self, b: slice) -> None:
        self._into.copy_to_device(self.target[b].address, self._sent + 4 * b.start, 4 * (b.stop - b.start))

    def _copy_out(self, b: slice) -> None:
        self._out.copy_to_host(self._received + 4 * b.start, self.source[b].address, 4 * (b.stop - b.start))

    def _set_off(self) -> None:
        self._ready.record(self.gpu.training)
        self._into.wait_event(self._ready)
        self._out.wait_event(self._ready)

    def _meet(self) -> None:
        for event, stream in ((self._in, self._into), (self._gone, self._out)):
            event.record(stream)
            self.gpu.training.wait_event(event)

    def __enter__(self) -> Ends:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()


def shared_memory(size_bytes: int) -> mmap.mmap:
    """A mapping of a new memfd, all of it claimed, as the center is."""
    fd = linux.memfd_create("bench_link")
    try:
        os.posix_fallocate(fd, 0, size_bytes)
        return mmap.mmap(fd, size_bytes, mmap.MAP_SHARED)
    finally:
        os.close(fd)


def mapped_at(address: int, n: int) -> DeviceVector:
    """Host memory as kernels see it."""
    return DeviceVector(address, n, address, mapped=True)


class ZeroCopy:
    """The same by kernels that reach through the link, on the training stream."""

    def __init__(self, ends: Ends, ops: CudaOps) -> None:
        self._ends, self._ops = ends, ops

    def to_device(self, block_bytes: int) -> None:
        """target <- sent"""
        for b in self._ends.blocks(block_bytes):
            self._ops.copy(self._ends.target[b], self._ends.mapped_sent[b])

    def back(self, block_bytes: int) -> None:
        """received <- source"""
        for b in self._ends.blocks(block_bytes):
            self._ops.copy(self._ends.mapped_received[b], self._ends.source[b])

    def pull(self, block_bytes: int) -> None:
        """The exchange with x = target, c = received and d = source."""
        ends = self._ends
        for b in ends.blocks(block_bytes):
            self._ops.pull(ends.target[b], ends.mapped_received[b], ends.source[b], ALPHA)


def measure(rig: Rig, most_bytes: int, repetitions: int) -> Iterator[harness.Row]:
    """Rows of every size of blocks: as many of them as the bytes allow, and the device's queue."""
    for block_bytes in BLOCKS_BYTES:
        with Ends(rig.gpu, min(most_bytes, MOST_BLOCKS * block_bytes) // 4) as ends:
            yield from measure_ways(rig, ends, block_bytes, repetitions)


def measure_ways(rig: Rig, ends: Ends, block_bytes: int, repetitions: int) -> Iterator[harness.Row]:
    """Rows of every way."""
    total_bytes, kernels = 4 * ends.n, ZeroCopy(ends, rig.ops)
    ends.sent[:] = ends.received[:] = 1.0
    ends.to_device(total_bytes)
    rig.ops.fill(ends.source, 1.0)
    ways: dict[str, tuple[Callable[[int], None], Callable[[int], None], int]] = {  # blocks, bound, bytes over the link
        "to device": (ends.to_device, ends.to_device, total_bytes),
        "back": (ends.back, ends.back, total_bytes),
        "both": (ends.both, ends.both, 2 * total_bytes),
        "zero-copy to device": (kernels.to_device, ends.to_device, total_bytes),
        "zero-copy back": (kernels.back, ends.back, total_bytes),
        "zero-copy pull": (kernels.pull, ends.both, 2 * total_bytes),
    }
    for way, (carry, bound, size_bytes) in ways.items():
        carrying, whole = rig.timer(partial(carry, block_bytes)), rig.timer(partial(bound, total_bytes))
        timings, whole_s = [], []
        for _ in range(repetitions + 1):  # the first is not counted
            timings.append(carrying())
            whole_s.append(whole()[0])
        entry = f"{way}, blocks of {block_bytes >> 10} KiB"
        yield row(entry, size_bytes, -(-total_bytes // block_bytes), timings[1:], whole_s[1:])


def row(entry: str, size_bytes: int, blocks: int, timings: Any, whole_s: list[float]) -> harness.Row:
    """One row; the share is taken repetition by repetition."""
    carried_s, host_s = np.array(timings).T
    bound_s = np.array(whole_s)
    return {
        "entry": entry,
        "link_bytes": size_bytes,
        "blocks": blocks,
        "carried_s": harness.spread(carried_s),
        "enqueue_us": harness.spread(1e6 * host_s / blocks),
        "gb_per_s": harness.spread(1e-9 * size_bytes / carried_s),
        "whole_gb_per_s": harness.spread(1e-9 * size_bytes / bound_s),
        "share_of_whole": harness.spread(bound_s / carried_s),
    }


def check(rig: Rig, ends: Ends) -> None:
    """Every way brings what it should, to the bit."""
    kernels, training = ZeroCopy(ends, rig.ops), rig.gpu.training
    for seed, (there, home) in enumerate(((ends.to_device, ends.back), (kernels.to_device, kernels.back))):
        ends.sent[:] = random(seed)
        there(CHECKED_BLOCK_BYTES)
        rig.ops.copy(ends.source, ends.target)
        home(CHECKED_BLOCK_BYTES)
        training.synchronize()
        assert np.array_equal(ends.received, ends.sent), f"there and home differ: {there.__qualname__}"
    earlier = ends.sent.copy()
    ends.sent[:], ends.received[:] = random(2), 0
    ends.both(CHECKED_BLOCK_BYTES)
    assert np.array_equal(rig.transfer.host(ends.target), ends.sent), "both at once: what came to the device differs"
    assert np.array_equal(ends.received, earlier), "both at once: what came back differs"
    c, d = ends.received.copy(), np.empty_like(earlier)
    kernels.pull(CHECKED_BLOCK_BYTES)
    CpuOps().pull(ends.sent.copy(), c, d, ALPHA)
    assert np.array_equal(rig.transfer.host(ends.source), d), "d of the pull differs from the CPU's"
    assert np.array_equal(ends.received, c), "c of the pull differs from the CPU's"


def random(seed: int) -> Any:
    """Standard normal values."""
    return np.random.default_rng(seed).standard_normal(CHECKED_FLOATS, np.float32)


def main() -> None:
    parser = harness.arguments(QUESTION)
    parser.add_argument("--mebibytes", type=int, help=f"of the longest sequence of blocks; default {TOTAL_BYTES >> 20}")
    given = parser.parse_args()
    total_bytes = given.mebibytes << 20 if given.mebibytes else QUICK_TOTAL_BYTES if given.quick else TOTAL_BYTES
    graphics = graphics_for("link", given)
    common = about("link", graphics)
    repetitions = given.repetitions or (QUICK_REPETITIONS if given.quick else REPETITIONS)
    with Rig(graphics) as rig:
        with Ends(rig.gpu, CHECKED_FLOATS) as ends:
            check(rig, ends)
        record(measure(rig, total_bytes, repetitions), common, given)


if __name__ == "__main__":
    main()
