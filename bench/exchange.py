"""How fast is an exchange on the CPU, as a share of what this machine copies?

The pull of EASGD, d <- α(x - c);  c <- c + d, goes over all the blocks of a real center, in turns, by p processes at
once. It moves 16 bytes an element: reads x and c, writes d and c. The bound is `np.copyto(d, x)` over the same vectors,
whole, by the same processes at the same time: 8 bytes an element, one read and one written. Both in GB = 10^9 bytes a
second, of all the processes together, from the start of the first to the end of the last.

Copy and pull take turns, so that both meet the same machine. "cold" means that the processes have gone through a
buffer of twice the last-level cache before each timing.

First the result is checked: c, and every worker's d, after three rounds equal plain NumPy's to the bit.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from typing import Any

import harness
import numpy as np

from easgd_local.backend.cpu import CpuOps, Vector, vector
from easgd_local.center import Center, Layout
from easgd_local.schedules import Calendar
from easgd_local.turns import StrictTurns

FLOATS, QUICK_FLOATS = 25_000_000, 1_000_003
REPETITIONS, QUICK_REPETITIONS = 21, 3
WORKERS = (1, 2)
CHECKED_ROUNDS = 3
ALPHA = 0.45
PATIENCE_S = 300.0
GIB = 2**30

Span = tuple[float, float]


def measure(floats: int, workers: int, repetitions: int) -> list[harness.Row]:
    """Rows for p = workers: warm and cold."""
    context = mp.get_context("fork")  # the children inherit the center's descriptor; nothing here uses threads
    with Center.create(Layout(workers, floats)) as center:
        center.vectors["c"][:] = start(floats, seed=0)
        barrier, pipes = context.Barrier(workers), [context.Pipe() for _ in range(workers)]
        processes = [
            context.Process(target=work, args=(rank, center.layout, center.fd, repetitions, barrier, pipe[1]))
            for rank, pipe in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()
        told = [ours.recv() for ours, _ in pipes]  # EOFError: a process failed its check, and said why
        for process in processes:
            process.join()
        return [row(floats, workers, cache, [one[cache] for one in told]) for cache in ("warm", "cold")]


def work(rank: int, layout: Layout, fd: int, repetitions: int, barrier: Barrier, conn: Connection) -> None:
    """One process: checks the exchange, then times it against a copy; sends, for warm and cold, what it measured."""
    center = Center.attach(layout, os.dup(fd))
    try:
        conn.send(check_and_time(rank, center, repetitions, barrier))
    except BaseException:
        center.abort[0] = 1  # who waits for our turn or at the barrier gives up too
        barrier.abort()
        raise


def check_and_time(rank: int, center: Center, repetitions: int, barrier: Barrier) -> dict[str, Any]:
    """For warm and cold: when each copy and each pull of this process began and ended, and how long it waited."""
    layout = center.layout
    x, d, ops = vector(layout.n), vector(layout.n), CpuOps()
    np.copyto(x, start(layout.n, seed=1 + rank))
    turns = StrictTurns(center, rank, Calendar(tau=1, steps=2**40), lambda: None, 0)

    def pull() -> None:
        for b in turns.visit():
            ops.pull(x[b], center.vectors["c"][b], d[b], ALPHA)  # d <- α(x - c);  c <- c + d

    check(rank, layout, pull, barrier, center.vectors["c"], d)
    scrub = np.zeros(scrub_bytes(layout.workers), np.uint8)
    measured: dict[str, Any] = {}
    for cache in ("warm", "cold"):
        spans: dict[str, list[Span]] = {"copy": [], "pull": []}
        waits: list[float] = []
        for _ in range(repetitions + 1):  # the first is not counted
            for name, operation in (("copy", lambda: np.copyto(d, x)), ("pull", pull)):
                if cache == "cold":
                    np.add(scrub, 1, out=scrub)
                before = turns.wait_s
                spans[name].append(timed(operation, barrier))
                if name == "pull":
                    waits.append(turns.wait_s - before)
        measured[cache] = {"spans": {name: one[1:] for name, one in spans.items()}, "waits": waits[1:]}
    assert ops.nonfinite == 0
    return measured


def timed(operation: Callable[[], None], barrier: Barrier) -> Span:
    """When it began and ended, all the processes beginning together."""
    barrier.wait(PATIENCE_S)
    began = time.perf_counter()
    operation()
    return began, time.perf_counter()


def check(rank: int, layout: Layout, pull: Callable[[], None], barrier: Barrier, c: Vector, d: Vector) -> None:
    """c and d after three rounds are those of `reference`, to the bit."""
    barrier.wait(PATIENCE_S)
    for _ in range(CHECKED_ROUNDS):
        pull()
    barrier.wait(PATIENCE_S)
    wanted_c, wanted_d = reference(layout)
    assert np.array_equal(c, wanted_c), f"c differs from plain NumPy at p = {layout.workers}"
    assert np.array_equal(d, wanted_d[rank]), f"d of worker {rank} differs from plain NumPy at p = {layout.workers}"


def reference(layout: Layout) -> tuple[Vector, list[Vector]]:
    """The checked rounds in plain NumPy: group g of the blocks sees the workers g, g - 1, … (mod p)."""
    p, alpha = layout.workers, np.float32(ALPHA)
    c, x = start(layout.n, seed=0), [start(layout.n, seed=1 + rank) for rank in range(p)]
    d = [np.zeros(layout.n, np.float32) for _ in range(p)]
    for b in range(layout.blocks):
        block, group = layout.block(b), b * p // layout.blocks
        for place in range(CHECKED_ROUNDS * p):
            i = (group - place) % p
            d[i][block] = alpha * (x[i][block] - c[block])
            c[block] = c[block] + d[i][block]
    return c, d


def start(n: int, *, seed: int) -> Vector:
    """Standard normal values."""
    return np.random.default_rng(seed).standard_normal(n, np.float32)


def scrub_bytes(workers: int) -> int:
    """One process's share of a buffer of twice the last-level cache, at most 1 GiB in all."""
    cache = os.sysconf("SC_LEVEL3_CACHE_SIZE") if "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names else 0
    return min(2 * (cache or GIB // 4), GIB) // workers


def row(floats: int, workers: int, cache: str, told: list[dict[str, Any]]) -> harness.Row:
    """What the processes measured, as spreads over the repetitions; the share is taken repetition by repetition."""
    copy_s, pull_s = (together([one["spans"][name] for one in told]) for name in ("copy", "pull"))
    copy, pull = 8e-9 * floats * workers / copy_s, 16e-9 * floats * workers / pull_s
    return {
        "entry": f"pull, p = {workers}, {cache}",
        "floats": floats,
        "pull_s": harness.spread(pull_s),
        "wait_s": harness.spread(np.max([one["waits"] for one in told], axis=0)),
        "pull_gb_per_s": harness.spread(pull),
        "copy_gb_per_s": harness.spread(copy),
        "share_of_copy": harness.spread(pull / copy),
    }


def together(spans: list[list[Span]]) -> Any:
    """Seconds of each repetition, from the first process's start to the last one's end."""
    times = np.array(spans)  # [process, repetition, (start, end)]
    return times[:, :, 1].max(axis=0) - times[:, :, 0].min(axis=0)


def main() -> None:
    parser = harness.arguments("How fast is an exchange on the CPU, as a share of what this machine copies?")
    parser.add_argument("--floats", type=int, help=f"length of the vectors; default {FLOATS:,}")
    given = parser.parse_args()
    floats = given.floats or (QUICK_FLOATS if given.quick else FLOATS)
    repetitions = given.repetitions or (QUICK_REPETITIONS if given.quick else REPETITIONS)
    common = harness.about("exchange")
    rows = [row for workers in WORKERS for row in measure(floats, workers, repetitions)]
    harness.record(rows, common, given)


if __name__ == "__main__":
    main()
