"""Answers the launcher for a worker whose processor may wait for its device in the middle of a step."""

from __future__ import annotations

import threading

from easgd_local.center import Center


class Respondent(threading.Thread):
    """Says "held" while the worker is inside a step, which it cannot leave before it is released.

    A call to the device may wait for all that is enqueued, hence for other workers, who hold at their boundaries until
    all hold, hence for us: nobody would go on. Only for orders of turns with common rounds, where nothing that goes on
    inside a step changes the center that the launcher looks at.
    """

    POLL_S = 1e-3

    def __init__(self, center: Center, rank: int) -> None:
        super().__init__(name="easgd-respondent", daemon=True)
        self._center, self._rank = center, rank
        self._inside: int | None = None  # the clock of the step under way
        self._lock, self._ends = threading.Lock(), threading.Event()

    def enter(self, t: int) -> None:
        """The worker is inside step t from here on, and can stop at t + 1 at the earliest."""
        with self._lock:
            self._inside = t

    def leave(self) -> None:
        """It is at a boundary, where it answers itself."""
        with self._lock:
            self._inside = None

    def end(self) -> None:
        """The worker needs no answers any more."""
        self._ends.set()
        self.join()

    def run(self) -> None:
        """Until the end."""
        center, rank = self._center, self._rank
        while not self._ends.wait(self.POLL_S):
            with self._lock:
                pause = center.pause[0]
                if pause & 1 and self._inside is not None and center.held[rank] != pause:
                    center.say_held(rank, pause, self._inside + 1)
