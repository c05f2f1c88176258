"""The runs of a comparison one after another, each recorded as soon as it is over; what is recorded is not run again.

The folder: results.json (settings, paces, records), tune.json (trials), and a folder for each entry with its run
folders: seed-<k>, pace, and tune-<values>-<steps>.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from easgd_local import hardware
from easgd_local.compare import tuning
from easgd_local.compare.entries import Entry
from easgd_local.compare.measuring import Interrupted, Record, measure
from easgd_local.compare.saved import RESULTS, TRIALS, read_comparison, saved_state, write_json
from easgd_local.compare.settings import Comparison, changes
from easgd_local.compare.standing import edges
from easgd_local.data import Dataset
from easgd_local.wording import clock_text, percent_text, seconds_text

FIRST_PACE_STEPS, PACE_S, TIMED_RUNS = 20, 1.0, 3
FINAL = ("done", "diverged")  # what failed is run again


class Contest:
    """A comparison and its folder, from `open_contest`; `run` yields a line for every run that is over."""

    def __init__(self, comparison: Comparison, folder: Path, dataset: Dataset, state: dict[str, Any]) -> None:
        self.comparison, self.folder, self.state = comparison, folder, state
        self._dataset, self._stops = dataset, False

    @property
    def records(self) -> list[Record]:
        """Of the compared runs."""
        return list(self.state["records"])

    def run(self) -> Iterator[str]:
        """All runs that are not recorded yet."""
        comparison = self.comparison
        if comparison.budget_s is not None:
            yield from self._pace_all()
        if comparison.tune:
            yield from self._tune_all()
        for turn, seed in enumerate(comparison.run_seeds):
            for entry in rotated(comparison.entries, turn):
                if self._recorded(entry, seed) is None:
                    record = self._compared(entry, seed)
                    self._keep(record)
                    yield f"{entry.label}, seed {seed}: {told(record)}{self._outlook()}"

    def steps(self, entry: Entry) -> int:
        """Of each worker, in a compared run."""
        fixed = self.comparison.fixed_steps(entry, len(self._dataset.train))
        return self.state["paces"][entry.label]["steps"] if fixed is None else fixed

    def _outlook(self) -> str:
        """How many of the compared runs are over, and how long the others will take if they take as long as these."""
        records, seeds, entries = self.records, self.comparison.run_seeds, self.comparison.entries
        left = [entry.label for entry in entries for seed in seeds if self._recorded(entry, seed) is None]
        if not left:
            return ""
        taken = [(one["label"], one["wall_s"]) for one in records if "wall_s" in one]
        over = f"; {len(records)} of {len(records) + len(left)} over"
        if not taken:
            return over
        own = {label: [s for other, s in taken if other == label] or [s for _, s in taken] for label in left}
        return f"{over}, about {clock_text(sum(fmean(own[label]) for label in left))} to go"

    def finish(self, **found: Any) -> None:
        """Adds what was made of the records, and saves."""
        self.state |= found
        self._save()

    # One run

    def _compared(self, entry: Entry, seed: int) -> Record:
        cause = self._without_pace(entry) or self._without_search(entry)
        if cause is not None:
            known = {"label": entry.label, "seed": seed, "lr": entry.rule.lr, "wanted_steps": None}
            return {**known, "status": "failed", "cause": cause, "curve": []}
        record = self._run_once(self._tuned(entry), self.steps(entry), seed, f"seed-{seed}")
        return record | {"tuned": self.state["tuned"].get(entry.label, {})}

    def _without_pace(self, entry: Entry) -> str | None:
        """Why the timed run of the entry failed, if it did: nobody knows then how many steps to make."""
        cause = self.state["paces"].get(entry.label, {}).get("cause")
        return None if cause is None else f"in its timed run: {cause}"

    def _without_search(self, entry: Entry) -> str | None:
        """Why a trial of the entry failed, if one did: nobody knows then what it would have shown."""
        trials = (one for one in self.state["trials"] if one["label"] == entry.label and one["status"] == "failed")
        return next((f"in a trial at {values_text(one['values'])}: {one['cause']}" for one in trials), None)

    def _run_once(self, entry: Entry, steps: int, seed: int, name: str, **changed: Any) -> Record:
        """A run in a folder of its own; what an interrupted one has left there goes."""
        folder = self.folder / entry.folder / name
        if folder.exists():
            shutil.rmtree(folder)
        config = self.comparison.config(entry, steps=steps, seed=seed, out=str(folder))
        fixed = config.data != "synthetic"  # whose pictures are made from the seed
        record = measure(entry, replace(config, **changed), self._dataset if fixed else None)
        self._stops = self._stops or bool(record.pop("interrupts", 0))
        return record

    def _recorded(self, entry: Entry, seed: int) -> Record | None:
        own = (one for one in self.state["records"] if (one["label"], one["seed"]) == (entry.label, seed))
        return next(own, None)

    def _keep(self, record: Record) -> None:
        self.state["records"].append(record)
        self._save()
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        """Ctrl-C that came when the last run was complete already."""
        if self._stops:
            raise Interrupted

    def _save(self) -> None:
        write_json(self.folder / RESULTS, {name: one for name, one in self.state.items() if name != "trials"})

    # Before the compared runs

    def _pace_all(self) -> Iterator[str]:
        """Finds how many steps each entry makes within the budget, by a short timed run at a tiny step size."""
        for entry in self.comparison.entries:
            if entry.label not in self.state["paces"]:
                pace = self._pace(entry)
                self.state["paces"][entry.label] = pace
                self._save()
                found = f"{pace['steps_per_s']:,.4g} steps/s, so {pace['steps']:,} steps"
                yield f"{entry.label}, pace: {pace.get('cause') or found}"

    def _pace(self, entry: Entry) -> dict[str, Any]:
        """Of timed runs of growing length the last, then two more: the fastest, as a busy machine only slows down."""
        budget_s, steps, rates = self.comparison.budget_s, FIRST_PACE_STEPS, list[float]()
        assert budget_s is not None
        slow = entry.with_values({"lr": entry.rule.lr / 1000})  # it must not diverge, and takes as long
        while len(rates) < TIMED_RUNS:
            record = self._run_once(slow, steps, self.comparison.tuning_seed, "pace", eval_every=0)
            self._stop_if_asked()
            if record["status"] != "done":
                return {"steps": 1, "steps_per_s": 0.0, "timed_steps": steps, "cause": record["cause"]}
            if rates or record["seconds"] >= min(PACE_S, budget_s / 4):
                rates.append(steps / record["seconds"])
            else:
                steps *= max(2, min(100, round(1.5 * PACE_S / record["seconds"])))
        return {"steps": max(1, round(budget_s * max(rates))), "steps_per_s": max(rates), "timed_steps": steps}

    def _tune_all(self) -> Iterator[str]:
        """Finds each entry's own step size and what else is tuned, on a seed that is not compared."""
        for entry in self.comparison.entries:
            if entry.label not in self.state["tuned"] and self._without_pace(entry) is None:
                steps = self.steps(entry)
                given = self.comparison.candidates(entry, steps)
                least = 1 + tuning.MEETINGS * entry.rule.period
                best = tuning.search(given, steps, partial(self._try, entry), self.comparison.tune_cost, least)
                cause = self._without_search(entry)
                if cause is None:
                    self.state["tuned"][entry.label] = best
                    self._save()
                yield f"{entry.label}, {'not tuned: ' + cause if cause else self._told_of(entry, best)}"

    def _told_of(self, entry: Entry, best: tuning.Values) -> str:
        """What the search has found, and how far to trust it."""
        edge = " (lr at the edge of what was tried)" if entry.label in edges(self.state) else ""
        own = [one for one in self.state["trials"] if one["label"] == entry.label]
        nothing = own and all(one["status"] == "diverged" for one in own)
        return f"tuned: {values_text(best)}{' (all trials diverged)' if nothing else edge}"

    def _try(self, entry: Entry, values: tuning.Values, steps: int) -> tuning.Trial:
        trials = self.state["trials"]
        for one in trials:
            if (one["label"], one["values"], one["wanted_steps"]) == (entry.label, values, steps):
                return dict(one)
        name = f"tune-{values_text(values).replace(' ', '')}-{steps}"
        record = self._run_once(entry.with_values(values), steps, self.comparison.tuning_seed, name, eval_every=0)
        trials.append(record | {"values": values})
        write_json(self.folder / TRIALS, trials)
        self._stop_if_asked()
        return trials[-1]

    def _tuned(self, entry: Entry) -> Entry:
        return entry.with_values(self.state["tuned"].get(entry.label, {}))


