"""How long does each example take, from the command to the prompt, and what does it reach?

Runs the scripts of `examples/` as their README says, each in a fresh interpreter and an empty folder. `reached` is what
the script prints of its model at the end. With the runs of an entry `reached` must be the same, but for the plain
single-process loop, which sets no seed: of that it is the least and the most.

The bound is one fresh interpreter that imports torch and nothing else, timed before each run.

First the result is checked: every run ends without an error, and has reached something.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import harness

REPETITIONS, QUICK_REPETITIONS = 3, 1
EXAMPLES = harness.ROOT / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
COMMANDS = {
    "single_process.py": (),
    "plain_loop.py": (),
    "with_torchrun.py": TORCHRUN,
    "pictures_amp.py": (),
    "pictures_amp.py --buffers recalibrate": (),
    "char_gpt.py": (),
    "char_gpt.py --rule diloco": (),
}  # the words of an example, and what comes before them
UNSEEDED = {"single_process.py"}
REACHED = re.compile(r"^(test (?:error|loss)[^:]*): (.*)$", re.MULTILINE)


def measure(entry: str, repetitions: int) -> harness.Row:
    """One row."""
    script, *flags = entry.split()
    seconds, bounds, reached = [], [], []
    for _ in range(repetitions):
        bounds.append(timed(["-c", "import torch"])[0])
        took_s, out = timed([*COMMANDS[entry], str(EXAMPLES / script), *flags])
        found = REACHED.search(out)
        assert found, f"{entry} says nothing of what it has reached:\n{out}"
        seconds.append(took_s)
        reached.append(f"{found[1]} {found[2]}")
    assert entry in UNSEEDED or len(set(reached)) == 1, f"{entry} has reached {reached}, not the same in all runs"
    return {
        "entry": entry,
        "seconds": harness.spread(seconds),
        "import_torch_s": harness.spread(bounds),
        "reached": " to ".join(sorted({min(reached), max(reached)})),
    }


def timed(words: list[str]) -> tuple[float, str]:
    """Seconds of a fresh interpreter, and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)
        took_s = time.perf_counter() - began
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return took_s, done.stdout


def rows(entries: list[str], repetitions: int) -> Iterator[harness.Row]:
    """As they are measured."""
    return (measure(entry, repetitions) for entry in entries)


def main() -> None:
    parser = harness.arguments((__doc__ or "").partition("\n")[0])
    given = parser.parse_args()
    common = harness.about(Path(__file__).stem)
    entries = list(COMMANDS)[:1] if given.quick else list(COMMANDS)
    repetitions = given.repetitions or (QUICK_REPETITIONS if given.quick else REPETITIONS)
    harness.record(rows(entries, repetitions), common, given)


if __name__ == "__main__":
    main()
