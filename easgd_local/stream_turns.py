"""Turns in stream order: a worker on a GPU enqueues its whole exchange and waits for nothing.

Every turn number is known when it is enqueued, so the waiting is the device's. Two streams, and a few staging buffers
on the device for blocks of the center:

    in    wait: buffer free;  wait: turn[b] >= s;  copy the block to the buffer;                       event: loaded
    out   wait: loaded;  the rule's operations;  copy the block back;  turn[b] <- s + 1 behind a barrier;  event: free

so that one block is fetched while another one is worked on and a third travels back, and all of it goes on beside the
forward and backward pass, until training touches what the exchange still has in hand (`CudaOps.order`).

None of this has run on a real GPU yet: tests run it against a pretended driver.
"""

from __future__ import annotations

from collections.abc import Iterator

from easgd_local.backend.cuda import CudaOps, DeviceVector, Gpu
from easgd_local.backend.driver import Event, Stream
from easgd_local.center import Center
from easgd_local.schedules import Calendar
from easgd_local.turns import position, walk
from easgd_local.words import LINE_BYTES

DEPTH = 3  # staging buffers: one coming, one in hand, one going


class Staged:
    """A shared vector as rules see it in an exchange on a GPU: the copy on the device of the block in hand."""

    def __init__(self, buffers: list[DeviceVector]) -> None:
        self._buffers = buffers
        self._block, self._buffer = slice(0, 0), buffers[0]

    def hold(self, block: slice, place: int) -> None:
        """Block `block` is in staging buffer `place`."""
        self._block, self._buffer = block, self._buffers[place]

    def __getitem__(self, b: slice) -> DeviceVector:
        start, stop = b.start - self._block.start, b.stop - self._block.start
        assert stop <= start or (0 <= start and stop <= self._block.stop - self._block.start), f"{b} is not in hand"
        return self._buffer[max(0, start) : max(0, start, stop)]


class StreamTurns:
    """The Latin square of `turns.StrictTurns`, in stream order. The center's memory is pinned while this is open."""

    stale = 0  # not known: updates are counted in the stream
    counts, opens = True, False
    wait_s = 0.0  # the processor does not wait

    def __init__(
        self, center: Center, rank: int, calendar: Calendar, gpu: Gpu, ops: CudaOps, first_round: int = 0
    ) -> None:  # fmt: skip
        self.center, self.rank, self.round, self.update = center, rank, first_round, 0
        self._calendar, self._gpu, self._ops = calendar, gpu, ops
        layout = center.layout
        self.workers, self.blocks = layout.workers, layout.blocks
        self.waited_for_s = [0.0] * self.workers
        host = gpu.register(center.memory, layout.size_bytes)
        self._host, self._mapped = host.handle, host.device_address()
        self._in, self._out = (gpu.own(Stream.create(gpu.driver)) for _ in range(2))
        largest = max(layout.block(b).stop - layout.block(b).start for b in range(self.blocks))
        self.staged = {name: Staged([gpu.allocate(largest) for _ in range(DEPTH)]) for name in layout.shared}
        self._loaded, self._free = ([gpu.own(Event.create(gpu.driver)) for _ in range(DEPTH)] for _ in range(2))
        self._ready, self._done = (gpu.own(Event.create(gpu.driver)) for _ in range(2))
        self._visits = 0

    def visit(self) -> Iterator[slice]:
        """One exchange: yields the blocks in turn; what the caller does with each is enqueued."""
        self._ready.record(self._gpu.training)  # what the training stream has made so far, the exchange may use
        self._out.wait_event(self._ready)
        snapshot = self._calendar.snapshot_after(self.round)
        for b in walk(self.rank, self.workers, self.blocks):
            place = position(b, self.rank, self.workers, self.blocks)
            s, block, buffer = self.round * self.workers + place, self.center.layout.block(b), self._visits % DEPTH
            self._visits += 1
            self._fetch(b, s, block, buffer)
            self.update = s + 1
            with self._ops.on(self._out):
                yield block
            self._bring_back(b, s, block, snapshot and place == self.workers - 1)
            self._free[buffer].record(self._out)
        self._gpu.fetch_counter(self._out)
        self._done.record(self._out)
        self._ops.exchange_ends(self._done)
        self.round += 1

    def _fetch(self, b: int, s: int, block: slice, buffer: int) -> None:
        self._in.wait_event(self._free[buffer])
        self._in.wait_value(self._word("turn", b), s)
        for name, staged in self.staged.items():
            staged.hold(block, buffer)
            to = staged[block]
            if len(to):
                self._in.copy_to_device(to.address, self._host + self._place(name, block), 4 * len(to))
        self._loaded[buffer].record(self._in)
        self._out.wait_event(self._loaded[buffer])

    def _bring_back(self, b: int, s: int, block: slice, snapshot: bool) -> None:
        earlier = self._calendar.previous_snapshot(self.round)
        if snapshot and earlier is not None:
            # 1. The launcher still reads the snapshot of an earlier round, 2. we overwrite it: hence wait until taken.
            self._out.wait_value(self._word("taken", 0), earlier + 1)
        for name, staged in self.staged.items():
            source = staged[block]
            for place in (name, f"snapshot of {name}") if snapshot else (name,):
                if len(source):
                    self._out.copy_to_host(self._host + self._place(place, block), source.address, 4 * len(source))
        self._out.write_value(self._word("updates", b), s + 1)
        if snapshot:
            self._out.write_value(self._word("updates_snapshot", b), s + 1)
        self._out.write_value(self._word("turn", b), s + 1)  # behind a barrier: who sees it sees the block

    def _word(self, row: str, index: int) -> int:
        """Where the device finds a control word."""
        return self._mapped + self.center.layout.word_offset_bytes(row) + LINE_BYTES * index

    def _place(self, name: str, block: slice) -> int:
        """Bytes from the start of the center to a block of a vector."""
        return self.center.layout.vector_offset_bytes(name) + 4 * block.start
