"""What does a whole exchange cost on a GPU, against the floor that the link sets?

The pull of EASGD, d <- α(x - c);  c <- c + d, goes over all the blocks of a real center in strict turns, by p processes
that share GPU 0, each as a worker does it: it enqueues its whole exchange and waits for nothing. `exchange_s` is from
the start of the first process to the end of the last, `enqueue_us` the host's time for one block, of a process that no
earlier exchange holds up. The floor is what the link needs for the same bytes: in each of the processes, at the same
time, as many floats to the device and as many back at once, by the copy engines, in blocks of 4 MiB. Exchange and floor
take turns. Both are seen by the host, which looks when the device is done.

Processes that share a GPU take turns on it by the driver's slices of time, so only p = 1 says what a GPU of one's own
would need; p > 1 says what that sharing costs.

Exchanges: `overlap` brings blocks to the device and back beside the kernels, `zerocopy` lets the kernels reach through
the link. Words: turns are waited for by the driver's operations in streams (`memops`) or by kernels that look again.

First the result is checked: c, and every process's d, after three rounds equal plain NumPy's to the bit.
"""

from __future__ import annotations

import hashlib
import multiprocessing as mp
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier

import exchange as on_cpu
import harness
import numpy as np
from link import Ends, about, graphics_for, record

from easgd_local.backend.cpu import Vector
from easgd_local.center import BLOCK_BYTES, Center, Layout
from easgd_local.devices import OnGpu
from easgd_local.graphics import Graphics
from easgd_local.schedules import Calendar
from easgd_local.turns import Turns

QUESTION = "What does a whole exchange cost on a GPU, against the floor that the link sets?"
FLOATS, QUICK_FLOATS = 25_600_000, 100_003
QUICK_BLOCK_BYTES = 64 << 10
REPETITIONS, QUICK_REPETITIONS = 21, 3
WORKERS = (1, 2, 4)
EXCHANGES, WORDS = ("overlap", "zerocopy"), ("memops", "kernels")
CALENDAR = Calendar(tau=1, steps=2**40)
RELEASED = 2**62  # in a turn word: nobody waits for it any more
PATIENCE_S = 120.0

Span = tuple[float, float]


@dataclass(frozen=True)
class Task:
    """What one process is told: its rank, the center, the ways of exchanging, and the digests of the right result."""

    rank: int
    layout: Layout
    center: str
    graphics: tuple[Graphics, ...]
    repetitions: int
    wanted_c: str
    wanted_d: str


@dataclass
class Measured:
    """By one process and one way: when each exchange and each floor began and ended, and what enqueueing took."""

    exchanges: list[Span]
    floors: list[Span]
    enqueue_s: list[float]


def measure(graphics: tuple[Graphics, ...], layout: Layout, repetitions: int) -> list[harness.Row]:
    """Rows for p = layout.workers, one for each way of exchanging."""
    context = mp.get_context("spawn")
    c, d = on_cpu.reference(layout)
    with Center.create(layout) as center:
        path = f"/proc/{os.getpid()}/fd/{center.fd}"
        barrier, pipes = context.Barrier(layout.workers), [context.Pipe() for _ in range(layout.workers)]
        tasks = [
            Task(rank, layout, path, graphics, repetitions, digest(c), digest(d[rank]))
            for rank in range(layout.workers)
        ]
        processes = [
            context.Process(target=work, args=(task, barrier, pipe[1]), daemon=True)
            for task, pipe in zip(tasks, pipes, strict=True)
        ]
        for process in processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()
        told = [ours.recv() for ours, _ in pipes]  # EOFError: a process failed, and said why
        for process in processes:
            process.join()
    return [row(one, layout, [by_rank[way] for by_rank in told]) for way, one in enumerate(graphics)]


def digest(values: Vector) -> str:
    """Of the bytes."""
    return hashlib.sha256(values.tobytes()).hexdigest()


def work(task: Task, barrier: Barrier, conn: Connection) -> None:
    """One process: for each way checks the exchange, then times it against the floor; sends what it measured."""
    center = Center.attach(task.layout, os.open(task.center, os.O_RDWR))
    try:
        first_round, told = 0, []
        for graphics in task.graphics:
            place = OnGpu(center, task.rank, CALENDAR, graphics)
            turns = place.turns("strict", lambda: None, first_round, None)
            told.append(check_and_time(task, center, place, turns, barrier))
            first_round = turns.round
            place.close(drained=True)
        conn.send(told)
    except BaseException:
        center.abort[0] = 1  # who waits for our turn or at the barrier gives up too
        for b in range(task.layout.blocks):
            center.turn[b] = RELEASED
        barrier.abort()
        raise


