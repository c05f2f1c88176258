"""The evaluations of a run: one at a time, first due, then asked of an evaluator, then answered."""

from __future__ import annotations

from typing import Any

from easgd_local.backend.cpu import Vector
from easgd_local.center import Center
from easgd_local.chronicle import Chronicle
from easgd_local.launcher import Child

RISEN = 1.1  # times the loss of the start: more is no noise

When = tuple[int, int]  # the round whose snapshot it is of, -1 for none, and the step that it belongs to


class Evaluations:
    """What is asked about the center, and the latest answer: `scores` of step `t`, and the buffers that were computed
    anew for it. `seconds` is the time of all of them."""

    def __init__(self, center: Center, chronicle: Chronicle, t: int, seconds: float) -> None:
        self._center, self._chronicle = center, chronicle
        self.due: When | None = None  # waits for the workers to hold
        self.asked: When | None = None  # under way
        self.evaluator: Child | None = None  # who was asked
        self.scores: dict[str, Any] = {}
        self.buffers: Vector | None = None
        self._first_loss: float | None = None  # at step 0
        self.t, self.seconds = t, seconds

    def ask(self, evaluator: Child | None, round: int, t: int) -> None:
        """Asks about the snapshot as it is; where nobody evaluates, it is as good as read."""
        if evaluator is None:
            self._read_to(round)
            return
        self.evaluator, self.asked = evaluator, (round, t)
        evaluator.tell(("evaluate", t))

    def snapshot_taken(self) -> None:
        """The evaluator has a copy of the snapshot."""
        self._read_to((self.asked or self.due or (-1,))[0])

    @property
    def pending(self) -> bool:
        """Whether one is due or under way."""
        return self.due is not None or self.asked is not None

    def answer(self, scores: dict[str, Any], buffers: Vector | None, took_s: float) -> bool:
        """What the evaluator found; false if nobody waits for it any more."""
        if self.asked is None:
            return False
        (round, self.t), self.asked = self.asked, None
        self.scores, self.buffers = scores, buffers
        if self.t == 0:
            self._first_loss = scores.get("train_loss")
        self.seconds += took_s
        self._chronicle.event("center", t=self.t, round=round, evaluate_s=took_s, **scores)
        return True

    def risen(self) -> str:
        """Says so where the center's training loss is now well above that of the start; else, or if that is not known,
        ""."""
        first, last = self._first_loss, self.scores.get("train_loss")
        if first is None or last is None or last <= RISEN * first:
            return ""
        return f"the center's training loss is {last:.3g} at the end, above the {first:.3g} of the beginning"

    def forget(self) -> None:
        """Nobody waits for an answer any more, and no evaluation is due."""
        self.due = self.asked = None

    def _read_to(self, round: int) -> None:
        self._center.taken[0] = max(self._center.taken[0], round + 1)
