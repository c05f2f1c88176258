"""Several simulations side by side: rules × periods × numbers of workers, their key numbers and their tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from easgd_local.figure_folder import Table
from easgd_local.partition import share_out
from easgd_local.rules import RULES, rule_class
from easgd_local.rules.base import Rule
from easgd_local.simulate.machine import Machine
from easgd_local.simulate.problems import Problem
from easgd_local.simulate.simulation import Outcome, Scenario, simulate

GAIN = 1.1  # a larger number of workers helps if it is at least so many times faster
FACTORS = (1.0, 0.25, 0.0625)  # of the step size, of which a sweep takes the best


@dataclass(frozen=True)
class Cell:
    """One rule, τ and p: the outcome with the best of the step sizes, and the status of each."""

    rule: str
    tau: int
    workers: int
    best: Outcome
    statuses: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Virtual seconds to the target; infinite if it was not reached."""
        return self.best.seconds_to_target

    @property
    def fate(self) -> str:
        """What became of it, in one word."""
        if math.isfinite(self.seconds):
            return "reached"
        return "diverged" if set(self.statuses) == {"diverged"} else "not reached"


def make_rules(names: Sequence[str], given: Mapping[str, Any], tau: Sequence[int]) -> list[Rule]:
    """Every rule with every τ, if it has one; a hyperparameter that is given goes to the rules that have it.

    `ValueError` for one that none of them has.
    """
    kinds = [rule_class(name) for name in dict.fromkeys(names)]
    for name, value in {**given, **({"tau": tau[0]} if tau else {})}.items():
        if not any(name in _names(kind) for kind in kinds):
            owners = ", ".join(other for other, kind in RULES.items() if name in _names(kind))
            raise ValueError(
                f"{name}={value}: none of {', '.join(kind.name for kind in kinds)} has a {name}; leave it out, or use "
                f"a rule that has it: {owners}."
            )
    rules = []
    for kind in kinds:
        own = {name: value for name, value in given.items() if name in _names(kind)}
        periods = [{"tau": one} for one in tau] if tau and "tau" in _names(kind) else [{}]
        rules += [kind(**own, **period) for period in periods]
    return rules


def plan(rules: Sequence[Rule], workers: Sequence[int], problem: Problem, **settings: Any) -> list[Scenario]:
    """The scenarios, all of them possible, before any is run; the numbers of workers grow."""
    scenarios = [Scenario(rule=rule, workers=p, **settings) for rule in rules for p in sorted(set(workers))]
    for one in scenarios:
        if one.rule.divides:
            share_out(problem.layers, one.workers)
    return scenarios


def cells(
    scenarios: Sequence[Scenario], problem: Problem, machine: Machine, factors: Sequence[float]
) -> Iterator[Cell]:
    """Runs them, each with every step size, and gives the best: the first at the target, or the least error."""
    for one in scenarios:
        rates = [replace(one, rule=replace(one.rule, lr=one.rule.lr * factor)) for factor in factors]
        # Without their vectors, which may be large when there are many simulations of many workers.
        done = [replace(simulate(rate, problem, machine), shared={}, x=[], local=[]) for rate in rates]
        best = min(done, key=lambda it: (it.seconds_to_target, it.status == "diverged", float(it.curve["error"][-1])))
        yield Cell(one.rule.name, one.period, one.workers, best, tuple(it.status for it in done))


# Sentences


def run_lines(cell: Cell, measure: str) -> list[str]:
    """The key numbers of one simulation."""
    it, limits = cell.best, cell.best.limits
    error, shares, scenario = it.curve["error"], it.shares, it.scenario
    target = f"{100 * scenario.target:g} % of the start"
    visits = np.repeat(list(it.staleness), list(it.staleness.values()))
    when = f"{target} after {it.seconds_to_target:,.4g} s" if math.isfinite(it.seconds_to_target) else f"{target} never"
    full = "never" if math.isinf(limits.memory_full_at) else f"with {math.ceil(limits.memory_full_at):,} workers"
    return [
        f"{title(cell)}: {it.gradients:,} gradients in {it.seconds:,.4g} virtual s, {it.gradients_per_s:,.4g} "
        f"gradients/s; {measure} {error[0]:.4g} -> {error[-1]:.4g}{' (diverged)' * (it.status == 'diverged')}, {when}.",
        f"  a worker's time: computing {_percent(shares['compute'])}, exchange {_percent(shares['exchange'])}, waiting "
        f"{_percent(shares['wait'])}; staleness: median {np.median(visits):,.0f}, largest {visits.max():,} updates.",
        f"  an exchange moves {limits.exchange_bytes / 1e6:,.4g} MB in {1e3 * limits.exchange_s:,.4g} ms or more; a "
        f"link was busy {_percent(it.link_share)} of the time, the center's memory {_percent(it.memory_share)}; evenly "
        f"spread, its bandwidth is full {full}.",
    ]  # fmt: skip


