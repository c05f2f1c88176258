"""What the papers found, held against our runs: each finding with its numbers, confirmed, refuted or not decided.

Test errors are compared by their means over the seeds. Two of them are told apart when they differ by more than both
standard deviations together; with one run of each nothing is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from experiments import EAMSGD, EASGD, EXPERIMENTS
from rows import Runs

from easgd_local.compare.entries import parse
from easgd_local.compare.measuring import Record
from easgd_local.compare.standing import Spread, Standing

Found = Mapping[str, Standing]
TAUS = (1, 4, 16, 64)
GUESS = 0.9  # of ten classes: the share that a guess gets wrong


@dataclass(frozen=True)
class Finding:
    """A claim, what our runs say to it, and the numbers; verdict: confirmed, refuted, not decided."""

    claim: str
    verdict: str
    numbers: str


def error(found: Found, label: str) -> Spread | None:
    """The final test error; None without a run that is done."""
    one = found.get(label)
    return None if one is None else one.test_error


def less(a: Spread | None, b: Spread | None) -> bool | None:
    """Whether a is below b; None where they cannot be told apart. An entry of which no run is done is above all."""
    if a is None or b is None:
        return None if a is b else a is not None
    if a.deviation is None or b.deviation is None or abs(a.mean - b.mean) <= a.deviation + b.deviation:
        return None
    return a.mean < b.mean


def no_worse(a: Spread | None, b: Spread | None) -> bool | None:
    """Whether a is not above b; None where it is, but not by enough to tell."""
    if a is not None and b is not None and a.mean <= b.mean:
        return True
    return None if less(b, a) is None else False


def together(answers: Sequence[bool | None]) -> str:
    """The verdict on a claim that holds if all these do."""
    if any(one is False for one in answers):
        return "refuted"
    return "confirmed" if all(answers) else "not decided"


def text(one: Spread | None) -> str:
    """Such as 41.2 ± 0.3 %."""
    if one is None:
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
        best, *others = _sorted(found, panel.labels, _label(EAMSGD.format(tau=tau)))
        answers = [less(error(found, best), error(found, one)) for one in others]
        second = min(others, key=lambda one: _mean(error(found, one)))
        numbers = f"eamsgd {text(error(found, best))}, the best of the others {second.split()[0]} " \
                  f"{text(error(found, second))}"  # fmt: skip
        findings.append(Finding(f"eamsgd is best of all at τ = {tau}", together(answers), numbers))
    for name in ("easgd", "eamsgd"):
        own = _by_tau(found, name)
        answers = [no_worse(own[tau][1], own[1][1]) for tau in TAUS[1:]]
        findings.append(Finding(f"a longer τ is not worse for {name}", together(answers), _listed(own)))
    return findings


def _sorted(found: Found, labels: Sequence[str], first: str) -> list[str]:
    """The labels with a given one before the others."""
    return [first, *(one for one in labels if one != first and one in found)]


def _mean(one: Spread | None) -> float:
    return float("inf") if one is None else one.mean


def _instability(runs: Runs, found: Found) -> Finding:
    """DOWNPOUR at the largest step size that was tried at every τ: does it learn at τ = 1, and not at 16 and 64?

    Step sizes are the same if their first digit is; of several trials at one the shortest counts.
    """
    tried: dict[int, dict[float, Record]] = {}
    for tau, (label, _) in _by_tau(found, "downpour").items():
        own = sorted((one for one in runs.trials if one["label"] == label), key=lambda one: -one["wanted_steps"])
        tried[tau] = {float(f"{one['lr']:.0e}"): one for one in own}
    common = set.intersection(*(set(one) for one in tried.values()))
    claim = "downpour is very unstable at τ = 16 and 64"
    if not common:
        return Finding(claim, "not decided", "no step size was tried at every τ")
    lr = max(common)
    learned = {tau: _learned(one[lr]) for tau, one in tried.items()}
    answers = [learned[1], not learned[16], not learned[64]]
    told = (
        f"τ = {tau}: " + (f"{100 * one[lr]['test_error']:.1f} %" if one[lr]["status"] == "done" else one[lr]["status"])
        for tau, one in tried.items()
    )
    steps = tried[1][lr]["wanted_steps"]
    return Finding(claim, together(answers), f"trials of {steps} steps at lr = {lr:g}: {', '.join(told)}")


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
    if ours is None or theirs is None or ours.seconds is None or theirs.seconds is None:
        return []
    ratio = theirs.seconds.median / ours.seconds.median
    return [
        Finding("passm+ is no less accurate than data-parallel training",
                together([no_worse(ours.test_error, theirs.test_error)]),
                f"passm+ {text(ours.test_error)}, ddp {text(theirs.test_error)}"),
        Finding("passm+ takes 1.2 times less training time for as many samples",
                "confirmed" if ratio >= 1.2 else "refuted",
                f"{ratio:.2f} times (medians {ours.seconds.median:.1f} s and {theirs.seconds.median:.1f} s)"),
    ]  # fmt: skip


def apam(runs: Runs, found: Found) -> list[Finding]:
    own = {p: error(found, f"apam workers={p} lr=0.0005") for p in (1, 2, 5, 10, 20)}
    known = {p: one for p, one in own.items() if one is not None}
    if 1 not in known or len(known) < 2:
        return []
    answers = [no_worse(one, known[1]) for p, one in known.items() if p > 1]
    numbers = ", ".join(f"p = {p}: {text(one)}" for p, one in known.items())
    return [Finding("apam is as accurate with more workers", together(answers), numbers)]


FINDINGS: dict[str, Callable[[Runs, Found], list[Finding]]] = {
    "cifar-tau": cifar_tau, "cifar-p": cifar_p, "passm": passm, "apam": apam,
}  # fmt: skip
