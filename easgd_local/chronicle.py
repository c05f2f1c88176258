"""What a run tells while it lasts: events for its log and listeners, warnings, the workers' clocks for the views."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from easgd_local.metrics import Listener, Metrics
from easgd_local.summary import Clock, Ready

VIEW_S = 0.1  # between two looks of the views at the clocks


class Chronicle:
    """Written to while it is open. `warnings` are all that were given, those of the preparation among them."""

    def __init__(self, prepared: Ready, clock: Clock, listeners: Sequence[Listener]) -> None:
        self._prepared, self._clock, self._listeners = prepared, clock, list(listeners)
        self._center, self._ranks = prepared.center, range(prepared.plan.layout.workers)
        self._shown_at = 0.0
        self.warnings = list(prepared.warnings)

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """The log in the run's folder, and TensorBoard's if that is wanted."""
        folder, resume_t = self._prepared.plan.folder, self._prepared.t
        with contextlib.ExitStack() as ends:
            if self._prepared.config.tensorboard:
                from easgd_local.tensorboard import TensorBoard

                self._listeners.append(ends.enter_context(TensorBoard(folder, resume_t=resume_t or None)))
            self._metrics = ends.enter_context(Metrics(folder, self._listeners, resume_t=resume_t))
            yield

    def event(self, kind: str, *, t: int | None = None, rank: int | None = None, **values: Any) -> None:
        """An event; unless t is given, at the worker's clock, or where the run began."""
        if t is None:
            t = self._prepared.t if rank is None else self._center.clock[rank]
        self._metrics.write(kind, t=t, seconds=self._clock.seconds, rank=rank, **values)

    def warn(self, message: str) -> None:
        """An event that is also told at the end."""
        self.warnings.append(message)
        self.event("warning", message=message, t=max(self._center.clock[rank] for rank in self._ranks))

    def show(self, evaluating: Collection[int]) -> None:
        """Lets the views draw the clocks, a few times a second. `evaluating`: who holds for the center's evaluation."""
        if time.monotonic() - self._shown_at < VIEW_S:
            return
        self._shown_at = time.monotonic()
        clocks = [self._center.clock[rank] for rank in self._ranks]
        waiting_for = {rank: word - 1 for rank in self._ranks if (word := self._center.waiting_for[rank])}
        for listener in self._listeners:
            if hasattr(listener, "tick"):
                listener.tick(clocks, waiting_for=waiting_for, evaluating=evaluating)
