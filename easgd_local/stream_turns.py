"""Turns in stream order: a worker on a GPU enqueues its whole exchange and waits for nothing.

Every turn number is known when it is enqueued, so the waiting is the device's. Three lanes take the blocks of the
center in turn, each a stream with a staging buffer on the device:

    wait: turn[b] >= s;  copy the block to the buffer;  the rule's operations;  copy it back;  turn[b] <- s + 1

so that one block is fetched while another one is worked on and a third travels back, and all of it goes on beside the
forward and backward pass, until training touches what the exchange still has in hand (`CudaOps.order`). Within an
exchange no lane waits for another: six calls of the driver a block, where two streams, one for fetching and one for
the rest, would need four more for events. In place there is one lane and no staging: the kernels work on the center
itself, through the link.

The host follows at a distance: it never enqueues more than two exchanges, or steps, beyond those that are done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from easgd_local.backend.cuda import COUNTS
from easgd_local.backend.resources import Event
from easgd_local.center import SNAPSHOT
from easgd_local.free_turns import FreeTurns
from easgd_local.link import Link
from easgd_local.schedules import Calendar
from easgd_local.stream_words import WAYS
from easgd_local.turns import Aborted, Waiting, by_rank, owner, position, walk

LEAD = 2  # exchanges, and steps, that may be enqueued beyond those that are done


class StreamTurns(Waiting):
    """What the orders share: one block after the other through the link, and the distance that the host keeps.

    Events and counts of the exchanges under way lie in rings, so that the host learns of each exchange apart what
    guarded kernels refused in it: the same in every run.
    """

    def __init__(
        self, link: Link, rank: int, calendar: Calendar, words: str, hold: Callable[[], None], first_round: int,
        close: Callable[[slice], None] | None,
    ) -> None:  # fmt: skip
        super().__init__(link.center, rank, hold)
        self.round = first_round
        self.stale = None  # not known: the device does not tell what it found
        self._link, self._gpu, self._ops, self._calendar, self._close = link, link.gpu, link.ops, calendar, close
        self._words = WAYS[words](link.center, link.gpu, link.mapped, self.until)
        self._done = [self._gpu.own(Event.create(self._gpu.driver)) for _ in range(COUNTS)]
        self._made = [self._gpu.own(Event.create(self._gpu.driver)) for _ in range(LEAD)]
        self._drained = self._gpu.own(Event.create(self._gpu.driver))
        self._under_way: deque[tuple[int, int]] = deque()  # (round, place in the rings) of exchanges not known as done
        self._enqueued = self._steps = 0
        self._ops.settle = self._settle_all

    # The course of an exchange

    def visit(self) -> Iterator[slice]:
        """One exchange: yields the blocks; what the caller does with each is enqueued."""
        raise NotImplementedError

    def open(self, y: Any) -> None:
        """y <- 0, part of the block in hand, at the first visit of the block in this round."""
        if len(y):
            self._words.fill_unless(self._link.lane, y, self._number, self.round + 1)

    def _begin(self) -> None:
        if self.center.abort[0]:
            raise Aborted
        self._link.begin()

    def _take_block(self, b: int, row: str, index: int, value: int) -> slice:
        """Block b comes in hand when that word has that value."""
        block = self.center.layout.block(b)
        self._number = b
        self._words.wait(self._link.next_lane(), row, index, value)
        self._link.fetch(block)
        return block

    def _give_block(self, b: int, row: str, index: int, value: int, *, snapshot: bool = False) -> None:
        """Block b, brought back, is handed on by writing that word."""
        if self.counts or snapshot:
            self._words.count(self._link.lane, b, int(self.counts), snapshot=snapshot)
        self._words.write(self._link.lane, row, index, value)

    def _end(self) -> None:
        """The exchange is enqueued."""
        self._ops.exchange_ends(self._record())
        if self._link.inline:
            self._ops.wait_for_exchange()
        while len(self._under_way) > LEAD:
            self._settle()

    def _record(self) -> Event:
        place = self._enqueued % COUNTS
        self._enqueued += 1
        self._link.join()
        self._gpu.fetch_counter(self._link.first, place)
        self._done[place].record(self._link.first)
        self._under_way.append((self.round, place))
        return self._done[place]

    # The distance

    def step_made(self) -> None:
        """A step is enqueued: waits until the step LEAD before it is done."""
        made = self._made[self._steps % LEAD]
        if self._steps >= LEAD:
            self.until(made.is_done)
        made.record(self._gpu.training)
        self._steps += 1

    def drain(self) -> None:
        """Returns when everything enqueued is done. What it says of non-finite values is not looked at before its time,
        so that a checkpoint changes nothing."""
        self._ops.wait_for_exchange()
        self._drained.record(self._gpu.training)
        self.until(self._drained.is_done)

    def until(self, done: Callable[[], bool]) -> None:
        """Returns when the device has got there; meanwhile the worker can be held, and says whom it waits for."""
        if not done():
            self._wait(done, self._late)

    def _settle_all(self) -> None:
        while self._under_way:
            self._settle()

    def _settle(self) -> None:
        """Waits for the earliest exchange under way, and learns what guarded kernels have refused up to it."""
        _, place = self._under_way[0]
        self.until(self._done[place].is_done)
        self._under_way.popleft()
        self._ops.refused = self._gpu.fetched(place)

    def _late(self) -> int:
        """The worker that the exchanges under way wait for; ourselves if it is the device that is slow."""
        return self.rank


class _StreamRounds(StreamTurns):
    """The orders with common rounds; see `turns._Rounds`. `update` counts the turns of this launch, whether they were
    made or passed, on top of the updates that were made before."""

    def _visit(self, b: int, place: int, snapshot: bool) -> Iterator[slice]:
        """One block: yields it to be enqueued when `place` others have visited it in this round."""
        s, last = self.round * self.workers + place, place == self.workers - 1
        block = self._take_block(b, "turn", b, s)
        self.update = s + 1 - self.center.uncounted[b]
        with self._ops.on(self._link.lane):
            yield block
        if self._close is not None and last:
            # 1. The block goes back closed, 2. we die, 3. the launcher passes our turn and must not close it again.
            with self._ops.on(self._link.lane):
                self._close(block)
            self._words.write(self._link.lane, "visited", b, 0)
        self._link.bring_back()
        if self._close is not None and not last:
            self._words.write(self._link.lane, "visited", b, self.round + 1)
        if snapshot and last:
            self._write_snapshot()
        self._give_block(b, "turn", b, s + 1, snapshot=snapshot and last)

    def _write_snapshot(self) -> None:
        # 1. The launcher still reads the snapshot of an earlier round, 2. we overwrite it: hence wait until taken.
        earlier = self._calendar.previous_snapshot(self.round)
        if earlier is not None:
            self._words.wait(self._link.lane, "taken", 0, earlier + 1)
        self._link.bring_back(SNAPSHOT)

    def _late_in(self, places: list[tuple[int, int]], owner: Callable[[int, int, int, int], int]) -> int:
        """Of (block, place) in the order of the walk, the owner of the first turn that has not come."""
        turn = self.center.turn
        for round, _ in self._under_way:
            for b, place in places:
                if turn[b] < round * self.workers + place:
                    return owner(b, turn[b], self.workers, self.blocks)
        return self.rank


class StreamStrict(_StreamRounds):
    """The Latin square of `turns.StrictTurns`, in stream order."""

    def visit(self) -> Iterator[slice]:
        """One exchange: yields the blocks in turn; what the caller does with each is enqueued."""
        self._begin()
        snapshot = self._calendar.snapshot_after(self.round)
        for b in walk(self.rank, self.workers, self.blocks):
            yield from self._visit(b, position(b, self.rank, self.workers, self.blocks), snapshot)
        self._end()
        self.round += 1

    def _late(self) -> int:
        p, G = self.workers, self.blocks
        return self._late_in([(b, position(b, self.rank, p, G)) for b in walk(self.rank, p, G)], owner)


class StreamTogether(_StreamRounds):
    """The rendezvous of `turns.TogetherTurns`, in stream order."""

    def read(self) -> Iterator[slice]:
        """Yields the blocks, to be read only: each as it is before our visit of this round, after all of the last."""
        self._begin()
        for b in range(self.blocks):
            block = self._take_block(b, "turn", b, self.round * self.workers)
            with self._ops.on(self._link.lane):
                yield block
        self._end()

    def visit(self) -> Iterator[slice]:
        """One exchange: yields the blocks in turn, when everybody has read them."""
        self._begin()
        snapshot = self._calendar.snapshot_after(self.round)
        self._words.write(self._link.first, "read", self.rank, self.round + 1)
        for i in range(self.workers):
            if i != self.rank:
                self._words.wait(self._link.first, "read", i, self.round + 1)
        self._link.spread()
        for b in range(self.blocks):
            yield from self._visit(b, self.rank, snapshot)
        self._end()
        self.round += 1

    def _late(self) -> int:
        read = self.center.read
        for i in range(self.workers):
            if read[i] < read[self.rank]:
                return i
        return self._late_in([(b, self.rank) for b in range(self.blocks)], by_rank)


class StreamFree(StreamTurns):
    """First come, first served, as `turns.FreeTurns`, in stream order.

    Blocks are enqueued in one order for all workers, while grants come in any: who waits for a block waits for one that
    somebody holds who waits for none but lower ones, so there is no deadlock.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.round = FreeTurns.take_over(self.center, self.rank)

    def visit(self) -> Iterator[slice]:
        """One exchange: yields the blocks; what the caller does with each is enqueued for when it is granted."""
        self._begin()
        number, base = self.round + 1, self.rank * self.blocks
        self._words.write(self._link.first, "request", self.rank, number)
        for b in range(self.blocks):
            block = self._take_block(b, "grant", base + b, number)
            with self._ops.on(self._link.lane):
                yield block
            self._link.bring_back()
            self._give_block(b, "done", base + b, number)
        self._end()
        self.round = number


class StreamNone(StreamTurns):
    """Hogwild, as `turns.NoTurns`: in place only, so that what a rule does not write is not written back."""

    def visit(self) -> Iterator[slice]:
        """One exchange: yields the blocks without waiting for anybody."""
        self._begin()
        for b in walk(self.rank, self.workers, self.blocks):
            block = self.center.layout.block(b)
            self._link.fetch(block)
            with self._ops.on(self._link.lane):
                yield block
        self._end()


ORDERS: dict[str, type[StreamTurns]] = {
    "strict": StreamStrict, "together": StreamTogether, "free": StreamFree, "none": StreamNone
}  # fmt: skip
