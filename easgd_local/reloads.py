"""Reloads of workers from the center, since their values were not finite: how often, and when a run is hopeless."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

HOPELESS = 5  # exchanges one after the other


@dataclass
class _Reloaded:
    """One worker: how often, at how many exchanges one after the other, and the clock of the last."""

    times: int = 0
    in_a_row: int = 0
    last_t: int = 0


class Reloads:
    """Of all workers; exchanges are τ steps apart."""

    def __init__(self, workers: int, tau: int) -> None:
        self._workers, self._tau = [_Reloaded() for _ in range(workers)], tau

    def add(self, rank: int, t: int) -> int:
        """The worker was reloaded at clock t; returns how often by now."""
        one = self._workers[rank]
        follows = one.times > 0 and t - one.last_t <= self._tau
        one.times, one.in_a_row, one.last_t = one.times + 1, one.in_a_row + 1 if follows else 1, t
        return one.times

    def hopeless(self, ranks: Iterable[int], clock: Callable[[int], int]) -> bool:
        """Whether all of these take over the center at every exchange, and bring it nothing: they train no more."""
        far = HOPELESS * self._tau  # a GPU's are found late
        lately = [(self._workers[rank], clock(rank)) for rank in ranks]
        return bool(lately) and all(one.in_a_row >= HOPELESS and t - one.last_t <= far for one, t in lately)

    def sentences(self) -> list[str]:
        """What is to be told of them at the end."""
        return [
            f"worker {rank} was reloaded from the center {'once' if one.times == 1 else f'{one.times} times'}, as its "
            f"values were not finite."
            for rank, one in enumerate(self._workers)
            if one.times
        ]
