"""Are a million blocks, written by one process and read by another in the order of streams, all whole and new?

Two processes share GPU 0 and a ring of slots in pinned memory, cut as a center is. The writer fills slot k mod S with
k + 1, all 256 floats of it, once its stream has seen the slot taken, and then writes the slot's word. The reader's
stream waits for that word, brings the block to its place in a log on the device, and writes that the slot is taken.
Neither process waits for anything while it enqueues. Blocks travel by the copy engines (`copies`) or by kernels that
reach through the link (`zero-copy`), words by the driver's operations in streams (`memops`) or by kernels.

Afterwards the log is looked through: a block is stale if all of it is equal but not the number that it should be, and
torn if it is not all equal. Any of them is a failure. `block_us` is the time of one block. The bound, `alone_us`, is
the longer of the two sides' times without the other one: a tenth of the blocks without any waits, first the reader and
then the writer. All that the reader finds then is stale, which is checked, so the check sees what it should.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import time
from ctypes import c_uint64
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from typing import Protocol

import harness
import numpy as np
from exchange import together
from link import about, give_up, graphics_for, mapped_at, record

from easgd_local.backend.cuda import LINK_BLOCKS, CudaOps, DeviceVector, Gpu, Transfer
from easgd_local.center import Center, Layout
from easgd_local.graphics import Graphics
from easgd_local.stream_words import WAYS

QUESTION = "Are a million blocks, written by one process and read by another in the order of streams, whole and new?"
BLOCKS = {"memops": 500_000, "kernels": 50_000}  # by each carrier; a kernel that waits keeps the GPU from the other one
QUICK_BLOCKS = 3000
FLOATS, SLOTS = 256, 256
CARRIERS = ("copies", "zero-copy")
CHECKED_AT_ONCE = 4096  # blocks
LEAST, MOST = 4 * SLOTS, 2**24  # more than the ring remembers; float32 counts exactly up to the second
RELEASED = 2**62  # in a word: nobody waits for it any more
PATIENCE_S = 300.0
LAYOUT = Layout(1, SLOTS * FLOATS, block_bytes=4 * FLOATS)
FULL, TAKEN = "turn", "visited"  # rows of the center's words: how often a slot was filled, and emptied

Span = tuple[float, float]


@dataclass(frozen=True)
class Task:
    """What both processes are told."""

    center: str
    graphics: Graphics
    carrier: str
    words: str
    blocks: int


@dataclass(frozen=True)
class Outcome:
    """Of one process: when it began and was done, and how many blocks it found wrong, if it is the reader."""

    span: Span
    stale: int = 0
    torn: int = 0


class Side(Protocol):
    """One process's part."""

    gpu: Gpu

    def handle(self, k: int, *, waits: bool) -> None:
        """Enqueues what becomes of block k."""

    def look(self, blocks: int) -> tuple[int, int]:
        """How many of the first so many blocks are stale, and how many are torn."""


class Port:
    """The ring as one process's device reaches it."""

    def __init__(self, center: Center, task: Task) -> None:
        self.gpu = Gpu(task.graphics.images_for(0), 0)
        self.ops, self.stream = CudaOps(self.gpu), self.gpu.training
        host = self.gpu.register(center.memory, LAYOUT.size_bytes)
        offset = LAYOUT.vector_offset_bytes("c")
        self._address, self._mapped = host.handle + offset, mapped_at(host.device_address(offset), LAYOUT.n)
        self.words = WAYS[task.words](center, self.gpu, host.device_address(), lambda done: None)
        self.by_copies = task.carrier == "copies"

    def write(self, slot: int, y: DeviceVector, value: float) -> None:
        """The slot is filled with the value."""
        if self.by_copies:
            self.ops.fill(y, value)
            self.stream.copy_to_host(self._address + 4 * FLOATS * slot, y.address, 4 * FLOATS)
        else:
            self.ops.fill(self._slot(slot), value)

    def read(self, slot: int, address: int) -> None:
        """What is in the slot goes to this address of the device."""
        if self.by_copies:
            self.stream.copy_to_device(address, self._address + 4 * FLOATS * slot, 4 * FLOATS)
        else:  # not by the operation, which would remember each of the addresses
            there, here, n = (c_uint64(value) for value in (address, self._slot(slot).address, FLOATS))
            self.gpu.launch(self.stream, "copy", there, here, n, n=FLOATS, most=LINK_BLOCKS)

    def _slot(self, slot: int) -> DeviceVector:
        return self._mapped[FLOATS * slot : FLOATS * (slot + 1)]


class Writer:
    """Block k, all k + 1, goes into slot k mod S once that is empty."""

    def __init__(self, port: Port, blocks: int) -> None:
        self.gpu, self._port, self._y = port.gpu, port, port.gpu.allocate(FLOATS)

    def handle(self, k: int, *, waits: bool) -> None:
        port, (visit, slot) = self._port, divmod(k, SLOTS)
        if waits:
            port.words.wait(port.stream, TAKEN, slot, visit)
        port.write(slot, self._y, float(k + 1))
        port.words.write(port.stream, FULL, slot, visit + 1)

    def look(self, blocks: int) -> tuple[int, int]:
        return 0, 0


