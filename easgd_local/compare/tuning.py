"""A small search of the step size by successive halving (Jamieson, Talwalkar 2016, arXiv:1502.07943)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

FACTORS = tuple(10 ** (k / 2) for k in (-2, -1, 0, 1, 2))
RUNGS = ((5, 0.25), (2, 0.5))  # so many step sizes, each for this share of the steps of a compared run
COST = sum(count * share for count, share in RUNGS)  # in compared runs

Trial = dict[str, Any]


def grid(lr: float) -> list[float]:
    """The step sizes to try around an entry's own, three digits each."""
    return [float(f"{lr * factor:.3g}") for factor in FACTORS]


def search(lr: float, steps: int, tried: Callable[[float, int], Trial]) -> float:
    """The best step size. `tried(lr, steps)` runs a trial or looks it up; each rung keeps the best of the last."""
    candidates = grid(lr)
    for count, share in RUNGS:
        candidates = candidates[:count]
        candidates = best_first([tried(one, max(1, round(share * steps))) for one in candidates])
    return candidates[0]


def best_first(trials: Sequence[Trial]) -> list[float]:
    """The step sizes of the trials by test error, then test loss; those not done come last, smallest first."""
    return [one["lr"] for one in sorted(trials, key=_rank)]


def _rank(trial: Trial) -> tuple[float, float, float]:
    if trial["status"] != "done":
        return math.inf, math.inf, trial["lr"]
    loss = trial["test_loss"]
    return trial["test_error"], loss if math.isfinite(loss) else math.inf, trial["lr"]
