"""What the records of a comparison say of each entry: times to the target, errors, rates, with spread and n."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from easgd_local.compare.measuring import Record


@dataclass(frozen=True)
class Spread:
    """Mean, median, least, largest and standard deviation (n - 1; None for one alone) of n numbers."""

    n: int
    mean: float
    median: float
    least: float
    largest: float
    deviation: float | None


@dataclass(frozen=True)
class Standing:
    """One entry. Over its runs that are done; `statuses` counts all of its runs.

    seconds_to_target is over the runs that reached it: `reached` of them. None: there is nothing to say.
    """

    label: str
    lr: float
    momentum: float | None
    tuned: dict[str, float]
    workers: int | None
    steps: int | None
    statuses: dict[str, int]
    reached: int
    seconds_to_target: Spread | None
    samples_to_target: Spread | None
    test_error: Spread | None
    seconds: Spread | None
    samples_per_s: Spread | None
    exchange_s: Spread | None
    wait_s: Spread | None
    moved_bytes: Spread | None

    @property
    def status(self) -> str:
        """done, or which share of the runs were not."""
        runs = sum(self.statuses.values())
        bad = {status: count for status, count in self.statuses.items() if status != "done"}
        words = [status if count == runs else f"{status} {count}/{runs}" for status, count in bad.items()]
        return ", ".join(words) or "done"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"status": self.status}


def spread(values: Sequence[float | None]) -> Spread | None:
    """Of those that are known; None without any."""
    known = [float(value) for value in values if value is not None]
    if not known:
        return None
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return Spread(
        len(known), statistics.fmean(known), statistics.median(known), min(known), max(known), deviation
    )  # fmt: skip


def to_target(curve: Sequence[dict[str, float]], target: float) -> dict[str, float] | None:
    """The first evaluation with a test error of at most `target`; None if there is none."""
    return next((one for one in curve if math.isfinite(one["test_error"]) and one["test_error"] <= target), None)


def standings(records: Sequence[Record], target: float) -> list[Standing]:
    """One for each entry, in the order of the first record of each."""
    labels = dict.fromkeys(one["label"] for one in records)
    return [_standing([one for one in records if one["label"] == label], target) for label in labels]


def _standing(runs: Sequence[Record], target: float) -> Standing:
    done = [one for one in runs if one["status"] == "done"]
    hits = [hit for one in done if (hit := to_target(one["curve"], target)) is not None]
    of = {
        name: spread([one[name] for one in done])
        for name in ("test_error", "seconds", "samples_per_s", "exchange_s", "wait_s", "moved_bytes")
    }
    return Standing(
        label=runs[0]["label"], lr=runs[0]["lr"], momentum=runs[0].get("momentum"),
        tuned=runs[0].get("tuned", {}),
        workers=runs[0].get("workers"), steps=runs[0].get("wanted_steps"),
        statuses=dict(Counter(one["status"] for one in runs)), reached=len(hits),
        seconds_to_target=spread([one["seconds"] for one in hits]),
        samples_to_target=spread([one["samples"] for one in hits]), **of,
    )  # fmt: skip


def edges(state: dict[str, Any]) -> dict[str, str]:
    """A sentence for each entry whose best step size is the least or the largest that was tried for it."""
    found = {}
    for label, best in state["tuned"].items():
        lrs = {one["values"]["lr"] for one in state["trials"] if one["label"] == label}
        if len(lrs) > 1 and best["lr"] in (min(lrs), max(lrs)):
            side = "least" if best["lr"] == min(lrs) else "largest"
            found[label] = f"best step size {best['lr']:g} is the {side} that was tried: a better one may lie beyond"
    return found