class Reader:
    """Block k is taken out of slot k mod S once that is full, and noted in the log."""

    def __init__(self, port: Port, blocks: int) -> None:
        self.gpu, self._port, self._transfer = port.gpu, port, Transfer(port.gpu)
        self._log = port.gpu.allocate(blocks * FLOATS)

    def handle(self, k: int, *, waits: bool) -> None:
        port, (visit, slot) = self._port, divmod(k, SLOTS)
        if waits:
            port.words.wait(port.stream, FULL, slot, visit + 1)
        port.read(slot, self._log.address + 4 * FLOATS * k)
        port.words.write(port.stream, TAKEN, slot, visit + 1)

    def look(self, blocks: int) -> tuple[int, int]:
        stale = torn = 0
        for first in range(0, blocks, CHECKED_AT_ONCE):
            last = min(first + CHECKED_AT_ONCE, blocks)
            found = self._transfer.host(self._log[FLOATS * first : FLOATS * last]).reshape(-1, FLOATS)
            whole = (found == found[:, :1]).all(axis=1)
            right = found[:, 0] == np.arange(first + 1, last + 1)
            stale += int(np.count_nonzero(whole & ~right))
            torn += int(np.count_nonzero(~whole))
        return stale, torn


SIDES: dict[str, type[Writer] | type[Reader]] = {"writer": Writer, "reader": Reader}


def work(name: str, task: Task, barrier: Barrier, conn: Connection) -> None:
    """One process: all the blocks, and then a tenth of them without waiting; sends the two outcomes."""
    center = Center.attach(LAYOUT, os.open(task.center, os.O_RDWR))
    try:
        port = Port(center, task)
        side = SIDES[name](port, task.blocks)
        barrier.wait(PATIENCE_S)
        conn.send((run(side, task.blocks, waits=True), run_alone(name, side, task.blocks // 10, barrier)))
        port.gpu.__exit__(None, None, None)
    except BaseException:
        for slot in range(SLOTS):  # who waits for us gives up too
            center.turn[slot] = center.visited[slot] = RELEASED
        barrier.abort()
        raise


def run_alone(name: str, side: Side, blocks: int, barrier: Barrier) -> Outcome:
    """So many blocks without waiting, when it is this side's turn."""
    for one in ("reader", "writer"):
        barrier.wait(PATIENCE_S)
        if one == name:
            outcome = run(side, blocks, waits=False)
    return outcome


def run(side: Side, blocks: int, *, waits: bool) -> Outcome:
    """So many blocks, enqueued without a pause."""
    began = time.perf_counter()
    for k in range(blocks):
        side.handle(k, waits=waits)
    side.gpu.training.synchronize()
    span = began, time.perf_counter()
    return Outcome(span, *side.look(blocks))


def measure(graphics: Graphics, carrier: str, words: str, blocks: int) -> harness.Row:
    """The row of one way of carrying blocks and words."""
    context = mp.get_context("spawn")
    with Center.create(LAYOUT) as center:
        task = Task(f"/proc/{os.getpid()}/fd/{center.fd}", graphics, carrier, words, blocks)
        barrier, pipes = context.Barrier(len(SIDES)), [context.Pipe() for _ in SIDES]
        processes = [
            context.Process(target=work, args=(name, task, barrier, pipe[1]), daemon=True)
            for name, pipe in zip(SIDES, pipes, strict=True)
        ]
        for process in processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()
        told = [ours.recv() for ours, _ in pipes]  # EOFError: a process failed, and said why
        for process in processes:
            process.join()
    return row(f"{carrier}, {words}", blocks, told)


def row(entry: str, blocks: int, told: list[tuple[Outcome, Outcome]]) -> harness.Row:
    """One row from what the two processes found, together and alone."""
    (both_s,) = together([[outcome.span] for outcome, _ in told])
    alone_s = max(outcome.span[1] - outcome.span[0] for _, outcome in told)
    found, found_alone = told[list(SIDES).index("reader")]
    assert found_alone == Outcome(found_alone.span, stale=blocks // 10), f"{found_alone}: all should be stale"
    return {
        "entry": entry,
        "blocks": blocks,
        "floats_per_block": FLOATS,
        "slots": SLOTS,
        "stale_blocks": found.stale,
        "torn_blocks": found.torn,
        "block_us": harness.spread([1e6 * both_s / blocks]),
        "alone_us": harness.spread([1e6 * alone_s / (blocks // 10)]),
    }


def main() -> None:
    parser = harness.arguments(QUESTION)
    parser.add_argument("--blocks", type=int, help=f"default {BLOCKS['memops']:,}, by kernels {BLOCKS['kernels']:,}")
    given = parser.parse_args()
    if given.blocks is not None and not LEAST <= given.blocks < MOST:
        parser.error(
            f"--blocks {given.blocks}: the ring must go round, and float32 must count them, so choose from {LEAST:,} "
            f"to {MOST - 1:,}."
        )
    graphics = graphics_for("ordering", given)
    if graphics.words == "processor":
        give_up("ordering: the streams of this machine cannot wait for words: the processor would wait in their place.")
    ways = [(carrier, words) for words in BLOCKS if words in ("kernels", graphics.words) for carrier in CARRIERS]
    blocks = {words: given.blocks or (QUICK_BLOCKS if given.quick else count) for words, count in BLOCKS.items()}
    rows = record(
        (measure(graphics, carrier, words, blocks[words]) for carrier, words in ways),
        about("ordering", graphics), given,
    )  # fmt: skip
    wrong = sum(row["stale_blocks"] + row["torn_blocks"] for row in rows)
    print(f"{sum(row['blocks'] for row in rows):,} blocks, {wrong} of them stale or torn.")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
