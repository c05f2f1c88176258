"""`easgd-local simulate`: it writes its figures and tables, prints the key numbers, and refuses what cannot work."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from easgd_local import cli
from easgd_local.rules.downpour import Downpour
from easgd_local.rules.easgd import EASGD
from easgd_local.simulate import study
from easgd_local.simulate.machine import Machine
from easgd_local.simulate.problems import PROBLEMS, make_problem
from easgd_local.simulate.simulation import Scenario, simulate
from easgd_local.simulate.study import cells, end_of_help

ONE = ["simulate", "easgd", "--steps", "100"]
SWEEP = ["simulate", "easgd", "downpour", "--workers", "1,4,64", "--tau", "1,10", "--steps", "60", "--target", "0.3"]
TABLES, PICTURES = ["curves.csv", "runs.csv", "staleness.csv"], ["runs.png", "sweep.png"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a sweep, and what it printed."""
    folder = tmp_path_factory.mktemp("simulate") / "sweep"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main([*SWEEP, "--out", str(folder)]) == 0
    return folder, printed.getvalue()


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> str:
    """The one sentence of a command line that is refused, with exit code 2 and no output."""
    try:
        code: object = cli.main(arguments)
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    assert re.fullmatch(r"easgd-local: error: [^\n]+[.?]\n", said.err), said.err
    return said.err.removeprefix("easgd-local: error: ").rstrip("\n")


# What it writes and says


def test_one_simulation_writes_its_files_and_its_key_numbers(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main([*ONE, "--link-gb-per-s", "8", "--parameters", "1e6", "--latency-s", "0"]) == 0
    said = capsys.readouterr()
    assert said.err == "" and names(here / "simulate") == sorted([*TABLES, "runs.png"])
    first, second, third, last = said.out.splitlines()
    # 100 steps of 0.1 s, and 10 exchanges of 8 MB at 8 GB/s: 10.01 s.
    told = "400 gradients in 10.01 virtual s, 39.96 gradients/s; excess loss ½ Σ h c² 3.591 -> "
    assert first.startswith(f"easgd, p = 4, τ = 10, strict, η = 0.2: {told}")
    assert second.endswith("waiting 0.0 %; staleness: median 3, largest 3 updates.")
    assert third.startswith("  an exchange moves 8 MB in 1 ms or more; a link was busy 0.1 % of the time, ")
    assert third.endswith("; evenly spread, its bandwidth is full with 12,513 workers.")
    assert last == "written: " + ", ".join(f"simulate/{name}" for name in ("runs.csv", *TABLES[::2], "runs.png"))
    (run,) = table(here / "simulate" / "runs.csv")
    assert list(run.values())[:4] == ["easgd", "4", "10", "strict"] and run["status"] == "done"
    assert float(run["seconds"]) == pytest.approx(10.01)
    assert float(run["memory_full_at_workers"]) == pytest.approx(100e9 * 1.001 / 8e6)
    assert (here / "simulate" / "runs.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_a_sweep_says_for_each_rule_and_period_where_more_workers_stop_helping(swept: tuple[Path, str]) -> None:
    folder, printed = swept
    lines = printed.splitlines()
    starts = [f"{rule}, τ = {tau}: to 30 % of the start p = 1: " for rule in ("easgd", "downpour") for tau in (1, 10)]
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=False))
    assert "; stops helping beyond 4, not reached from 64 on (the center's memory is full with 497)." in lines[3]
    assert names(folder) == sorted([*TABLES, *PICTURES])
    runs = table(folder / "runs.csv")
    assert len(runs) == 2 * 2 * 3
    for run in runs:
        stale = [row for row in table(folder / "staleness.csv") if all(row[key] == run[key] for key in list(run)[:4])]
        assert max(int(row["staleness_updates"]) for row in stale) <= int(run["workers"]) - 1
        assert (run["status"] == "reached") == (run["seconds_to_target"] != "inf")
    curves = [row for row in table(folder / "curves.csv") if row["rule"] == "easgd" and row["workers"] == "64"]
    assert {row["tau"] for row in curves} == {"1", "10"}