def rotated(entries: tuple[Entry, ...], turn: int) -> tuple[Entry, ...]:
    """The entries in the order of this turn: another one is first each time, so none always finds a warm machine."""
    first = turn % len(entries)
    return entries[first:] + entries[:first]


def values_text(values: tuning.Values) -> str:
    """Such as "lr = 0.1, tau = 4"."""
    return ", ".join(f"{name} = {value:g}" for name, value in values.items())


def told(record: Record) -> str:
    """How a run went, in a line."""
    if record["status"] != "done":
        return f"{record['status']} ({record['cause']})"
    return f"test error {percent_text(record['test_error'])} after {seconds_text(record['seconds'])} of training"


@contextlib.contextmanager
def open_contest(comparison: Comparison, folder: Path, dataset: Dataset) -> Iterator[Contest]:
    """The contest in this folder, new or gone on with, held against a second process meanwhile.

    `ValueError` if the folder holds something else, or a comparison with other settings.
    """
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            held.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"out={folder}: a comparison is in progress there; wait for its end.") from error
        except FileExistsError as error:
            raise ValueError(
                f"out={folder}: is a file, and a comparison needs a folder; give another --out."
            ) from error
        contest = Contest(comparison, folder, dataset, _state(comparison, folder))
        contest.finish()
        yield contest


def _state(comparison: Comparison, folder: Path) -> dict[str, Any]:
    settings = json.loads(json.dumps(comparison.to_json()))
    if not (folder / RESULTS).exists():
        foreign = sorted(path.name for path in folder.iterdir())
        if foreign:
            raise ValueError(
                f"out={folder}: holds other files ({foreign[0]}), and no comparison to go on with; give another --out."
            )
        fresh = {"settings": settings, "hardware": hardware.describe(), "versions": hardware.versions()}
        return {**fresh, "paces": {}, "tuned": {}, "trials": [], "records": []}
    saved = saved_state(folder)
    read_comparison(folder, saved)  # says so if it is another version's
    for name, old, new in changes(saved["settings"], settings):
        raise ValueError(
            f"{name}={new}: the comparison in {folder} was started with {old}, and stays what it was; leave it as it "
            f"was, or give another --out."
        )
    saved["records"], saved["trials"] = (
        [one for one in saved[name] if one["status"] in FINAL] for name in ("records", "trials")
    )
    saved["paces"] = {label: one for label, one in saved["paces"].items() if "cause" not in one}
    return saved
