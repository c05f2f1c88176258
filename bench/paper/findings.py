"""What the papers found, held against our runs: each finding with its numbers, confirmed, refuted or not decided.

Test errors are compared by their means over the seeds. Two of them are told apart when they differ by more than both
standard deviations together. With one run of each nothing is decided, nor with an entry that was not run; one of
which no run is done is worse than all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from experiments import EAMSGD, EASGD, EXPERIMENTS
from rows import Runs

from easgd_local.compare.entries import parse
from easgd_local.compare.measuring import Record
from easgd_local.compare.standing import Spread, Standing

Found = Mapping[str, Standing]
TAUS = (1, 4, 16, 64)
NONE_DONE = Spread(0, math.inf, math.inf, math.inf, math.inf, 0.0)
SOONER = 1.2  # times
LEAP = 1.1  # times the training loss at the start, which learning does not reach
GUESS = 0.9  # of ten classes: the share that a guess gets wrong


@dataclass(frozen=True)
class Finding:
    """A claim, what our runs say to it, and the numbers; verdict: confirmed, refuted, not decided."""

    claim: str
    verdict: str
    numbers: str


def error(found: Found, label: str) -> Spread | None:
    """The final test error; an infinite one without a run that is done, None without a run."""
    one = found.get(label)
    return None if one is None else one.test_error or NONE_DONE


def less(a: Spread | None, b: Spread | None) -> bool | None:
    """Whether a is below b; None where that cannot be told."""
    if a is None or b is None or a.mean == b.mean or a.deviation is None or b.deviation is None:
        return None
    return a.mean < b.mean if abs(a.mean - b.mean) > a.deviation + b.deviation else None


def no_worse(a: Spread | None, b: Spread | None) -> bool | None:
    """Whether a is not above b; None where it is, but not by enough to tell, or where there is one run only."""
    if a is None or b is None or a.deviation is None or b.deviation is None or a is b is NONE_DONE:
        return None
    return True if a.mean <= b.mean else False if less(b, a) else None


def together(answers: Sequence[bool | None]) -> str:
    """The verdict on a claim that holds if all these do."""
    if any(one is False for one in answers):
        return "refuted"
    return "confirmed" if all(answers) else "not decided"


def text(one: Spread | None) -> str:
    """Such as 41.2 ± 0.3 %."""
    if one is None:
        return "not run"
    if math.isinf(one.mean):
        return "no run done"
    return f"{100 * one.mean:.1f}" + ("" if one.deviation is None else f" ± {100 * one.deviation:.1f}") + " %"


def _label(entry: str) -> str:
    return parse([entry])[0].label


def _by_tau(found: Found, name: str) -> dict[int, tuple[str, Spread | None]]:
    """For each τ the label and the error of the rule's entry in that panel."""
    panels = dict(zip(TAUS, EXPERIMENTS["cifar-tau"].panels, strict=True))
    labels = {tau: next(one for one in panel.labels if one.split()[0] == name) for tau, panel in panels.items()}
    return {tau: (label, error(found, label)) for tau, label in labels.items()}


def _listed(errors: Mapping[int, tuple[str, Spread | None]], letter: str = "τ") -> str:
    return ", ".join(f"{letter} = {key}: {text(one)}" for key, (_, one) in errors.items())


def cifar_tau(runs: Runs, found: Found) -> list[Finding]:
    findings = []
    for name in ("downpour", "adownpour", "mvadownpour"):
        own = {tau: one for tau, (_, one) in _by_tau(found, name).items()}
        answers = [less(own[short], own[long]) for short in (1, 4) for long in (16, 64)]
        claim = f"{name} is better at τ = 1 and 4 than at 16 and 64"
        findings.append(Finding(claim, together(answers), _listed(_by_tau(found, name))))
    findings.append(_instability(runs, found))
    for tau, panel in zip(TAUS, EXPERIMENTS["cifar-tau"].panels, strict=True):
        own = error(found, _label(EAMSGD.format(tau=tau)))
        others = {one.split()[0]: error(found, one) for one in panel.labels if not one.startswith("eamsgd")}
        answers = [less(own, one) for one in others.values()]
        second = min(others, key=lambda one: _mean(others[one]))
        numbers = f"eamsgd {text(own)}, the best of the others {second} {text(others[second])}"
        findings.append(Finding(f"eamsgd is best of all at τ = {tau}", together(answers), numbers))
    for name in ("easgd", "eamsgd"):
        own = _by_tau(found, name)
        answers = [no_worse(own[tau][1], own[1][1]) for tau in TAUS[1:]]
        findings.append(Finding(f"a longer τ is not worse for {name}", together(answers), _listed(own)))
    return findings


def _mean(one: Spread | None) -> float:
    return float("inf") if one is None else one.mean


