"""How a device waits for control words of the center, and writes them, in the order of a stream.

Three ways, the first that a machine offers being the best: the driver's own operations on words, kernels of one thread,
and the processor, which then waits in the place of the stream. All workers of a run go the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_float, c_uint64
from typing import Protocol

from easgd_local.backend.cuda import DeviceVector, Gpu
from easgd_local.backend.resources import Stream
from easgd_local.center import Center
from easgd_local.words import LINE_BYTES

Until = Callable[[Callable[[], bool]], None]  # returns when the condition holds; meanwhile the worker can be held


class StreamWords(Protocol):
    """Waits for and writes words by the name of their row and their number in it."""

    def wait(self, stream: Stream, row: str, index: int, value: int) -> None:
        """Nothing enqueued later starts before word >= value."""

    def write(self, stream: Stream, row: str, index: int, value: int) -> None:
        """word <- value; who sees that sees all that this stream wrote before."""

    def count(self, stream: Stream, index: int, made: int, *, snapshot: bool) -> None:
        """updates[index] <- updates[index] + made, and if a snapshot is taken updates_snapshot[index] the same."""

    def fill_unless(self, stream: Stream, y: DeviceVector, index: int, known: int) -> None:
        """y <- 0, unless visited[index] = known."""


class ByMemops:
    """By the driver's operations on 64-bit words in streams."""

    def __init__(self, center: Center, gpu: Gpu, mapped: int, until: Until) -> None:
        layout = center.layout
        self._gpu = gpu
        self._rows = {row: mapped + layout.word_offset_bytes(row) for row in layout.word_counts}
        self._visit = c_uint64(), c_uint64(), c_uint64()
        self._count = gpu.prepare("count_visit", *self._visit)

    def wait(self, stream: Stream, row: str, index: int, value: int) -> None:
        stream.wait_value(self._address(row, index), value)

    def write(self, stream: Stream, row: str, index: int, value: int) -> None:
        stream.write_value(self._address(row, index), value)

    def count(self, stream: Stream, index: int, made: int, *, snapshot: bool) -> None:
        word, copy, by = self._visit
        word.value, by.value = self._address("updates", index), made
        copy.value = self._address("updates_snapshot", index) if snapshot else 0
        self._count.enqueue(stream)

    def fill_unless(self, stream: Stream, y: DeviceVector, index: int, known: int) -> None:
        word, n = c_uint64(self._address("visited", index)), len(y)
        where, value = c_uint64(y.address), c_float(0)
        self._gpu.launch(stream, "fill_unless", where, value, word, c_uint64(known), c_uint64(n), n=n)

    def _address(self, row: str, index: int) -> int:
        return self._rows[row] + LINE_BYTES * index


class ByKernels(ByMemops):
    """By kernels of one thread, which look again and again: for drivers and systems without the operations."""

    def wait(self, stream: Stream, row: str, index: int, value: int) -> None:
        self._gpu.launch(stream, "await_word", c_uint64(self._address(row, index)), c_uint64(value))

    def write(self, stream: Stream, row: str, index: int, value: int) -> None:
        self._gpu.launch(stream, "store_word", c_uint64(self._address(row, index)), c_uint64(value))


class ByProcessor:
    """By this process: it waits for the word before it enqueues more, and for the stream before it writes one."""

    def __init__(self, center: Center, gpu: Gpu, mapped: int, until: Until) -> None:
        self._center, self._gpu, self._until = center, gpu, until

    def wait(self, stream: Stream, row: str, index: int, value: int) -> None:
        words = getattr(self._center, row)
        self._until(lambda: words[index] >= value)

    def write(self, stream: Stream, row: str, index: int, value: int) -> None:
        self._until(stream.is_done)
        getattr(self._center, row)[index] = value

    def count(self, stream: Stream, index: int, made: int, *, snapshot: bool) -> None:
        center = self._center
        center.updates[index] += made  # only we do, and nobody looks before the turn is handed on
        if snapshot:
            center.updates_snapshot[index] = center.updates[index]

    def fill_unless(self, stream: Stream, y: DeviceVector, index: int, known: int) -> None:
        if self._center.visited[index] != known:  # the block is ours by now
            self._gpu.launch(stream, "fill", c_uint64(y.address), c_float(0), c_uint64(len(y)), n=len(y))


WAYS: dict[str, Callable[[Center, Gpu, int, Until], StreamWords]] = {
    "memops": ByMemops, "kernels": ByKernels, "processor": ByProcessor
}  # fmt: skip
