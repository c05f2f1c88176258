"""The center's shared memory: created by the launcher, mapped by every worker, freed by the last of them to go.

A sealed memfd: no name, no port, nothing in /dev/shm, gone with the last descriptor. Page 0 holds a header; then come
the control words, each on its own 128-byte line and each with one writer at a time; then, page by page aligned, the
shared float32 vectors (`c` first, then what the rule declares) and a snapshot of each.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from easgd_local import hardware, linux
from easgd_local.words import LINE_BYTES, Words, words

MAGIC, VERSION, PAGE = 0x4C43_4F4C_4447_5345, 3, 4096  # the magic reads "ESGDLOCL" in memory
BLOCK_BYTES = 4 << 20
SNAPSHOT = "snapshot of "  # and the name of a vector: its copy
UPDATES = "updates"  # the name of the counts in a checkpoint, beside those of the vectors


@dataclass(frozen=True)
class Layout:
    """Where everything is: a pure function of p, n and the names of the shared vectors.

    The n floats are cut into G blocks, G a multiple of p: about 4 MiB each, smaller for small models so that every
    worker still has a group to start with. Blocks of a model with n < G may be empty.
    """

    workers: int
    n: int
    shared: tuple[str, ...] = ("c",)
    block_bytes: int = BLOCK_BYTES

    @cached_property
    def blocks(self) -> int:
        """G."""
        wanted = -(-4 * self.n // self.block_bytes)
        return max(1, -(-wanted // self.workers)) * self.workers

    def block(self, b: int) -> slice:
        """The coordinates of block b: bounds at multiples of 16 floats, so that copies start on a 64-byte line."""
        return self._slices[b]

    @cached_property
    def _slices(self) -> list[slice]:
        sixteens, G = -(-self.n // 16), self.blocks
        edges = [min(16 * (sixteens * edge // G), self.n) for edge in range(G + 1)]
        return [slice(start, stop) for start, stop in pairwise(edges)]

    @cached_property
    def word_counts(self) -> dict[str, int]:
        """The rows of control words, in the order of their lines. Who writes each is said in `Center`."""
        p, G = self.workers, self.blocks
        launcher = {"abort": 1, "pause": 1, "stop": 1, "leave": 1, "save": 1, "taken": 1, "grant": p * G}
        launcher |= {"uncounted": G}
        worker = {"clock": p, "earliest_stop": p, "held_ns": p, "held": p, "waiting_for": p}
        worker |= {"request": p, "done": p * G, "read": p}
        return {"turn": G, "visited": G, "updates": G, "updates_snapshot": G} | launcher | worker

    @cached_property
    def vectors_offset_bytes(self) -> int:
        return PAGE + _pages(LINE_BYTES * sum(self.word_counts.values()))

    def word_offset_bytes(self, row: str) -> int:
        """Where the first control word of a row lies."""
        return self._word_offsets[row]

    @cached_property
    def _word_offsets(self) -> dict[str, int]:
        lines = accumulate(self.word_counts.values(), initial=0)
        return {row: PAGE + LINE_BYTES * before for row, before in zip(self.word_counts, lines, strict=False)}

    def vector_offset_bytes(self, name: str) -> int:
        """Where a shared vector lies, or its copy in the snapshot area: SNAPSHOT and its name."""
        return self._vector_offsets[name]

    @cached_property
    def _vector_offsets(self) -> dict[str, int]:
        places = [*self.shared, *(SNAPSHOT + one for one in self.shared)]
        return {name: self.vectors_offset_bytes + place * self.vector_bytes for place, name in enumerate(places)}

    @property
    def vector_bytes(self) -> int:
        return _pages(4 * self.n)

    @property
    def size_bytes(self) -> int:
        return self.vectors_offset_bytes + 2 * len(self.shared) * self.vector_bytes


class Center:
    """One process's mapping of the center; a context manager that unmaps it.

    Control words, with their only writer:

    - turn[b]: "turn[b] exchanges of block b are complete"; written by the worker whose turn it is, or by the launcher
      in place of a worker that is gone.
    - visited[b]: "some worker has visited block b in round visited[b] - 1, which is to be closed"; written by the
      worker that holds the block.
    - updates[b]: how many of block b's exchanges were made and not passed; written by the worker that holds the block.
    - updates_snapshot[b]: updates[b] as it was at the latest snapshot; whoever writes the snapshot.
    - read[i]: "worker i has read the center in read[i] rounds"; worker i, or the launcher when it is gone.
    - uncounted[b]: how many of the turns of block b before this launch were no updates; the launcher, once.
    - abort, pause, stop, leave, save, taken, grant: the launcher. An odd pause asks every worker to hold.
    - clock, earliest_stop, held_ns, held, waiting_for, request, done: worker i its own; of one that is gone the
      launcher clears earliest_stop, held and waiting_for.
    """

    turn: Words
    visited: Words
    updates: Words
    updates_snapshot: Words
    abort: Words
    pause: Words
    stop: Words
    leave: Words
    save: Words
    taken: Words
    grant: Words
    uncounted: Words
    clock: Words
    earliest_stop: Words
    held_ns: Words
    held: Words
    waiting_for: Words
    request: Words
    done: Words
    read: Words

    def __init__(self, layout: Layout, fd: int) -> None:
        self.layout, self.fd = layout, fd
        self.memory = mmap.mmap(fd, layout.size_bytes, mmap.MAP_SHARED)
        for name, count in layout.word_counts.items():
            setattr(self, name, words(self.memory, layout.word_offset_bytes(name), count))
        self.vectors: dict[str, NDArray[np.float32]] = {}
        self.snapshot: dict[str, NDArray[np.float32]] = {}
        for name in layout.shared:
            for vectors, place in ((self.vectors, name), (self.snapshot, SNAPSHOT + name)):
                offset = layout.vector_offset_bytes(place)
                vectors[name] = np.frombuffer(self.memory, np.float32, layout.n, offset)

    @classmethod
    def create(cls, layout: Layout) -> Center:
        """A new center of zeros, its memory claimed and touched; `MemoryError` says what is missing."""
        room = hardware.available_bytes()
        refusal = (
            f"center of {layout.size_bytes:,} bytes ({layout.n:,} floats × {len(layout.shared)} shared vectors, and a "
            f"snapshot of each): only {room:,} bytes of memory are available and all of it must be claimed at the "
            f"start; choose a smaller model or free some memory."
        )
        if layout.size_bytes > room:
            raise MemoryError(refusal)
        fd = linux.memfd_create("easgd_center")
        try:
            # fallocate, not ftruncate: lack of room is an error now and not a SIGBUS at the first touch.
            os.posix_fallocate(fd, 0, layout.size_bytes)
            linux.seal_size(fd)
            center = cls(layout, fd)
        except OSError as error:
            os.close(fd)
            raise MemoryError(refusal) from error
        header = memoryview(center.memory).cast("Q")
        for index, value in enumerate((MAGIC, VERSION, layout.workers, layout.blocks, layout.n)):
            header[index] = value
        return center

    @classmethod
    def attach(cls, layout: Layout, fd: int) -> Center:
        """The center that another process created; `ValueError` if it is another one than `layout` describes."""
        center = cls(layout, fd)
        header = list(memoryview(center.memory).cast("Q")[:5])
        wanted = [MAGIC, VERSION, layout.workers, layout.blocks, layout.n]
        if header != wanted:
            raise ValueError(f"center header {header}: expected {wanted} (magic, version, p, G, n).")
        return center

    def take_snapshot(self, b: int) -> None:
        """Copies block b of the shared vectors to the snapshot area; the caller holds its turn."""
        block = self.layout.block(b)
        for name, vector in self.vectors.items():
            self.snapshot[name][block] = vector[block]
        self.updates_snapshot[b] = self.updates[b]

    def say_held(self, rank: int, pause: int, earliest_stop: int) -> None:
        """Worker `rank` holds from now on, in answer to `pause`; if it has to stop it can at that clock."""
        # In this order: who reads held = pause also reads the other two.
        self.earliest_stop[rank] = earliest_stop
        self.held_ns[rank] = time.perf_counter_ns()
        self.held[rank] = pause

    def take_whole_snapshot(self) -> None:
        """Copies everything to the snapshot area; nobody moves it meanwhile."""
        for b in range(self.layout.blocks):
            self.take_snapshot(b)

    def state(self) -> dict[str, NDArray[Any]]:
        """Copies of the shared vectors in the snapshot area, and the counts of updates, for a checkpoint."""
        updates = [self.updates_snapshot[b] for b in range(self.layout.blocks)]
        return {name: vector.copy() for name, vector in self.snapshot.items()} | {UPDATES: np.array(updates, np.int64)}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Fills the vectors and counts from what `state` gave, perhaps of a center cut into other blocks."""
        updates = state[UPDATES]
        same = len(updates) == self.layout.blocks
        for b in range(self.layout.blocks):
            self.updates[b] = int(updates[b] if same else updates.min())
        for name, vector in self.vectors.items():
            if name in state:
                vector[:] = state[name]

    def sha256(self) -> str:
        """Digest of the bytes of c."""
        return hashlib.sha256(self.vectors["c"].tobytes()).hexdigest()

    def close(self) -> None:
        """Gives back the descriptor and drops the views; the mapping goes when nobody looks at it any more."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1
        self.vectors, self.snapshot = {}, {}
        for name in ("memory", *self.layout.word_counts):
            vars(self).pop(name, None)

    def __enter__(self) -> Center:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _pages(size_bytes: int) -> int:
    return -(-size_bytes // PAGE) * PAGE
