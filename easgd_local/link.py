"""The center as one worker's GPU reaches it: block by block through staging buffers, or in place through the link."""

from __future__ import annotations

from typing import Any

from easgd_local.backend.cuda import CudaOps, DeviceVector, Gpu
from easgd_local.backend.resources import Event, Stream
from easgd_local.center import SNAPSHOT, Center

DEPTH = 3  # lanes, each with its staging buffer: one block coming, one in hand, one going
EXCHANGES = ("overlap", "inline", "zerocopy")


class Staged:
    """A shared vector as rules see it on a GPU: in an exchange the copy on the device of the block in hand, and as a
    whole the center's own, through the link: for what a worker alone writes."""

    def __init__(self, buffers: list[DeviceVector], mapped: DeviceVector) -> None:
        self._buffers = buffers
        self._block, self._buffer = slice(0, 0), buffers[0]
        self.address, self.whole, self.n, self.mapped = mapped.address, mapped.whole, mapped.n, True

    def __len__(self) -> int:
        return self.n

    def hold(self, block: slice, place: int) -> None:
        """Block `block` is in staging buffer `place`."""
        self._block, self._buffer = block, self._buffers[place]

    @property
    def in_hand(self) -> int:
        """The address of the block's copy on the device."""
        return self._buffer.address

    def __getitem__(self, b: slice) -> DeviceVector:
        start, stop = b.start - self._block.start, b.stop - self._block.start
        assert stop <= start or (0 <= start and stop <= self._block.stop - self._block.start), f"{b} is not in hand"
        return self._buffer[max(0, start) : max(0, start, stop)]


class Link:
    """The center as the device of one worker reaches it: pinned where it lies while this is open.

    `shared` are the center's vectors as rules see them in an exchange: `Staged`, or in place the mapped vectors
    themselves. Blocks go through the lanes in turn, each a stream with a staging buffer of its own, so that one block
    is fetched while another one is worked on and a third travels back; in place there is one lane. `lane` is that of
    the block in hand.
    """

    def __init__(self, center: Center, gpu: Gpu, ops: CudaOps, exchange: str) -> None:
        self.center, self.gpu, self.ops = center, gpu, ops
        self.in_place, self.inline = exchange == "zerocopy", exchange == "inline"
        layout = center.layout
        host = gpu.register(center.memory, layout.size_bytes)
        self._host, self.mapped = host.handle, host.device_address()
        # Their short kernels go first.
        self.lanes = [gpu.own(Stream.create(gpu.driver, priority=-1)) for _ in range(1 if self.in_place else DEPTH)]
        self.first = self.lane = self.lanes[0]
        self.shared: dict[str, Any] = {}
        if self.in_place:
            for name in layout.shared:
                self.shared[name] = self._mapped_vector(name)
        else:
            largest = max(layout.block(b).stop - layout.block(b).start for b in range(layout.blocks))
            for name in layout.shared:
                buffers = [gpu.allocate(largest) for _ in range(DEPTH)]
                self.shared[name] = Staged(buffers, self._mapped_vector(name))
        self._events = [gpu.own(Event.create(gpu.driver)) for _ in self.lanes]
        self._ready = gpu.own(Event.create(gpu.driver))
        names = [place + name for name in layout.shared for place in ("", SNAPSHOT)]
        self._starts = {name: self._host + layout.vector_offset_bytes(name) for name in names}
        self._visits, self._block = 0, slice(0, 0)

    def begin(self) -> None:
        """What the training stream has made so far, the exchange may use."""
        self._ready.record(self.gpu.training)
        self.first.wait_event(self._ready)
        self.spread()

    def spread(self) -> None:
        """What is enqueued in any lane from here on comes behind what the first has been given."""
        self._events[0].record(self.first)
        for lane in self.lanes[1:]:
            lane.wait_event(self._events[0])

    def join(self) -> None:
        """What is enqueued in the first lane from here on comes behind what all have been given."""
        for lane, event in zip(self.lanes[1:], self._events[1:], strict=True):
            event.record(lane)
            self.first.wait_event(event)

    def next_lane(self) -> Stream:
        """That of the next block."""
        self.lane = self.lanes[self._visits % len(self.lanes)]
        return self.lane

    def fetch(self, block: slice) -> None:
        """The block is in hand: it may be read by what the lane does from here on."""
        self._block, place = block, self._visits % len(self.lanes)
        self._visits += 1
        if self.in_place:
            return
        offset, size_bytes = 4 * block.start, 4 * (block.stop - block.start)
        for name, staged in self.shared.items():
            staged.hold(block, place)
            if size_bytes:
                self.lane.copy_to_device(staged.in_hand, self._starts[name] + offset, size_bytes)

    def bring_back(self, place: str = "") -> None:
        """What has become of the block in hand goes back to the center, or to its copy of the name `place` + name."""
        if self.in_place and not place:
            return
        block = self._block
        offset, size_bytes = 4 * block.start, 4 * (block.stop - block.start)
        for name, vector in self.shared.items() if size_bytes else ():
            if self.in_place:
                with self.ops.on(self.lane):
                    self.ops.copy(self._mapped_vector(place + name)[block], vector[block])
            else:
                self.ops.hold(vector)
                self.lane.copy_to_host(self._starts[place + name] + offset, vector.in_hand, size_bytes)

    def _mapped_vector(self, name: str) -> DeviceVector:
        address = self.mapped + self.center.layout.vector_offset_bytes(name)
        return DeviceVector(address, self.center.layout.n, address, mapped=True)
