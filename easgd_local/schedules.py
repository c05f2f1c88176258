"""When things happen, as functions of the worker's clock t: exchanges, evaluations, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Calendar:
    """The fixed dates of a run. Steps are counted per worker; 0 means never for the two periods.

    Exchange number r (from 0) belongs to step rτ. A worker that has completed T steps has made ⌈T/τ⌉ exchanges, so
    "the center at step T" is the center after round ⌈T/τ⌉ - 1: exact, whoever is ahead or behind.

    `ahead` is 1 where a worker makes the exchange of step t as soon as its clock shows t, 0 where it does so within the
    step: then every T above reads T + 1.
    """

    tau: int
    steps: int
    evaluate_every: int = 0
    checkpoint_every: int = 0
    ahead: int = 0

    def rounds_before(self, t: int) -> int:
        """⌈t/τ⌉, the number of exchanges that a worker has made when its clock shows t."""
        return -(-(t + self.ahead) // self.tau)

    def evaluation_steps(self, round: int) -> list[int]:
        """The steps T < steps at which an evaluation of the center after `round` is due."""
        return self._multiples(self.evaluate_every, round)

    def checkpoint_steps(self, round: int) -> list[int]:
        """The steps T < steps at which a checkpoint with the center after `round` is due."""
        return self._multiples(self.checkpoint_every, round)

    def snapshot_after(self, round: int) -> bool:
        """Whether somebody wants to see the center after this round."""
        return bool(self.evaluation_steps(round) or self.checkpoint_steps(round))

    def previous_snapshot(self, round: int) -> int | None:
        """The last snapshot round before `round`, None if there is none."""
        last = min(round * self.tau - self.ahead, self.steps - 1)  # the last step that belongs to an earlier round
        dates = [last // period * period for period in self._periods() if last >= period]
        return self.rounds_before(max(dates)) - 1 if dates else None

    def next_snapshot(self, round: int) -> int | None:
        """The first snapshot round from `round` on, None if there is none."""
        first = max(round * self.tau + 1 - self.ahead, 1)
        dates = [-(-first // period) * period for period in self._periods()]
        date = min(dates, default=self.steps)
        return self.rounds_before(date) - 1 if date < self.steps else None

    def checkpoint_due(self, t: int) -> bool:
        """Whether a checkpoint is to be written when the clock shows t: at multiples of the period, and at the end."""
        return bool(self.checkpoint_every) and t > 0 and (t % self.checkpoint_every == 0 or t == self.steps)

    def _periods(self) -> list[int]:
        return [period for period in (self.evaluate_every, self.checkpoint_every) if period]

    def _multiples(self, period: int, round: int) -> list[int]:
        if not period:
            return []
        first = max(round * self.tau + 1 - self.ahead, 1)
        last = min((round + 1) * self.tau - self.ahead, self.steps - 1)
        return list(range(-(-first // period) * period, last + 1, period))
