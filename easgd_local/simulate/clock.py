"""A virtual clock: an event queue that says what happens next, and greenlets that sleep and wait on it.

A rule's `step` is an ordinary function that waits in its middle, for a gradient or for a turn. Each simulated worker
runs it in a greenlet of its own; where a real worker would wait, the greenlet is left for the queue, and entered again
when the virtual time has come. One thing happens at a time, and what is due at the same moment happens in the order in
which it was asked for, so a simulation is a pure function of its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush

from greenlet import getcurrent, greenlet


class Clock:
    """Virtual seconds from 0. Whoever makes it runs the queue; `sleep` and `park` are for greenlets below it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._asked = 0
        self._queue = getcurrent()

    def call(self, at_s: float, action: Callable[[], object]) -> None:
        """`action()` when the clock shows `at_s`."""
        assert at_s >= self.now_s, f"at {self.now_s} s an event of {at_s} s"
        heappush(self._events, (at_s, self._asked, action))
        self._asked += 1

    def sleep(self, seconds: float) -> None:
        """The calling greenlet goes on so much later."""
        if seconds > 0:
            self.call(self.now_s + seconds, getcurrent().switch)
            self._queue.switch()

    def park(self) -> None:
        """The calling greenlet goes on when somebody wakes it."""
        self._queue.switch()

    def wake(self, sleeper: greenlet) -> None:
        """A parked greenlet goes on now, after the caller and all that is due already."""
        self.call(self.now_s, sleeper.switch)

    def run(self, tasks: Sequence[Callable[[], None]], until: Callable[[], bool] = lambda: False) -> None:
        """Starts all tasks at once and returns when they have ended, or `until()`; the error of a task is raised here.

        A task that is still waiting then is ended where it waits.
        """
        started = [greenlet(task) for task in tasks]
        for one in started:
            self.call(self.now_s, one.switch)
        try:
            while self._events and not until():
                self.now_s, _, action = heappop(self._events)
                action()
            waiting = sum(not one.dead for one in started)
            assert until() or not waiting, f"{waiting} of {len(started)} tasks wait for what nobody will do"
        finally:
            for one in started:
                if one:  # started and not dead
                    one.throw()  # GreenletExit
