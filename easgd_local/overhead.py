"""When exchanges do not hide: the share of the workers' time that they take, and the τ that would lower it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from easgd_local.rules.base import Rule

THRESHOLD = 0.1  # of a worker's time
WINDOW_S, WINDOWS = 5.0, 2  # so many windows on end of at least so many seconds of training


@dataclass(frozen=True)
class Spent:
    """What one worker has done in a window: steps, seconds of exchange and waiting, seconds altogether."""

    rank: int
    steps: int
    lost_s: float
    seconds: float

    @property
    def share(self) -> float:
        """Of its time, what exchange and waiting take; at most 1, though a report may tell of a wait begun earlier."""
        return min(1.0, self.lost_s / self.seconds)


def least_lost(windows: Iterable[Spent]) -> Spent | None:
    """The worker that loses the smallest share; what it loses no difference in speed explains.

    The others wait for it, however large τ is: a larger τ can help only where the quickest to return loses too.
    """
    return min((one for one in windows if one.steps and one.seconds > 0), key=lambda one: one.share, default=None)


def tau_to_hide(tau: int, spent: Spent, share: float = THRESHOLD) -> int | None:
    """The least τ' at which exchange and waiting take at most `share`, if one exchange goes on costing what it does.

    None where they have taken all of the time, so that nobody knows what a step takes.

    o/(o + τ's) ≤ share,     o = τ lost/steps,  s = (seconds - lost)/steps
    """
    steps_s = spent.seconds - spent.lost_s
    if steps_s <= 1e-9 * spent.seconds:
        return None
    return math.ceil(tau * spent.lost_s / steps_s * (1 - share) / share - 1e-9)


class Watch:
    """Follows what workers report and says once, in a sentence, that a larger τ would pay.

    `crowded`: more threads than cores. While one worker waits another one then has its core, so only the time of the
    exchange itself counts.  steps: of the run, if known; no larger τ is named.
    """

    def __init__(self, tau: int, *, crowded: bool, steps: int | None = None) -> None:
        self._tau, self._crowded, self._steps = tau, crowded, steps
        self._first: dict[int, tuple[float, int, float]] = {}  # rank -> (seconds, t, lost_s) where the window begins
        self._last: dict[int, tuple[float, int, float]] = {}
        self._began: float | None = None  # seconds at which the window begins
        self._high = 0  # windows on end beyond the threshold
        self._said = False

    def hear(self, rank: int, seconds: float, report: dict[str, Any]) -> str | None:
        """A worker's report, at so many seconds of training; the sentence, once, when it is time for it."""
        lost_s = report["exchange_s"] + (0.0 if self._crowded else report["wait_s"])
        now = seconds, report["t"], lost_s
        if rank not in self._first or lost_s < self._last[rank][2]:  # new, or in the place of one that died
            self._first[rank] = now
        self._last[rank] = now
        self._began = seconds if self._began is None else self._began
        if self._said or seconds - self._began < WINDOW_S:
            return None
        self._began = seconds
        return self._judge()

    def _judge(self) -> str | None:
        """Ends the window."""
        windows = [
            Spent(rank, t - self._first[rank][1], lost_s - self._first[rank][2], seconds - self._first[rank][0])
            for rank, (seconds, t, lost_s) in self._last.items()
        ]
        least = least_lost(one for one in windows if one.seconds >= WINDOW_S / 2)
        self._first, self._last = dict(self._last), dict(self._last)
        if least is None:
            return None
        self._high = self._high + 1 if least.share > THRESHOLD else 0
        self._said = self._high == WINDOWS
        return sentence(self._tau, least, self._crowded, self._steps) if self._said else None


def watch(rule: Rule, *, crowded: bool, steps: int | None = None) -> Watch | None:
    """For a rule whose τ can be larger than it is; None for others."""
    try:
        replace(rule, tau=rule.period + 1)  # type: ignore[call-arg]
    except (TypeError, ValueError):  # it has no τ, or a fixed one
        return None
    return Watch(rule.period, crowded=crowded, steps=steps)


def sentence(tau: int, spent: Spent, crowded: bool, steps: int | None = None) -> str:
    """The warning: what is lost, and the remedy: a τ where one within the run's steps would do, else a larger one."""
    what = "exchanges take" if crowded else "exchange and waiting take"
    exchange_ms = 1e3 * tau * spent.lost_s / spent.steps
    step_ms = 1e3 * max(0.0, spent.seconds - spent.lost_s) / spent.steps
    enough = tau_to_hide(tau, spent)
    remedy = "a larger tau would lower that"
    if enough is not None and (steps is None or enough <= steps):
        remedy = f"tau={enough} would bring that to {100 * THRESHOLD:.0f} %"
    return (
        f"tau={tau}: {what} {100 * spent.share:.0f} % of the time even of worker {spent.rank}, which loses least "
        f"({exchange_ms:.3g} ms an exchange, {step_ms:.3g} ms a step): {remedy} "
        f"if an exchange goes on costing as much."
    )