def check_and_time(task: Task, center: Center, place: OnGpu, turns: Turns, barrier: Barrier) -> Measured:
    """One way of exchanging: the check, then exchange and floor in turn."""
    n = task.layout.n
    x, d, c, alpha = place.vector(n), place.vector(n), place.shared["c"], on_cpu.ALPHA
    place.load(x, on_cpu.start(n, seed=1 + task.rank))

    def pull() -> None:
        for b in turns.visit():
            place.ops.pull(x[b], c[b], d[b], alpha)  # d <- α(x - c);  c <- c + d

    check(task, center, place, barrier, pull, lambda: place.host(d))
    measured = Measured([], [], [])
    with Ends(place.gpu, n) as ends:
        for _ in range(task.repetitions + 1):
            floor, _ = timed(lambda: ends.both(BLOCK_BYTES), place, barrier)
            span, enqueue_s = timed(pull, place, barrier)
            measured.floors.append(floor)
            measured.exchanges.append(span)
            measured.enqueue_s.append(enqueue_s)
    assert place.ops.nonfinite == 0
    return Measured(measured.exchanges[1:], measured.floors[1:], measured.enqueue_s[1:])  # the first is not counted


def check(
    task: Task, center: Center, place: OnGpu, barrier: Barrier, pull: Callable[[], None], d: Callable[[], Vector]
) -> None:
    """c and d after three rounds, enqueued one behind the other, are those of plain NumPy, to the bit."""
    barrier.wait(PATIENCE_S)  # nobody is still busy with the center
    if task.rank == 0:
        center.vectors["c"][:] = on_cpu.start(task.layout.n, seed=0)
    barrier.wait(PATIENCE_S)
    for _ in range(on_cpu.CHECKED_ROUNDS):
        pull()
    place.drain()
    barrier.wait(PATIENCE_S)
    p = task.layout.workers
    assert digest(center.vectors["c"]) == task.wanted_c, f"c differs from plain NumPy at p = {p}"
    assert digest(d()) == task.wanted_d, f"d of worker {task.rank} differs from plain NumPy at p = {p}"


def timed(enqueue: Callable[[], None], place: OnGpu, barrier: Barrier) -> tuple[Span, float]:
    """When it began and was done, all the processes beginning together, and the host's seconds for enqueueing it."""
    barrier.wait(PATIENCE_S)
    began = time.perf_counter()
    enqueue()
    enqueued = time.perf_counter()
    place.drain()
    return (began, time.perf_counter()), enqueued - began


def row(graphics: Graphics, layout: Layout, told: list[Measured]) -> harness.Row:
    """What the processes measured, as spreads over the repetitions; the ratio is taken repetition by repetition."""
    exchange_s = on_cpu.together([one.exchanges for one in told])
    floor_s = on_cpu.together([one.floors for one in told])
    enqueue_us = 1e6 * np.mean([one.enqueue_s for one in told], axis=0) / layout.blocks
    moved_gb = 8e-9 * layout.n * layout.workers
    return {
        "entry": f"{graphics.exchange}, {graphics.words}, p = {layout.workers} on one GPU",
        "floats": layout.n,
        "blocks": layout.blocks,
        "exchange_s": harness.spread(exchange_s),
        "floor_s": harness.spread(floor_s),
        "times_the_floor": harness.spread(exchange_s / floor_s),
        "link_gb_per_s": harness.spread(moved_gb / exchange_s),
        "floor_gb_per_s": harness.spread(moved_gb / floor_s),
        "enqueue_us": harness.spread(enqueue_us),
    }


def ways(graphics: Graphics) -> tuple[Graphics, ...]:
    """On GPU 0 alone, every way of exchanging that this machine has."""
    one = replace(
        graphics, names=graphics.names[:1], capabilities=graphics.capabilities[:1], free_bytes=graphics.free_bytes[:1]
    )
    words = WORDS[WORDS.index(graphics.words) :] if graphics.words in WORDS else ()
    left_out = ", ".join(one for one in WORDS if one not in words)
    if left_out:
        print(f"words={left_out}: left out, this machine's streams cannot wait so; its best way is {graphics.words}.")
    return tuple(replace(one, exchange=exchange, words=word) for exchange in EXCHANGES for word in words)


def main() -> None:
    parser = harness.arguments(QUESTION)
    parser.add_argument("--floats", type=int, help=f"length of the vectors; default {FLOATS:,}")
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS, help="processes; default 1 2 4")
    given = parser.parse_args()
    floats = given.floats or (QUICK_FLOATS if given.quick else FLOATS)
    repetitions = given.repetitions or (QUICK_REPETITIONS if given.quick else REPETITIONS)
    block_bytes = QUICK_BLOCK_BYTES if given.quick else BLOCK_BYTES
    graphics = graphics_for("stream_exchange", given)
    common, chosen = about("stream_exchange", graphics), ways(graphics)
    layouts = [Layout(workers, floats, block_bytes=block_bytes) for workers in given.workers]
    record((one for layout in layouts for one in measure(chosen, layout, repetitions)), common, given)


if __name__ == "__main__":
    main()
