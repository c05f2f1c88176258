"""A small search of the step size, of τ and β, by successive halving (Jamieson, Talwalkar 2016, arXiv:1502.07943)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

from easgd_local.rules.base import Rule
from easgd_local.rules.elastic import BETA, Elastic

NAMES = ("lr", "tau", "beta")
LRS = 5  # step sizes, unless asked otherwise
TAU_FACTORS = (1.0, 1 / 4, 4.0)
BETA_FACTORS = (1.0, 1 / 3, 3.0)
MEETINGS = 2  # of each worker, that a trial has at least

Trial = dict[str, Any]
Values = dict[str, float]  # hyperparameters


def candidates(
    rule: Rule, names: Sequence[str], *, lrs: int, workers: int, steps: int, cost: float | None = None
) -> list[Values]:
    """What to try around a rule's own values: the product of all `names` (of NAMES) that it has, those that work.

    lrs step sizes, factors of √10 apart; own τ and β, and some times less and more. A τ that leaves the shortest trial
    without an exchange is not tried, but for the rule's own.
    """
    axes: dict[str, list[float]] = {"lr": [_times(rule.lr, 10 ** (k / 2)) for k in range(-(lrs // 2), lrs // 2 + 1)]}
    if "tau" in names and any(one.name == "tau" for one in fields(rule)):
        axes["tau"] = list(dict.fromkeys(max(1, round(rule.period * factor)) for factor in TAU_FACTORS))
    if "beta" in names and isinstance(rule, Elastic) and rule.alpha is None and rule.rho is None:
        own = BETA if rule.beta is None else rule.beta
        axes["beta"] = [_times(own, factor) for factor in BETA_FACTORS]
    found = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    found = [one for one in found if _works(rule, one, workers)]
    shortest = steps * min((share for _, share in rungs(len(found), cost)), default=1.0)
    longest = max(rule.period, shortest / MEETINGS)
    return [one for one in found if one.get("tau", 1) <= longest]


def _times(own: float, factor: float) -> float:
    """Three digits are enough, but for the entry's own value."""
    return own if factor == 1 else float(f"{own * factor:.3g}")


def _works(rule: Rule, values: Values, workers: int) -> bool:
    try:
        replace(rule, **values).derived(workers)
    except ValueError:  # such as α beyond 1
        return False
    return True


def rungs(count: int, cost: float | None = None) -> list[tuple[int, float]]:
    """(how many candidates, for which share of the steps of a compared run): the last two for a half, of five for a
    quarter, of ten for an eighth and so on; all that there are on the first. With `cost`, in compared runs, all shares
    are longer or shorter by one factor.
    """
    if count < 2:
        return []
    found = [(2, 1 / 2)]
    keep, share = 5, 1 / 4
    while count > found[0][0]:
        found.insert(0, (keep, share))
        keep, share = 2 * keep, share / 2
    found = [(min(count, keep), share) for keep, share in found]
    factor = 1.0 if cost is None else cost / cost_of(found)
    return [(keep, min(1.0, factor * share)) for keep, share in found]


def cost_of(found: Sequence[tuple[int, float]]) -> float:
    """Of these rungs, in compared runs."""
    return sum(keep * share for keep, share in found)


def search(
    given: Sequence[Values],
    steps: int,
    tried: Callable[[Values, int], Trial],
    cost: float | None = None,
    least: int = 1,
) -> Values:
    """The best candidate. `tried(values, steps)` runs a trial or looks it up; each rung keeps the best of the last.

    A trial is never so short that its workers would hardly meet, `least` steps.
    """
    for keep, share in rungs(len(given), cost):
        length = min(steps, max(1, least, round(share * steps)))
        given = best_first([tried(one, length) for one in given[:keep]])
    return given[0]


def best_first(trials: Sequence[Trial]) -> list[Values]:
    """The values of the trials by test error, then test loss; those not done come last, smallest step size first."""
    return [one["values"] for one in sorted(trials, key=_rank)]


def _rank(trial: Trial) -> tuple[float, float, float]:
    lr = trial["values"]["lr"]
    if trial["status"] != "done":
        return math.inf, math.inf, lr
    loss = trial["test_loss"]
    return trial["test_error"], loss if math.isfinite(loss) else math.inf, lr