def test_a_later_simulation_replaces_an_earlier_one(here: Path, swept: tuple[Path, str]) -> None:
    folder = shutil.copytree(swept[0], here / "sweep")
    assert cli.main([*ONE, "--out", str(folder)]) == 0
    assert names(folder) == sorted([*TABLES, "runs.png"])  # the picture of the sweep is gone with the sweep
    before = (folder / "curves.csv").read_bytes()
    assert cli.main([*ONE, "--out", str(folder)]) == 0
    assert (folder / "curves.csv").read_bytes() == before
    assert cli.main([*ONE, "--out", str(folder), "--seed", "1"]) == 0
    assert (folder / "curves.csv").read_bytes() != before


def test_a_rules_flags_reach_the_rules_that_have_them(here: Path) -> None:
    words = "simulate eamsgd easgd --momentum 0.5 --lr 0.01 --alpha 0.3 --steps 20 --turns free --tau 3"
    assert cli.main(words.split()) == 0
    runs = table(here / "simulate" / "runs.csv")
    assert [(run["rule"], run["lr"], run["tau"], run["turns"]) for run in runs] == [
        ("eamsgd", "0.01", "3", "free"), ("easgd", "0.01", "3", "free"),
    ]  # fmt: skip


def test_what_blows_up_ends_early_and_is_called_diverged(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["simulate", "downpour", "--workers", "100", "--tau", "10", "--steps", "1000"]) == 0
    assert " (diverged), 5 % of the start never." in capsys.readouterr().out
    assert int(table(here / "simulate" / "runs.csv")[0]["gradients"]) < 10_000


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", PROBLEMS)
def test_overflow_is_told_and_not_warned_about(name: str) -> None:
    scenario = Scenario(rule=EASGD(lr=1e30), workers=1, steps=20)
    assert simulate(scenario, make_problem(name), Machine()).status == "diverged"


def test_the_target_is_reached_where_the_curve_first_falls_below_it() -> None:
    problem = make_problem("quadratic", sigma=0.1)
    scenario = Scenario(rule=EASGD(tau=1), workers=3, steps=200, target=0.2, points=50)
    whole = simulate(scenario, problem, Machine())
    error, seconds = whole.curve["error"], whole.curve["seconds"]
    first = int(np.argmax(error <= 0.2 * error[0]))
    assert whole.status == "done" and whole.seconds_to_target == seconds[first] > 0
    stopped = simulate(Scenario(**{**vars(scenario), "stops": True}), problem, Machine())
    assert (stopped.status, stopped.seconds) == ("reached", whole.seconds_to_target)


def test_the_best_step_size_is_the_one_that_is_there_first() -> None:
    problem = make_problem("quadratic")
    scenario = Scenario(rule=Downpour(), workers=16, steps=300, stops=True)
    (best,) = cells([scenario], problem, Machine(), [1, 0.25, 0.0625])
    alone = [next(cells([scenario], problem, Machine(), [factor])) for factor in (1, 0.25, 0.0625)]
    assert best.seconds == min(one.seconds for one in alone) < np.inf
    assert best.statuses == tuple(one.best.status for one in alone)


def test_more_workers_help_if_they_save_a_tenth() -> None:
    def end(**times: float) -> str:
        fate = "diverged"
        return end_of_help([SimpleNamespace(workers=int(p[1:]), seconds=s, fate=fate) for p, s in times.items()])  # type: ignore[misc]

    assert end(p1=100, p4=30, p16=20) == "still helping at 16 workers"
    assert end(p1=100, p4=30, p16=29) == "stops helping beyond 4"
    assert end(p1=100, p4=30, p16=np.inf) == "stops helping beyond 4, diverged from 16 on"
    assert end(p1=100, p4=30, p16=np.inf, p64=29) == "stops helping beyond 4, diverged at 16"
    assert end(p1=100, p4=30, p16=np.inf, p64=np.inf) == "stops helping beyond 4, diverged from 16 on"
    assert end(p1=np.inf) == "one number of workers only"
    assert end(p1=np.inf, p4=np.inf) == "never there with any number of workers"