def _instability(runs: Runs, found: Found) -> Finding:
    """DOWNPOUR at the largest step size that was tried at every τ: does it learn at τ = 1, and not at 16 and 64, where
    a training loss has leapt above that of the start, in this trial, in another or in a compared run?

    Step sizes are the same if their first digit is; of several trials at one the shortest counts.
    """
    tried: dict[int, dict[float, Record]] = {}
    labels = {tau: label for tau, (label, _) in _by_tau(found, "downpour").items()}
    for tau, label in labels.items():
        own = sorted((one for one in runs.trials if one["label"] == label), key=lambda one: -one["wanted_steps"])
        tried[tau] = {float(f"{one['lr']:.0e}"): one for one in own}
    common = set.intersection(*(set(one) for one in tried.values()))
    claim = "downpour is very unstable at τ = 16 and 64"
    if not common:
        return Finding(claim, "not decided", "no step size was tried at every τ")
    lr = max(common)
    learned = {tau: _learned(one[lr]) for tau, one in tried.items()}
    worst = {tau: _worst_loss(runs, label) for tau, label in labels.items()}
    answers = [learned[1], *(not learned[tau] and worst[tau] > LEAP for tau in (16, 64))]
    told = (
        f"τ = {tau}: " + (f"{100 * one[lr]['test_error']:.1f} %" if one[lr]["status"] == "done" else one[lr]["status"])
        for tau, one in tried.items()
    )
    first = tried[1][lr]
    numbers = f"trials of {first['wanted_steps']} steps at lr = {first['lr']:g}: {', '.join(told)}"
    losses = ", ".join(f"{one:.3g}" for one in worst.values())
    return Finding(claim, together(answers), f"{numbers}; largest training loss of all runs over the start's: {losses}")


def _worst_loss(runs: Runs, label: str) -> float:
    """The largest training loss of an entry's evaluations and trials, in units of that at the start."""
    own = [one for one in runs.compared if one["label"] == label]
    start = next((one["curve"][0]["train_loss"] for one in own if one["curve"]), math.nan)
    losses = [point["train_loss"] for one in own for point in one["curve"]]
    losses += [one.get("train_loss", math.nan) for one in runs.trials if one["label"] == label]
    diverged = any(one["status"] == "diverged" for one in (*own, *runs.trials) if one["label"] == label)
    return math.inf if diverged else max((one / start for one in losses if math.isfinite(one)), default=math.nan)


def _learned(trial: Record) -> bool:
    """Whether it is better than a guess by a tenth of all answers."""
    return trial["status"] == "done" and trial["test_error"] < GUESS - 0.1


def cifar_p(runs: Runs, found: Found) -> list[Finding]:
    findings = []
    for name, entry in (("easgd", EASGD), ("eamsgd", EAMSGD)):
        own = {p: error(found, _label(f"{entry.format(tau=10)} workers={p}")) for p in (4, 8, 16)}
        answers = [less(own[8], own[4]), less(own[16], own[8])]
        numbers = ", ".join(f"p = {p}: {text(one)}" for p, one in own.items())
        findings.append(Finding(f"the error of {name} falls as p grows from 4 to 8 to 16", together(answers), numbers))
    return findings


def passm(runs: Runs, found: Found) -> list[Finding]:
    ours, theirs = found.get("passm+ lr=0.01"), found.get("ddp lr=0.01")
    if ours is None or theirs is None:
        return []
    errors = [error(found, one.label) for one in (ours, theirs)]
    accurate = Finding(
        "passm+ is no less accurate than data-parallel training", together([no_worse(*errors)]),
        f"passm+ {text(errors[0])}, ddp {text(errors[1])}",
    )  # fmt: skip
    return [accurate, *_sooner(ours.seconds, theirs.seconds)]


def _sooner(ours: Spread | None, theirs: Spread | None) -> list[Finding]:
    """Decided only where all runs of both say the same."""
    if ours is None or theirs is None:
        return []
    least, most = theirs.least / ours.largest, theirs.largest / ours.least
    verdict = "confirmed" if least >= SOONER else "refuted" if most < SOONER else "not decided"
    numbers = f"{theirs.median / ours.median:.2f} times (medians {ours.median:.1f} s and {theirs.median:.1f} s)"
    return [
        Finding(
            f"passm+ takes {SOONER} times less training time for as many samples",
            "not decided" if ours.n < 2 or theirs.n < 2 else verdict, numbers,
        )
    ]  # fmt: skip


def apam(runs: Runs, found: Found) -> list[Finding]:
    own = {p: error(found, f"apam workers={p} lr=0.0005") for p in (1, 2, 5, 10, 20)}
    answers = [no_worse(one, own[1]) for p, one in own.items() if p > 1]
    numbers = ", ".join(f"p = {p}: {text(one)}" for p, one in own.items())
    return [Finding("apam is as accurate with more workers", together(answers), numbers)]


FINDINGS: dict[str, Callable[[Runs, Found], list[Finding]]] = {
    "cifar-tau": cifar_tau, "cifar-p": cifar_p, "passm": passm, "apam": apam,
}  # fmt: skip
