"""Who may touch which block of the center when: Latin-square turns without a single atomic operation.

The G blocks form p groups of q = G/p. In its k-th exchange worker i walks groups i, i+1, …, i+p-1 (mod p), and group g
serves workers g, g-1, … (mod p). Hence

    pos(b, i) = (group(b) - i) mod p,   worker i may enter block b when turn[b] ≥ kp + pos(b, i),
    and leaving it stores turn[b] <- kp + pos(b, i) + 1.

All p workers start at once on different groups; worker i waits only for worker i+1; (k, step of the walk) strictly
decreases along the waiting, so there is no deadlock; every block sees the workers in one fixed cyclic order, so a run
is deterministic.

The functions are the protocol itself, and tests explore every interleaving of them; the classes wait in real time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from easgd_local.center import Center
from easgd_local.schedules import Calendar
from easgd_local.words import Words

SPINS = 200  # polls that yield the core before the first sleep
SLEEP_S = 50e-6


class Aborted(BaseException):
    """The launcher has called the run off; the worker leaves without touching the center again. Nobody's to catch."""


def position(block: int, rank: int, workers: int, blocks: int) -> int:
    """pos(b, i): after how many others worker i visits block b in each round."""
    return (block * workers // blocks - rank) % workers


def owner(block: int, turn: int, workers: int, blocks: int) -> int:
    """The worker whose visit of the block is number `turn`: the inverse of `position`."""
    return (block * workers // blocks - turn) % workers


def walk(rank: int, workers: int, blocks: int) -> list[int]:
    """The blocks in the order in which worker i visits them: its own group first."""
    q = blocks // workers
    return [(rank + step) % workers * q + j for step in range(workers) for j in range(q)]


def by_rank(block: int, turn: int, workers: int, blocks: int) -> int:
    """The worker whose visit of the block is number `turn` in a rendezvous."""
    return turn % workers


def pass_turns(
    turn: Words, gone: dict[int, int], workers: int, blocks: int, owner: Callable[[int, int, int, int], int] = owner
) -> list[tuple[int, int]]:
    """The turns to pass now in place of workers that are gone: pairs (block, turn number), in the order to pass them.

    `gone[i] = k` means that worker i makes none of its visits before its k-th exchange. A dead or finished worker
    writes nothing, so the launcher is the only writer of these turn words. At most p turns of a block at a time; with
    everybody gone, only those of the round that has begun, since there is nobody left to pass others for.
    """
    passed = []
    newest = max(turn[b] for b in range(blocks))
    somebody_comes = min(gone.get(i, 0) for i in range(workers)) <= newest // workers + 1
    end = newest + workers if somebody_comes else -(-newest // workers) * workers
    for b in range(blocks):
        now = turn[b]
        for s in range(now, min(now + workers, end)):
            if s // workers >= gone.get(owner(b, s, workers, blocks), 0):
                break
            passed.append((b, s))
    return passed


class Turns(Protocol):
    """A worker's way to the center.

    `update` is the number, from 1, of the update of the block in hand; `stale` how many others' updates this worker
    found at most, in any block, since its own last visit, None if that is not known. While `counts` is false its visits
    are no updates.
    """

    round: int
    update: int
    stale: int | None
    counts: bool
    wait_s: float
    waited_for_s: list[float]

    def visit(self) -> Iterator[slice]:
        """One exchange: yields the blocks in turn, holding each during its pass of the caller's loop."""

    def open(self, y: Any) -> None:
        """y <- 0, part of the block in hand, at the first visit of the block in this round."""

    def read(self) -> Iterator[slice]:
        """The blocks, to be read only, in a rendezvous."""

    def until(self, done: Callable[[], bool]) -> None:
        """Returns when that is so; meanwhile the worker can be held."""


class Waiting:
    """What all orders share: waiting that yields, names the late worker, holds and aborts when asked."""

    def __init__(self, center: Center, rank: int, hold: Callable[[], None]) -> None:
        self.center, self.rank, self._hold = center, rank, hold
        self.workers, self.blocks = center.layout.workers, center.layout.blocks
        self.wait_s = 0.0
        self.waited_for_s = [0.0] * self.workers
        self.update, self.counts = 0, True
        self.stale: int | None = 0
        self._seen = [center.updates[b] for b in range(self.blocks)]

    def until(self, done: Callable[[], bool]) -> None:
        """Returns when that is so; meanwhile the worker can be held."""
        self._wait(done, lambda: self.rank)

    def _wait(self, ready: Callable[[], bool], late: Callable[[], int]) -> None:
        """Returns once `ready()`; adds the time to the account of the worker that `late()` names meanwhile."""
        center, spins, before = self.center, 0, time.perf_counter()
        while not ready():
            if center.abort[0]:
                raise Aborted
            culprit = self._culprit(late())
            center.waiting_for[self.rank] = culprit + 1
            if spins < SPINS:
                os.sched_yield()
            else:
                time.sleep(SLEEP_S)
            spins += 1
            now = time.perf_counter()
            self.wait_s += now - before
            self.waited_for_s[culprit] += now - before
            self._hold()  # time spent holding is nobody's fault, hence not counted
            before = time.perf_counter()
        center.waiting_for[self.rank] = 0

    def _culprit(self, late: int) -> int:
        """Follows the chain of waiting to its end: the worker that everybody in it really waits for."""
        for _ in range(self.workers):
            further = self.center.waiting_for[late]
            if further in (0, self.rank + 1):
                break
            late = further - 1
        return late

    def open(self, y: Any) -> None:
        """y <- 0, part of the block in hand, at the first visit of the block in this round."""
        raise NotImplementedError("only orders with common rounds have a first visit")

    def read(self) -> Iterator[slice]:
        """The blocks, to be read only, in a rendezvous."""
        raise NotImplementedError("only a rendezvous has a time for reading")

    def _take(self, b: int) -> None:
        """Block b is in hand: its next update is ours."""
        before = self.center.updates[b]
        self.update, self.stale = before + 1, max(self.stale or 0, before - self._seen[b])

    def _count(self, b: int) -> None:
        """Our update of block b is made, and it is still in hand."""
        self._seen[b] = self.update if self.counts else self.update - 1
        self.center.updates[b] = self._seen[b]


class _Rounds(Waiting):
    """What the orders with common rounds share: p turns of each block in each round, one for every worker.

    The last visitor of a block in a round closes it (what the rule does once for all workers), and in a round that
    ends in a snapshot it also copies the block to the snapshot area, so that the area holds the center exactly as it
    is after that round.
    """

    def __init__(
        self, center: Center, rank: int, calendar: Calendar, hold: Callable[[], None], first_round: int,
        close: Callable[[slice], None] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(center, rank, hold)
        self.round, self._calendar, self._close = first_round, calendar, close
        self._opens = False  # whether the visit under way is the first to the block in this round

    def open(self, y: Any) -> None:
        """y <- 0, part of the block in hand, at the first visit of the block in this round."""
        if self._opens:
            y.fill(0)

    def visit(self) -> Iterator[slice]:
        """One exchange: yields the blocks in turn, holding each during its pass of the caller's loop."""
        raise NotImplementedError

    def _late(self, b: int) -> int:
        """The worker whose turn of block b it is."""
        raise NotImplementedError

    def _await_turn(self, b: int, s: int) -> None:
        """Returns when s turns of block b are complete."""
        turn = self.center.turn
        if turn[b] < s:
            self._wait(lambda: turn[b] >= s, lambda: self._late(b))
        if self.center.abort[0]:  # an abort stores 2^62 in every turn word, which looks like a turn
            raise Aborted

    def _visit(self, b: int, place: int, snapshot: bool) -> Iterator[slice]:
        """One block: yields it when `place` others have visited it in this round, and hands it on afterwards."""
        turn, s = self.center.turn, self.round * self.workers + place
        self._await_turn(b, s)
        assert turn[b] == s, f"block {b}: turn {turn[b]} instead of {s}"
        block = self.center.layout.block(b)
        self._take(b)
        self._opens = self.center.visited[b] != self.round + 1
        yield block
        self._count(b)
        self.center.visited[b] = self.round + 1
        if place == self.workers - 1:
            # 1. We close the block, 2. we die, 3. the launcher passes our turn and must not close it again.
            self.center.visited[b] = 0
            if self._close is not None:
                self._close(block)
            if snapshot:
                self._write_snapshot(b)
        turn[b] = s + 1

    def _write_snapshot(self, b: int) -> None:
        # 1. The launcher still reads the snapshot of an earlier round, 2. we overwrite it: hence wait until taken.
        earlier = self._calendar.previous_snapshot(self.round)
        taken = self.center.taken
        if earlier is not None and taken[0] <= earlier:
            self._wait(lambda: taken[0] > earlier, lambda: self.rank)
        self.center.take_snapshot(b)


class StrictTurns(_Rounds):
    """The Latin square: every block sees the workers in one fixed cyclic order. The default; reproducible."""

    def visit(self) -> Iterator[slice]:
        """One exchange: yields the blocks in turn, holding each during its pass of the caller's loop."""
        snapshot = self._calendar.snapshot_after(self.round)
        for b in walk(self.rank, self.workers, self.blocks):
            yield from self._visit(b, position(b, self.rank, self.workers, self.blocks), snapshot)
        self.round += 1

    def _late(self, b: int) -> int:
        return owner(b, self.center.turn[b], self.workers, self.blocks)


class TogetherTurns(_Rounds):
    """Rendezvous: all workers read the center as it was before the round, then visit every block in the order of their
    ranks. For synchronous rules; reproducible.
    """

    def read(self) -> Iterator[slice]:
        """Yields the blocks, to be read only: each as it is before our visit of this round, after all of the last."""
        for b in range(self.blocks):
            self._await_turn(b, self.round * self.workers)
            yield self.center.layout.block(b)

    def visit(self) -> Iterator[slice]:
        """One exchange: yields the blocks in turn, when everybody has read them."""
        read, snapshot = self.center.read, self._calendar.snapshot_after(self.round)
        read[self.rank] = self.round + 1
        for i in range(self.workers):
            if read[i] <= self.round:
                self._wait(lambda i=i: read[i] > self.round, lambda i=i: i)  # type: ignore[misc]
        for b in range(self.blocks):
            yield from self._visit(b, self.rank, snapshot)
        self.round += 1

    def _late(self, b: int) -> int:
        return by_rank(b, self.center.turn[b], self.workers, self.blocks)


class NoTurns(Waiting):
    """Hogwild: everybody at once, whenever it likes. Not reproducible.

    A worker's addition to a coordinate of the center is lost when another one reads the coordinate before it is
    written and writes it after. Coordinates are never torn: each is always a number that somebody has written.
    """

    round = 0

    def visit(self) -> Iterator[slice]:
        """One exchange: yields the blocks without waiting for anybody."""
        for b in walk(self.rank, self.workers, self.blocks):
            if self.center.abort[0]:
                raise Aborted
            yield self.center.layout.block(b)
