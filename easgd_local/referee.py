"""Passes the turns of workers that are gone, or grants blocks: what the launcher writes into the center meanwhile."""

from __future__ import annotations

import threading
from types import TracebackType

from easgd_local.backend.cpu import CpuOps, Vector
from easgd_local.center import Center
from easgd_local.free_turns import Arbiter
from easgd_local.rules.base import Rule
from easgd_local.schedules import Calendar
from easgd_local.turns import by_rank, owner, pass_turns

NEVER = 2**62  # a turn number and a round that nobody reaches


class Desk:
    """What a rule may touch when the launcher ends a round: the center's vectors, by their letters."""

    def __init__(self, center: Center) -> None:
        self.workers, self.ops, self._vectors = center.layout.workers, CpuOps(), center.vectors

    def __getattr__(self, name: str) -> Vector:
        return self._vectors[name]


class Referee(threading.Thread):
    """Passes the turns of workers that are gone (strict), or grants blocks as they are asked for (free).

    A thread of the launcher, and the launcher is the only writer of these words, because the gone write nothing.
    """

    IDLE_S, BUSY_S = 0.02, 0.5e-3

    def __init__(self, center: Center, calendar: Calendar, rule: Rule, order: str) -> None:
        super().__init__(name="easgd-referee", daemon=True)
        self._center, self._calendar, self._rule, self._order = center, calendar, rule, order
        self._owner = by_rank if order == "together" else owner
        self._desk = Desk(center)
        self._arbiter = Arbiter(center)
        self._gone: dict[int, int] = {}
        self._lock, self._ends = threading.Lock(), threading.Event()

    def retire(self, rank: int) -> None:
        """Worker `rank` has exited: its turns are passed from now on."""
        with self._lock:
            self._gone[rank] = NEVER
            self._center.read[rank] = NEVER  # no rendezvous waits for it

    def readmit(self, rank: int) -> int:
        """A new worker takes this rank; returns the first round that will wait for it."""
        center = self._center
        with self._lock:
            # No turn of a later round than the newest can have been passed, and none will be.
            first = max(center.turn[b] for b in range(center.layout.blocks)) // center.layout.workers + 1
            if self._order in ("strict", "together"):
                self._gone[rank] = first
                self._center.read[rank] = first
            else:
                del self._gone[rank]
            return first

    def run(self) -> None:
        """Until the context is left."""
        while not self._ends.wait(self._pause_s()):
            busy = True
            while busy:
                with self._lock:
                    busy = self._act()

    def __enter__(self) -> Referee:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ends.set()
        self.join()

    def _pause_s(self) -> float:
        return self.BUSY_S if self._gone or self._order == "free" else self.IDLE_S

    def _act(self) -> bool:
        """Whether there may be more to do at once."""
        match self._order:
            case "free":
                return self._arbiter.grant(self._gone)
            case "strict" | "together":
                self._pass()
        return False

    def _pass(self) -> None:
        center, p = self._center, self._center.layout.workers
        for b, s in pass_turns(center.turn, self._gone, p, center.layout.blocks, self._owner):
            if center.turn[b] != s:
                continue  # an earlier turn of this block could not be passed yet
            if s % p == p - 1:
                round = s // p
                snapshot, earlier = self._calendar.snapshot_after(round), self._calendar.previous_snapshot(round)
                if snapshot and earlier is not None and center.taken[0] <= earlier:
                    continue  # the earlier snapshot is still being read: next time
                if center.visited[b] == round + 1:  # a round to which nobody came has nothing to close
                    self._rule.close(self._desk, center.layout.block(b))
                if snapshot:
                    center.take_snapshot(b)
            center.turn[b] = s + 1
