"""The orders of turns of easgd_local/turns.py, on the virtual clock.

The blocks, the walks and the positions are the real center's, so the workers visit every block in the real order. What
differs is the model behind the clock: a problem of a few coordinates stands for one of `parameters`, cut into G blocks
as the real center would cut that, at least one for each worker. The toy's blocks lie at some of these G; at the others
there is nothing to compute, only bytes to move, and nobody waits there: whoever comes next along the walk follows one
block behind. So an exchange moves all of its bytes, and a block is held for the time of one of the G.

Toy blocks without coordinates are skipped. With more than `MOST` workers the toy is cut into at most `MOST_BLOCKS`
blocks, else nearly every coordinate would have a block, and a turn, of its own; with fewer workers the blocks are
exactly those of the real center.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from greenlet import getcurrent, greenlet

from easgd_local.center import BLOCK_BYTES, Layout
from easgd_local.simulate.clock import Clock
from easgd_local.turns import position

MOST, MOST_BLOCKS = 64, 8


@dataclass(frozen=True)
class Block:
    """Coordinates of the toy, and where among the center's G blocks they lie."""

    number: int
    place: int
    coordinates: slice


@dataclass(frozen=True)
class Grid:
    """The center of p workers: G places, and the blocks of the toy at some of them."""

    workers: int
    places: int
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, workers: int, n: int, parameters: float, block_bytes: int = BLOCK_BYTES) -> Grid:
        """For a toy of n coordinates, which stands for a model of so many parameters."""
        toy = Layout(workers if workers <= MOST else min(MOST_BLOCKS, workers), n, block_bytes=block_bytes)
        G = max(Layout(workers, int(parameters)).blocks, toy.blocks)
        cuts = [(b * G // toy.blocks, toy.block(b)) for b in range(toy.blocks)]
        full = [(place, block) for place, block in cuts if block.stop > block.start]
        return cls(workers, G, tuple(Block(number, *one) for number, one in enumerate(full)))

    def position(self, block: Block, rank: int) -> int:
        """After how many others worker i visits the block in each round of the Latin square."""
        return position(block.place, rank, self.workers, self.places)

    def walk(self, first: int) -> Iterator[tuple[int, Block | None]]:
        """The places in order from `first` on, around once: pairs of so many empty ones, and the block after them."""
        ordered = sorted(self.blocks, key=lambda block: (block.place - first) % self.places)
        at = 0
        for block in ordered:
            distance = (block.place - first) % self.places
            yield distance - at, block
            at = distance + 1
        yield self.places - at, None


class Visitor(Protocol):
    """What an order needs to know of a worker."""

    rank: int
    round: int

    def wait(self) -> None: ...
    def move(self, places: int, floats: float) -> None: ...
    def take(self, block: Block, place: int) -> slice: ...
    def leave(self, block: Block) -> None: ...


class Order:
    """None: everybody at once. What an exchange changes in a block, it changes at one instant, so no update is lost."""

    def __init__(self, grid: Grid, clock: Clock, close: Callable[[Visitor, slice], None]) -> None:
        self.grid, self._clock, self._close = grid, clock, close

    def visit(self, w: Visitor, floats: float) -> Iterator[slice]:
        """One exchange: yields the blocks, each in hand during its pass of the caller's loop."""
        for places, block in self.grid.walk(self._first(w)):
            w.move(places, floats)
            if block is not None:
                yield from self._hold(w, block, floats)
        w.round += 1

    def read(self, w: Visitor, floats: float) -> Iterator[slice]:
        """The blocks to be read only; only a rendezvous has a time for that."""
        raise NotImplementedError

    def _first(self, w: Visitor) -> int:
        """Where the walk of a worker begins: at its own group."""
        return w.rank * self.grid.places // self.grid.workers

    def _hold(self, w: Visitor, block: Block, floats: float) -> Iterator[slice]:
        yield w.take(block, -1)
        w.leave(block)
        w.move(1, floats)


class Strict(Order):
    """Strict: the Latin square. turn[b] = s: s visits of block b are complete."""

    def __init__(self, grid: Grid, clock: Clock, close: Callable[[Visitor, slice], None]) -> None:
        super().__init__(grid, clock, close)
        self._turn = [0] * len(grid.blocks)
        self._sleeping: dict[tuple[int, int], list[greenlet]] = defaultdict(list)

    def _hold(self, w: Visitor, block: Block, floats: float) -> Iterator[slice]:
        p, place = self.grid.workers, self._place(block, w)
        s = w.round * p + place
        self._await(w, block, s)
        assert self._turn[block.number] == s, f"block {block}: turn {self._turn[block.number]} instead of {s}"
        yield w.take(block, place)
        w.leave(block)
        w.move(1, floats)
        if place == p - 1:
            self._close(w, block.coordinates)
        self._turn[block.number] = s + 1
        self._wake((block.number, s + 1))

    def _place(self, block: Block, w: Visitor) -> int:
        return self.grid.position(block, w.rank)

    def _await(self, w: Visitor, block: Block, s: int) -> None:
        while self._turn[block.number] < s:
            self._sleep(w, (block.number, s))

    def _sleep(self, w: Visitor, until: tuple[int, int]) -> None:
        self._sleeping[until].append(getcurrent())
        w.wait()

    def _wake(self, now: tuple[int, int]) -> None:
        for sleeper in self._sleeping.pop(now, ()):
            self._clock.wake(sleeper)


class Together(Strict):
    """Rendezvous: all read the center as it was before the round, then visit the blocks in the order of their ranks."""

    def __init__(self, grid: Grid, clock: Clock, close: Callable[[Visitor, slice], None]) -> None:
        super().__init__(grid, clock, close)
        self._arrived: dict[int, int] = defaultdict(int)

    def read(self, w: Visitor, floats: float) -> Iterator[slice]:
        """Yields the blocks, to be read only: as they are before our visit of this round, after all of the last."""
        for places, block in self.grid.walk(0):
            w.move(places, floats)
            if block is not None:
                self._await(w, block, w.round * self.grid.workers)
                w.move(1, floats)
                yield block.coordinates

    def visit(self, w: Visitor, floats: float) -> Iterator[slice]:
        """One exchange: yields the blocks in turn, when everybody has read them."""
        self._arrived[w.round] += 1
        if self._arrived[w.round] < self.grid.workers:
            self._sleep(w, (-1, w.round))
        else:
            del self._arrived[w.round]
            self._wake((-1, w.round))
        yield from super().visit(w, floats)

    def _first(self, w: Visitor) -> int:
        return 0

    def _place(self, block: Block, w: Visitor) -> int:
        return w.rank


class Free(Order):
    """First come, first served: an idle block goes to the next in line of those that ask, as the real arbiter does."""

    def __init__(self, grid: Grid, clock: Clock, close: Callable[[Visitor, slice], None]) -> None:
        super().__init__(grid, clock, close)
        count = len(grid.blocks)
        self._asking: list[list[int]] = [[] for _ in range(count)]
        self._holder: list[int | None] = [None] * count
        self._last = [0] * count
        self._waiting: dict[int, greenlet] = {}

    def visit(self, w: Visitor, floats: float) -> Iterator[slice]:
        """One exchange: yields the blocks as they are granted, holding each during its pass of the caller's loop."""
        walk = list(self.grid.walk(self._first(w)))
        for _, block in walk[:-1]:
            assert block is not None
            insort(self._asking[block.number], w.rank)
            self._grant(block.number)
        pending = walk[:-1]
        while pending:
            granted = [one for one in pending if one[1] and self._holder[one[1].number] == w.rank]
            if not granted:
                self._sleep(w)
            for one in granted:
                places, block = one
                assert block is not None
                yield w.take(block, -1)
                w.leave(block)
                w.move(1, floats)
                self._holder[block.number] = None
                self._grant(block.number)
                pending.remove(one)
                w.move(places, floats)  # only now: nobody shall wait for a block while its holder moves others
        w.move(walk[-1][0], floats)
        w.round += 1

    def _sleep(self, w: Visitor) -> None:
        self._waiting[w.rank] = getcurrent()
        w.wait()

    def _grant(self, number: int) -> None:
        asking = self._asking[number]
        if self._holder[number] is not None or not asking:
            return
        rank = asking.pop(bisect_right(asking, self._last[number]) % len(asking))
        self._holder[number] = self._last[number] = rank
        if rank in self._waiting:
            self._clock.wake(self._waiting.pop(rank))


ORDERS: dict[str, type[Order]] = {"strict": Strict, "free": Free, "none": Order, "together": Together}
