"""The benches run, check their results and write rows that can be read; what they measure is not looked at here."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import unpainted

pytest_plugins = ["tests.fake_cuda"]
BENCH = Path(__file__).parents[1] / "bench"
NAMES = ("attach", "buffers", "delay", "examples", "exchange", "partial", "simulate", "startup", "throughput", "tune")
ON_A_GPU = {  # here on a pretended one; what makes each small
    "kernels": ("--repetitions", 1), "link": ("--mebibytes", 4, "--repetitions", 1),
    "stream_exchange": ("--floats", 5003, "--repetitions", 1, "--workers", 2),
}  # fmt: skip
TOO_LONG = {"ordering", "throughput_gpu"}  # to be run by hand on a pretended driver, with --quick
FRESH = {"throughput"}  # whose processes are to start from its own script


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
            importlib.import_module(script.stem).main()
        torch.set_num_threads(threads)  # some benches change it
        return capsys.readouterr().out

    return start


@pytest.mark.parametrize("name", NAMES)
def test_a_bench_runs_quickly_and_writes_complete_rows(name, tmp_path, run_here):
    start = run if name in FRESH else run_here
    check_rows(name, start(BENCH / f"{name}.py", "--quick", "--results", tmp_path), tmp_path)


@pytest.mark.parametrize("name", ON_A_GPU)
def test_a_bench_of_a_gpu_checks_what_it_would_time_on_a_pretended_one(name, tmp_path, fake_cuda):
    check_rows(name, run(BENCH / f"{name}.py", "--quick", "--results", tmp_path, *ON_A_GPU[name]), tmp_path)
    assert '"pretended": true' in (tmp_path / f"{name}.jsonl").read_text("utf-8")


@pytest.mark.parametrize("name", ["ordering", "throughput_gpu", "gpu"])
def test_without_a_gpu_a_bench_of_one_says_so_in_a_sentence(name, monkeypatch, capsys, run_here):
    monkeypatch.setenv("EASGD_LIBCUDA", "libno.so")
    with pytest.raises(SystemExit, match="2"):
        run_here(BENCH / f"{name}.py", "--quick")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no GPU: NVIDIA's driver was not found (libno.so" in said


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        ("try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('found so far: 3')", "found so far: 3"),
        ("signal.signal(signal.SIGINT, signal.SIG_IGN)\nctypes.CDLL(None).sleep(60)", "Fatal Python error: Aborted"),
    ],
    ids=["interrupted", "hung in a library"],
)  # fmt: skip
def test_what_runs_into_its_limit_on_a_gpu_still_says_what_it_has_found_or_where_it_hangs(
    code, seen, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(BENCH)
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(gpu, "GRACE_S", 1.0)
    step = gpu.Step("slow", ("-c", f"import ctypes, signal, time\n{code}"), 1)
    outcome = gpu.run(step, [], 2.0, tmp_path / "log")
    assert outcome.failure == "not done within 2 s" and seen in (tmp_path / "log").read_text()


def check_rows(name, printed, folder):
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        assert row["bench"] == name and row["entry"] in printed
        assert {"date", "commit", "load", "hardware", "versions"} <= set(row)
        spreads = [value for value in row.values() if isinstance(value, dict) and "median" in value]
        assert spreads
        for one in spreads:
            assert math.isfinite(one["median"]) and one["p20"] <= one["median"] <= one["p80"] and one["n"] >= 1


def test_every_bench_is_known_here_and_has_a_place_in_the_readme():
    helpers = {"harness", "stopwatch", "tables", "gpu"}
    assert {path.stem for path in BENCH.glob("*.py")} - helpers == {*NAMES, *ON_A_GPU, *TOO_LONG}
    readme = (BENCH / "README.md").read_text("utf-8")
    assert all(f"{name}.py" in readme for name in (*NAMES, *ON_A_GPU, *TOO_LONG, *helpers))


def test_the_committed_rows_can_be_shown():
    run(BENCH / "harness.py")
    assert "| pull, p = 2, warm |" in run(BENCH / "tables.py")


def test_quick_runs_leave_no_rows_among_the_committed_ones(tmp_path):
    files = sorted((BENCH / "results").glob("*.jsonl"))
    before = [path.read_bytes() for path in files]
    run(BENCH / "exchange.py", "--quick", "--floats", 1023, "--repetitions", 1)
    assert [path.read_bytes() for path in files] == before
    assert sorted((BENCH / "results").glob("*.jsonl")) == files
