"""How long from the command to the first training step with four workers, and where does the time go?

Runs `easgd-local train eamsgd --workers 4 --steps 1 --eval-every 0` (the small network on the digits) in a fresh
interpreter each time, watched by stopwatch.py. `at_s` is the time since the command was given, `took_s` since the mark
before. Workers get ready while the center is evaluated for the first time; nobody steps before both are done.

The first repetition is a row of its own ("first": whatever the machine had in its file cache); the others are "warm".
The bound is one fresh interpreter that imports torch and nothing else, run before each repetition.

First the result is checked: the run is done, and its four workers made one step each.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

WORKERS = 4
REPETITIONS, QUICK_REPETITIONS = 8, 1
COMMAND = ["train", "eamsgd", "--workers", str(WORKERS), "--steps", "1", "--eval-every", "0"]
STOPWATCH = Path(__file__).with_name("stopwatch.py")

# Mark -> what has happened by then. Of a mark that is left several times the last counts, but where `FIRST` says so.
STAGES = {
    "interpreter": "interpreter started",
    "command line imported": "command line imported",
    "fork server started": "fork server started",
    "torch imported": "torch imported, beside the fork server",
    "data loaded": "data loaded",
    "model built": "model built",
    "center and run folder made": "center and run folder made",
    "views imported": "views imported",
    "evaluator forked": "evaluator forked, the fork server being ready",
    "child forked": "workers forked",
    "worker ready": "workers ready",
    "center evaluated": "center evaluated",
    "go": "workers told to go",
    "first step of one": "first step of the first worker",
    "first step": "first step of the last worker",
    "report written": "report written, command done",
}
FIRST = {"child forked": "evaluator forked", "first step": "first step of one", "go": "go"}


def start() -> dict[str, float]:
    """One run: seconds from the command to each stage."""
    with tempfile.TemporaryDirectory() as folder:
        file, run = Path(folder) / "marks.json", Path(folder) / "run"
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, str(STOPWATCH), str(file), *COMMAND, "--out", str(run)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        summary = json.loads((run / "summary.json").read_text())
        steps = [one["steps"] for one in summary["worker_reports"]]
        assert summary["status"] == "done" and steps == [1] * WORKERS, summary
        return stages([(name, at - began) for name, at in json.loads(file.read_text())])


def stages(marks: list[tuple[str, float]]) -> dict[str, float]:
    """Each stage with its time, in the order of STAGES."""
    at: dict[str, float] = {}
    for name, seconds in marks:
        if name in FIRST:
            at.setdefault(FIRST[name], seconds)
        if FIRST.get(name) != name:
            at[name] = seconds
    missing = set(STAGES) - set(at)
    assert not missing, f"the run never left the marks {sorted(missing)}"
    return {name: at[name] for name in STAGES}


def bound_s() -> float:
    """Seconds of a fresh interpreter that imports torch."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - began


def rows(temperature: str, runs: list[dict[str, float]], bounds: list[float]) -> list[harness.Row]:
    """The bound, then a row a stage."""
    made: list[harness.Row] = [{"entry": f"{temperature}: import torch alone", "took_s": harness.spread(bounds)}]
    names = list(STAGES)
    for place, name in enumerate(names):
        before = [run[names[place - 1]] if place else 0.0 for run in runs]
        took = [max(0.0, run[name] - earlier) for run, earlier in zip(runs, before, strict=True)]
        made.append(
            {
                "entry": f"{temperature}: {STAGES[name]}",
                "took_s": harness.spread(took),
                "at_s": harness.spread(run[name] for run in runs),
            }
        )
    return made


def main() -> None:
    given = harness.arguments("How long from the command to the first training step with four workers?").parse_args()
    common = harness.about("startup")
    repetitions = given.repetitions or (QUICK_REPETITIONS if given.quick else REPETITIONS)
    first = start()
    made = rows("first", [first], [bound_s()])
    if not given.quick:
        pairs = [(bound_s(), start()) for _ in range(repetitions)]
        made += rows("warm", [run for _, run in pairs], [bound for bound, _ in pairs])
    harness.record(made, common, given)


if __name__ == "__main__":
    main()
