"""The examples: each runs as a newcomer would run it, only shorter, and its center learns."""

from __future__ import annotations

import difflib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import eventually

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
DEADLINE_S = 100
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

pytestmark = [pytest.mark.usefixtures("alone"), pytest.mark.timeout(2 * DEADLINE_S)]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where an example runs; no process may be left there, whoever its parent is."""
    yield tmp_path
    if not eventually(lambda: not processes_in(tmp_path), 5):
        left = processes_in(tmp_path)
        for process in left:
            process.kill()
        pytest.fail(f"processes left: {left}")


def processes_in(folder: Path) -> list[psutil.Process]:
    return [process for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == str(folder)]


def start(folder: Path, name: str, *options: Any, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """`python examples/name options` in that folder, a thread a process."""
    command = [sys.executable, *before, str(EXAMPLES / name), *map(str, options)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )  # fmt: skip


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What it printed, when it is over."""
    try:
        out, err = process.communicate(timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == code, out + err
    assert "Traceback" not in err, err
    return out


def number(output: str, pattern: str) -> float:
    """The number that the example printed there."""
    found = re.search(pattern, output)
    assert found, f"{pattern} is not in {output}"
    return float(found[1])


def summary(folder: Path, output: str) -> dict[str, Any]:
    """Of the run whose folder the example named."""
    named = re.search(r"^run folder: (.+)$", output, re.M)
    assert named, output
    run = folder / named[1]
    assert {"report.md", "curves.png", "center.safetensors"} <= {path.name for path in run.iterdir()}
    return json.loads((run / "summary.json").read_text())


def test_the_plain_loop_is_the_loop_of_one_process_but_for_a_handful_of_lines():
    one, plain = ((EXAMPLES / name).read_text().splitlines() for name in ("single_process.py", "plain_loop.py"))
    assert [line for line in difflib.ndiff(one, plain) if line[0] in "+-"] == [
        "- from torch.utils.data import DataLoader, TensorDataset",
        "+ from torch.utils.data import TensorDataset",
        "+ import easgd_local as easgd",
        "- def train(epochs):",
        "+ def train(worker, epochs):",
        "+     worker.attach(model, optimizer, easgd.EASGD(tau=10, beta=0.9), evaluate=scores, evaluate_every=50)",
        "-     loader = DataLoader(trainset, batch_size=32, shuffle=True)",
        "+     loader = worker.loader(trainset, batch_size=32)",
        "-     weights = train(options.epochs)",
        "+     weights = easgd.launch(train, workers=2, args=(options.epochs,))",
        '+     print(f"run folder: {weights.folder}")',
    ]


def test_the_plain_loop_learns_like_one_process_and_under_torchrun_it_ends_with_the_same_bits(folder):
    processes = [
        start(folder, "single_process.py", "--epochs", 4),
        start(folder, "plain_loop.py", "--epochs", 4),
        start(folder, "with_torchrun.py", "--epochs", 4, before=TORCHRUN),
    ]
    alone, launched, joined = map(finish, processes)
    errors = [number(output, r"test error: ([\d.]+)%") for output in (alone, launched, joined)]
    assert max(errors) < 10
    assert summary(folder, launched)["center_sha256"] == summary(folder, joined)["center_sha256"]


def test_the_pictures_are_learnt_across_an_interruption(folder):
    options = ("--epochs", 2, "--buffers", "recalibrate")
    process = start(folder, "pictures_amp.py", "--out", "run", *options)
    metrics = folder / "run" / "metrics.jsonl"
    begun = eventually(lambda: metrics.exists() and '"log"' in metrics.read_text(), DEADLINE_S)
    process.send_signal(signal.SIGINT)
    output = finish(process, code=130)
    assert begun and json.loads((folder / "run" / "summary.json").read_text())["status"] == "interrupted", output
    output = finish(start(folder, "pictures_amp.py", "--resume", "run", *options))
    assert summary(folder, output)["steps"] == 2 * 8
    assert number(output, r"test error of the center: ([\d.]+)%") < 50  # four classes: 75 % untrained


def test_the_gpt_learns_more_than_how_often_each_character_occurs(folder):
    output = finish(start(folder, "char_gpt.py", "--steps", 80, "--rule", "diloco"))
    assert summary(folder, output)["steps"] == 80
    assert number(output, r"test loss of the center: ([\d.]+)") < 3.0  # by frequencies alone 3.24
    assert len(output) > 300  # it wrote something