def sweep_line(row: Sequence[Cell], target: float) -> str:
    """One rule and τ: seconds to the target at the fewest workers, the speed-ups of more, and where that ends."""
    first = row[0]
    parts = [f"p = {first.workers:,}: {_seconds(first)}"]
    for cell in row[1:]:
        gain = f" ({first.seconds / cell.seconds:.2g}×)" if math.isfinite(first.seconds + cell.seconds) else ""
        parts.append(f"{cell.workers:,}: {_seconds(cell)}{gain}")
    full = first.best.limits.memory_full_at
    memory = "" if math.isinf(full) else f" (the center's memory is full with {math.ceil(full):,})"
    start = f"{first.rule}, τ = {first.tau}: to {100 * target:g} % of the start"
    return f"{start} {', '.join(parts)}; {end_of_help(row)}{memory}."


def end_of_help(row: Sequence[Cell]) -> str:
    """From which number of workers on more of them do not help, at least not by a tenth."""
    best = row[0]
    for cell in row[1:]:
        if cell.seconds * GAIN <= best.seconds:
            best = cell
    later = [cell for cell in row if cell.workers > best.workers]
    if not math.isfinite(best.seconds):
        return "never there with any number of workers" if len(row) > 1 else "one number of workers only"
    if not later:
        return f"still helping at {best.workers:,} workers" if len(row) > 1 else "one number of workers only"
    lost = next((cell for cell in later if not math.isfinite(cell.seconds)), None)
    if lost is None:
        return f"stops helping beyond {best.workers:,}"
    for_good = not any(math.isfinite(cell.seconds) for cell in later if cell.workers > lost.workers)
    where = f"from {lost.workers:,} on" if for_good else f"at {lost.workers:,}"
    return f"stops helping beyond {best.workers:,}, {lost.fate} {where}"


def title(cell: Cell) -> str:
    """ "easgd, p = 4, τ = 10, strict, η = 0.05"."""
    turns, rate = cell.best.scenario.turns, cell.best.scenario.rule.lr
    return f"{cell.rule}, p = {cell.workers:,}, τ = {cell.tau}, {turns}, η = {rate:g}"


def _seconds(cell: Cell) -> str:
    return f"{cell.seconds:,.3g} s" if math.isfinite(cell.seconds) else cell.fate


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _names(kind: type[Rule]) -> list[str]:
    return [one.name for one in fields(kind)]


# Tables


def tables(found: Sequence[Cell]) -> dict[str, Table]:
    """runs: one row a simulation.  curves, staleness: many rows each."""
    columns: dict[str, Callable[[Cell], Any]] = {
        "status": lambda cell: cell.fate if cell.best.status == "reached" else cell.best.status,
        "seconds": lambda cell: cell.best.seconds,
        "gradients": lambda cell: cell.best.gradients,
        "gradients_per_s": lambda cell: cell.best.gradients_per_s,
        "error": lambda cell: cell.best.curve["error"][-1],
        "seconds_to_target": lambda cell: cell.seconds,
        "compute_share": lambda cell: cell.best.shares["compute"],
        "exchange_share": lambda cell: cell.best.shares["exchange"],
        "wait_share": lambda cell: cell.best.shares["wait"],
        "memory_share": lambda cell: cell.best.memory_share,
        "exchange_bytes": lambda cell: cell.best.limits.exchange_bytes,
        "memory_full_at_workers": lambda cell: cell.best.limits.memory_full_at,
        "link_share": lambda cell: cell.best.link_share,
    }
    one_each = [1] * len(found)
    runs = _whose(found, one_each) | {name: [read(cell) for cell in found] for name, read in columns.items()}
    lengths = [len(cell.best.curve["error"]) for cell in found]
    curves = {name: np.concatenate([cell.best.curve[name] for cell in found]) for name in found[0].best.curve}
    counts = [len(cell.best.staleness) for cell in found]
    staleness = {
        "staleness_updates": [int(one) for cell in found for one in cell.best.staleness],
        "visits": [visits for cell in found for visits in cell.best.staleness.values()],
    }
    return {
        "runs": runs, "curves": _whose(found, lengths) | curves, "staleness": _whose(found, counts) | staleness,
    }  # fmt: skip


def _whose(found: Sequence[Cell], lengths: Sequence[int]) -> dict[str, Any]:
    """The columns that say which simulation a row belongs to."""
    read: dict[str, Callable[[Cell], Any]] = {
        "rule": lambda cell: cell.rule,
        "workers": lambda cell: cell.workers,
        "tau": lambda cell: cell.tau,
        "turns": lambda cell: cell.best.scenario.turns,
        "lr": lambda cell: cell.best.scenario.rule.lr,
    }
    return {name: np.repeat([one(cell) for cell in found], lengths) for name, one in read.items()}
