"""All tests and benches that need a GPU, within ten minutes on one GPU, offline.

Runs the tests marked `gpu`, then the benches, each in a process of its own with a limit of its own: its share of what
is left of the budget, so that what ends early leaves its time to the others. One that fails or runs into its limit does
not keep the others from running. At its limit it is interrupted, so that it still says what it has found; if it hangs
even so, all its processes say where, and are killed. A bench's rows are written as they are measured. What each printed
goes to a log beside the rows, and the benches' tables, and the end of the tests' report, to the screen. At the end
stands what ran, for how long, and what failed.

    python bench/gpu.py --results /tmp/rows     works in a checkout that is not installed, too, where the modules are
    python bench/gpu.py --only kernels link     some of it
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "runs" / "gpu"  # without --results; git ignores it
BUDGET_S = 560.0
GRACE_S = 10.0  # to say what was found, when interrupted
SHOWN_LINES = 40  # of a long log
NO_GPU = 2  # exit code


@dataclass(frozen=True)
class Step:
    """Something to run: its command after the interpreter, and its weight when time is shared out."""

    name: str
    words: tuple[str, ...]
    weight: float


def bench(name: str, weight: float) -> Step:
    """A script of this folder."""
    return Step(name, (str(ROOT / "bench" / f"{name}.py"),), weight)


# Several at a time, since most of a test is starting processes. A test that hangs in the driver ends its own process,
# not the others'; and what libraries have to say about themselves is no failure here.
AT_ONCE = max(2, min(6, len(os.sched_getaffinity(0)) // 2))
TESTS = Step(
    "tests",
    ("-m", "pytest", "tests/test_gpu.py", "-v", "--tb=short", "--durations=10", "-W", "default", "--numprocesses",
     str(AT_ONCE), "-o", "timeout_method=thread", "-o", "faulthandler_timeout=40", "-p", "no:cacheprovider"),
    12,
)  # fmt: skip
STEPS = (
    TESTS,
    bench("kernels", 4),
    bench("link", 1.5),
    bench("stream_exchange", 4),
    bench("throughput_gpu", 8),
    bench("ordering", 5),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a step; `failure` is empty if nothing is wrong."""

    name: str
    seconds: float
    failure: str = ""
    skipped: str = ""

    @property
    def line(self) -> str:
        """Of the table at the end."""
        said = f"failed: {self.failure}" if self.failure else f"skipped: {self.skipped}" if self.skipped else "done"
        return f"| {self.name} | {self.seconds:.1f} | {said} |"


def environment() -> dict[str, str]:
    """For the children: this checkout is what they import, and where they hang can be seen."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    seen = {"PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **seen, "PYTHONPATH": os.pathsep.join(paths)}


def run(step: Step, extra: list[str], limit_s: float, log: Path) -> Outcome:
    """Runs a step in a session of its own, and ends all of that soon after the limit; output goes to the log."""
    began = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *step.words, *extra], cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=heed_interrupts,
        )  # fmt: skip
        try:
            code = process.wait(limit_s)
            failure = f"exit {code}" if code else ""
        except subprocess.TimeoutExpired:
            failure = f"not done within {limit_s:.0f} s"
        finally:
            end(process)
    if step is TESTS and not failure and " passed" not in log.read_text("utf-8").splitlines()[-1]:
        failure = "no test passed"
    return Outcome(step.name, time.monotonic() - began, failure)


def heed_interrupts() -> None:
    """In a child: a shell's background job, and what it starts, would ignore them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end(process: subprocess.Popen[bytes]) -> None:
    """Interrupts it if it is still running, then kills what is left of its session."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGABRT)  # every process says where it hangs, even in a call of the driver
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        time.sleep(1)  # for the others of its session
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def show(log: Path) -> None:
    """The end of the log."""
    lines = log.read_text("utf-8", errors="replace").splitlines()
    if len(lines) > SHOWN_LINES:
        print(f"... {len(lines) - SHOWN_LINES} lines more in {log}")
    print("\n".join(lines[-SHOWN_LINES:]), flush=True)


def run_all(steps: list[Step], given: argparse.Namespace, logs: Path) -> list[Outcome]:
    """One after the other; each may take its share of the time that is left."""
    ends = time.monotonic() + given.budget
    flags = [*(["--quick"] if given.quick else []), *(["--results", str(given.results)] if given.results else [])]
    outcomes = []
    for number, step in enumerate(steps):
        if step is not TESTS and not Path(step.words[0]).is_file():
            outcomes.append(Outcome(step.name, 0.0, skipped=f"there is no {Path(step.words[0]).name}"))
            continue
        share = step.weight / sum(one.weight for one in steps[number:])
        limit_s = share * (ends - time.monotonic())
        print(f"\n## {step.name}, at most {limit_s:.0f} s\n", flush=True)
        log = logs / f"{step.name}.log"
        outcomes.append(run(step, [] if step is TESTS else flags, limit_s, log))
        show(log)
    return outcomes


def check_machine() -> None:
    """Ends the process with one sentence if there is no GPU, or this checkout cannot be imported as it is."""
    if importlib.util.find_spec("easgd_local") is None:
        sys.path.insert(0, str(ROOT))
    try:
        from link import driver_for
    except ImportError as error:
        print(
            f"gpu: this checkout cannot be imported ({error}); install it: "
            f"{sys.executable} -m pip install --no-deps --no-build-isolation --editable {ROOT}",
            file=sys.stderr,
        )
        raise SystemExit(NO_GPU) from error
    driver_for("gpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--budget", type=float, default=BUDGET_S, help=f"seconds for all of it; default {BUDGET_S:.0f}")
    parser.add_argument("--results", type=Path, help="folder for rows and logs; default bench/results for the rows")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], help="these alone")
    parser.add_argument("--quick", action="store_true", help="the benches quickly, to see that they work")
    given = parser.parse_args()
    check_machine()
    given.results = given.results and given.results.resolve()
    logs = given.results or LOGS
    logs.mkdir(parents=True, exist_ok=True)
    outcomes = run_all([step for step in STEPS if not given.only or step.name in given.only], given, logs)
    print("\n".join(["", "| step | seconds | |", "| --- | --- | --- |", *(one.line for one in outcomes)]))
    raise SystemExit(1 if any(one.failure for one in outcomes) else 0)


if __name__ == "__main__":
    main()