# The problems


@pytest.mark.parametrize("name", ["logistic", "digits"])
def test_a_gradient_is_the_slope_of_the_loss_on_its_samples(name: str) -> None:
    problem = make_problem(name, seed=3, batch_size=7)
    everything = np.arange(len(problem._signed if name == "logistic" else problem._labels))  # type: ignore[attr-defined]
    problem._drawn = lambda rank, t: everything  # type: ignore[attr-defined]
    rng = np.random.default_rng(0)
    x = problem.start + 0.1 * rng.standard_normal(problem.n).astype(np.float32)
    for _ in range(5):
        way = rng.standard_normal(problem.n)
        h = 1e-2 / np.linalg.norm(way)
        slope = (problem.error(x + h * way) - problem.error(x - h * way)) / (2 * h)
        assert problem.gradient(0, 0, x) @ way == pytest.approx(slope, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_depend_on_seed_rank_clock_and_point_alone(name: str) -> None:
    one, other = make_problem(name, seed=2), make_problem(name, seed=2)
    x = one.start + np.float32(0.5)
    asked = [(0, 0), (3, 700), (0, 1), (3, 0), (0, 0)]
    first = {where: one.gradient(*where, x).tobytes() for where in asked}
    assert first == {where: other.gradient(*where, x).tobytes() for where in reversed(asked)}
    assert len(set(first.values())) == len(set(asked))
    assert make_problem(name, seed=5).gradient(0, 0, x).tobytes() != first[0, 0]
    covered = np.concatenate([np.arange(one.n)[layer] for layer in one.layers])
    assert covered.tolist() == list(range(one.n))


def test_the_least_logistic_loss_is_the_zero_of_the_error() -> None:
    problem = make_problem("logistic", batch_size=64)
    scenario = Scenario(rule=EASGD(lr=0.5, tau=1), workers=8, steps=400)
    error = simulate(scenario, problem, Machine()).curve["error"]
    assert error.min() > 0 and error[-1] < 0.01 * error[0]


def test_the_network_learns_the_digits() -> None:
    scenario = Scenario(rule=EASGD(lr=0.5, tau=5), workers=3, steps=150, points=5)
    error = simulate(scenario, make_problem("digits"), Machine()).curve["error"]
    assert error[0] > 2 and error[-1] < 0.5


# Wrong words


@pytest.mark.parametrize("line, sentence", [
    ("", "RULE is missing: give the algorithms: easgd, .*; see easgd-local simulate --help."),
    ("esgd", "rule=esgd: the rules are .*; did you mean easgd?"),
    ("easgd --workers 0", "workers=0: must lie between 1 and 4096; .*"),
    ("easgd --workers 4,5000", "workers=5000: must lie between 1 and 4096; .*"),
    ("easgd --workers four", "--workers: 'four' is not a whole number; .*"),
    ("easgd --tau 0", "tau=0: a worker visits the center every tau steps, so tau must be at least 1; .*"),
    ("apam --tau 3", "tau=3: none of apam has a tau; leave it out, or use a rule that has it: easgd, .*"),
    ("easgd --momentum 0.5", "momentum=0.5: none of easgd has a momentum; .*"),
    ("easgd --alpha 2", "alpha=2.0: the moving rate must lie in [0, 1]; .*"),
    ("easgd --lr=-1", "lr=-1.0: the step size must be positive and finite; try 0.05."),
    ("easgd --lr-factors 1,0", "lr_factors=0: a factor of the step size must be positive and finite; .*"),
    ("sgd --workers 4", "workers=4: the rule sgd is sequential; use workers=1, or the rule easgd."),
    ("easgd --turns together", "turns=together: the rule easgd is defined for turns=strict or free or none; .*"),
    ("diloco --turns free", "turns=free: the rule diloco is defined for turns=together; .*"),
    ("passm --dimension 2", "workers=4: the model has 2 parameter tensors to divide among the workers, .*"),
    ("easgd --steps 0", "steps=0: with 4 workers it must be at least 1 and at most 25,000,000, .*"),
    ("easgd --steps 1000000000", "steps=1000000000: with 4 workers .*"),
    ("easgd --target 1", "target=1: the share of the error at the start lies in (0, 1); try 0.05."),
    ("easgd --points 0", "points=0: the center is measured at least once; try 1000."),
    ("easgd --problem cubic", "problem=cubic: must be one of quadratic, logistic, digits; choose one of them."),
    ("easgd --problem digits --sigma 1", "sigma=1.0: the problem digits has no sigma, only batch_size; leave it out."),
    ("easgd --dimension 0", "dimension=0: must be at least 1; the default is 32."),
    ("easgd --condition 0.5", "condition=0.5: the largest curvature over the smallest lies in [1, 10^6]; try 100."),
    ("easgd --sigma=-1", "sigma=-1: a standard deviation must be at least 0 and finite; try 1."),
    ("easgd --seed=-1", "seed=-1: must be at least 0; choose another one."),
    ("easgd --link-gb-per-s=-2", "link_gb_per_s=-2: must be positive; the default is 12."),
    ("easgd --memory-gb-per-s 0", "memory_gb_per_s=0: must be positive; the default is 100."),
    ("easgd --memory-gb-per-s nan", "memory_gb_per_s=nan: must be positive; the default is 100."),
    ("easgd --parameters inf", "parameters=inf: must be positive and finite; the default is 2.56e+07."),
    ("easgd --step-s 0", "step_s=0: must be positive and finite; the default is 0.1."),
    ("easgd --latency-s=-1", "latency_s=-1: must be at least 0 and finite; 0 is none."),
    ("easgd --spread 9", "spread=9: beyond 3 a few steps take nearly all the time; try 0.2."),
    ("easgd --straggler 0", "straggler=0: must be positive and finite; the default is 1."),
    ("easgd --speeds 1,0", "speeds=0.0: each must be positive and finite; 1 is usual."),
    ("easgd --workers 2,3 --speeds 1,1,2,2", "speeds: 4 are given for 3 workers; give at most one for each of them."),
    ("easgd --worker 4", "--worker: there is no such flag, did you mean --workers; see easgd-local simulate --help."),
])  # fmt: skip
def test_mistakes_are_told_in_one_sentence(line: str, sentence: str, here: Path, capsys: pytest.CaptureFixture) -> None:
    said = refused(capsys, ["simulate", *line.split()])
    pattern = ".*".join(re.escape(part) for part in sentence.split(".*"))
    assert re.fullmatch(pattern, said), said
    assert not any(here.iterdir())


def test_a_folder_with_other_files_is_refused_and_left_alone(here: Path, capsys: pytest.CaptureFixture) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "notes.txt").write_text("mine")
    said = refused(capsys, [*ONE, "--out", "mine"])
    assert said.startswith("out=mine: holds other files (notes.txt), ")
    assert names(here / "mine") == ["notes.txt"]


def test_a_folder_that_cannot_be_made_is_refused_before_the_simulation(
    here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "simulate", None)
    (here / "file").touch()
    assert cli.main([*ONE, "--out", "file/folder"]) == 1
    assert "file/folder: the folder cannot be written to (Not a directory); give" in capsys.readouterr().err


def test_lack_of_memory_is_not_blamed_on_the_folder(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacks(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(study, "simulate", lacks)
    assert refused(capsys, ONE).startswith("there is not enough memory for this; choose fewer workers, ")


def test_files_are_written_though_the_reader_of_the_output_has_left(here: Path) -> None:
    words = [sys.executable, "-m", "easgd_local", *ONE]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 0
    assert said == "easgd-local: error: nobody takes the output any more; the command goes on without.\n"
    assert (here / "simulate" / "runs.png").exists()
