"""First come, first served: the order of visits for workers of unequal speed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from easgd_local.center import Center
from easgd_local.turns import Aborted, Waiting, walk


class FreeTurns(Waiting):
    """First come, first served: for workers of unequal speed. Not reproducible.

    A worker posts one request for a whole exchange; the launcher grants blocks one holder at a time; the worker takes
    granted blocks in any order, so it never holds one block while it waits for another: no deadlock. Every word still
    has a single writer.
    """

    def __init__(self, center: Center, rank: int, hold: Callable[[], None]) -> None:
        super().__init__(center, rank, hold)
        self.round = self.take_over(center, rank)
        self._walk = walk(rank, self.workers, self.blocks)

    @staticmethod
    def take_over(center: Center, rank: int) -> int:
        """The number of the latest exchange that a worker of this rank has asked for; all of it is done."""
        # 1. A predecessor of this rank asked for an exchange, 2. it died, 3. its request is granted to us, who never
        # give back what we do not take: hence all of the request is done.
        number, blocks = center.request[rank], center.layout.blocks
        for place in range(rank * blocks, (rank + 1) * blocks):
            center.done[place] = number
        return number

    def visit(self) -> Iterator[slice]:
        """One exchange: yields the blocks as they are granted, holding each during its pass of the caller's loop."""
        center, base = self.center, self.rank * self.blocks
        number = self.round + 1
        center.request[self.rank] = number
        pending = list(self._walk)
        while pending:
            granted = [b for b in pending if center.grant[base + b] == number]
            if not granted:
                self._wait(
                    lambda: any(center.grant[base + b] == number for b in pending), lambda: self._holder(pending[0])
                )
            for b in granted:
                if center.abort[0]:
                    raise Aborted
                self._take(b)
                yield center.layout.block(b)
                self._count(b)
                center.done[base + b] = number
                pending.remove(b)
        self.round = number

    def _holder(self, b: int) -> int:
        center, G = self.center, self.blocks
        for i in range(self.workers):
            if i != self.rank and center.grant[i * G + b] > center.done[i * G + b]:
                return i
        return self.rank


class Arbiter:
    """Grants the blocks under `free`: runs in the launcher, the only writer of the grants."""

    def __init__(self, center: Center) -> None:
        self._center = center
        self._last = [0] * center.layout.blocks

    def grant(self, gone: Collection[int]) -> bool:
        """One pass over the blocks: gives each idle one to the next worker in line that asks; says whether any went.

        A block held by a worker that is gone is idle: the gone write nothing.
        """
        center, p, G = self._center, self._center.layout.workers, self._center.layout.blocks
        requests = [0 if i in gone else center.request[i] for i in range(p)]
        held = {
            b for i in range(p) if i not in gone for b in range(G) if center.grant[i * G + b] > center.done[i * G + b]
        }
        any_granted = False
        for b in range(G):
            if b in held:
                continue
            for step in range(1, p + 1):
                i = (self._last[b] + step) % p
                if requests[i] > center.done[i * G + b]:
                    center.grant[i * G + b] = requests[i]
                    self._last[b] = i
                    any_granted = True
                    break
        return any_granted
