"""The way to the center: every worker's own link, and the center's memory, which all transfers share."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

from greenlet import getcurrent

from easgd_local.simulate.clock import Clock


class Link:
    """Transfers that go on at the same time, each over a link of its own, all through one memory.

    With k transfers under way each moves at

        min(b, M/k) bytes a second        b: of a link, M: of the center's memory

    All move at one rate, so a transfer that begins when every transfer would have got S bytes ends when that count is
    S plus its own bytes: a queue in the order of those ends is exact, whoever comes and goes meanwhile. Seconds are
    virtual; infinite bandwidths cost no time.
    """

    def __init__(self, clock: Clock, link_bytes_per_s: float, memory_bytes_per_s: float) -> None:
        self._clock, self._link, self._memory = clock, link_bytes_per_s, memory_bytes_per_s
        self._ends: list[tuple[float, int, Callable[[], object]]] = []
        self._count_bytes = 0.0  # what a transfer that is always under way would have got
        self._counted_at_s = 0.0
        self._begun = self._announced = 0
        self.moved_bytes = 0.0

    def transfer(self, size_bytes: float) -> None:
        """The calling greenlet goes on when so many bytes of its have moved."""
        self.moved_bytes += size_bytes
        if size_bytes <= 0 or self._link == self._memory == float("inf"):
            return
        self._advance()
        heappush(self._ends, (self._count_bytes + size_bytes, self._begun, getcurrent().switch))
        self._begun += 1
        self._announce()
        self._clock.park()

    @property
    def _rate(self) -> float:
        return min(self._link, self._memory / len(self._ends))

    def _advance(self) -> None:
        """Brings the count up to now, from zero again when nothing moves, so that rounding does not gather."""
        now_s = self._clock.now_s
        self._count_bytes = self._count_bytes + (now_s - self._counted_at_s) * self._rate if self._ends else 0.0
        self._counted_at_s = now_s

    def _announce(self) -> None:
        """Asks to be called at the next end; what was asked before no longer counts."""
        self._announced += 1
        if self._ends:
            number, left = self._announced, max(0.0, self._ends[0][0] - self._count_bytes)
            self._clock.call(self._clock.now_s + left / self._rate, lambda: self._arrive(number))

    def _arrive(self, number: int) -> None:
        if number != self._announced:
            return
        end, now_s = self._ends[0][0], self._clock.now_s
        arrived = []
        while self._ends and self._ends[0][0] <= end:
            arrived.append(heappop(self._ends)[2])
        self._count_bytes, self._counted_at_s = end, now_s  # exactly, whatever the division has rounded
        self._announce()
        for go_on in arrived:
            self._clock.call(now_s, go_on)
