"""The benches run, check their results and write rows that can be read; what they measure is not looked at here."""

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import unpainted

BENCH = Path(__file__).parents[1] / "bench"
NAMES = ("attach", "delay", "exchange", "partial", "simulate", "startup", "throughput", "tune")
FRESH = {"attach", "startup", "throughput"}  # which start interpreters themselves, or functions of their own


def run(*words: object) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def run_here(monkeypatch, capsys):
    """The same in this process, where all that a bench needs has been imported."""

    def start(script: Path, *words: object) -> str:
        monkeypatch.syspath_prepend(script.parent)
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, words)])
        threads = torch.get_num_threads()
        with unpainted():
            runpy.run_path(str(script), run_name="__main__")
        torch.set_num_threads(threads)  # some benches change it
        return capsys.readouterr().out

    return start


@pytest.mark.parametrize("name", NAMES)
def test_a_bench_runs_quickly_and_writes_complete_rows(name, tmp_path, run_here):
    start = run if name in FRESH else run_here
    printed = start(BENCH / f"{name}.py", "--quick", "--results", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        assert row["bench"] == name and row["entry"] in printed
        assert {"date", "commit", "load", "hardware", "versions"} <= set(row)
        spreads = [value for value in row.values() if isinstance(value, dict) and "median" in value]
        assert spreads
        for one in spreads:
            assert math.isfinite(one["median"]) and one["p20"] <= one["median"] <= one["p80"] and one["n"] >= 1


def test_every_bench_is_known_here_and_has_a_place_in_the_readme():
    helpers = {"harness", "stopwatch"}
    assert {path.stem for path in BENCH.glob("*.py")} - helpers == set(NAMES)
    readme = (BENCH / "README.md").read_text("utf-8")
    assert all(f"{name}.py" in readme for name in (*NAMES, *helpers))


def test_the_committed_rows_can_be_shown():
    run(BENCH / "harness.py")


def test_quick_runs_leave_no_rows_among_the_committed_ones(tmp_path):
    files = sorted((BENCH / "results").glob("*.jsonl"))
    before = [path.read_bytes() for path in files]
    run(BENCH / "exchange.py", "--quick", "--floats", 1023, "--repetitions", 1)
    assert [path.read_bytes() for path in files] == before
    assert sorted((BENCH / "results").glob("*.jsonl")) == files
