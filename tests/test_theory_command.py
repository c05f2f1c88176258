"""`easgd-local theory`: it writes its figures and tables, prints the key numbers, and loses nothing."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import easgd_local
from easgd_local import cli, theory
from easgd_local.theory import command

SMALL = {
    "stability": ["--workers", "3", "--points", "9"],
    "admm": ["--points", "6"],
    "moments": ["--workers", "1,100", "--times", "1,10,inf", "--points", "8"],
    "averaging": ["--workers", "2", "--lr", "0.1,0.5", "--steps", "10000", "--points", "20"],
}
FILES = {name: command._names(name) for name in SMALL}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(path: Path) -> dict[str, np.ndarray]:
    with path.open(newline="") as file:
        head, *rows = csv.reader(file)
    return dict(zip(head, np.array(rows, dtype=float).T, strict=True))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence of a command line that is refused, with exit code 2 and no output."""
    try:
        code = cli.main(arguments)
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    assert re.fullmatch(r"easgd-local: error: [^\n]+\.\n", said.err), said.err
    return said.err.removeprefix("easgd-local: error: ").rstrip("\n")


@pytest.mark.parametrize("name", SMALL)
def test_each_study_writes_its_pictures_and_their_data(name: str, here: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["theory", name, *SMALL[name]]) == 0
    folder = here / f"theory-{name}"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES[name])
    for picture in folder.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    for data in folder.glob("*.csv"):
        columns = table(data)
        assert len(columns) >= 3
        assert all(len(column) >= 10 and not np.isnan(column).any() for column in columns.values())
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.splitlines()[-1] == "written: " + ", ".join(f"theory-{name}/{file}" for file in FILES[name])


def test_stability_prints_the_bounds_and_tabulates_the_radii(here: Path, capsys: pytest.CaptureFixture) -> None:
    cli.main(["theory", "stability", *SMALL["stability"]])
    said, data = capsys.readouterr().out, table(here / "theory-stability" / "stability.csv")
    assert "exclusive turns, p = 3: stable on " in said
    assert "0.997 at ηh = 0.01" in said
    assert "stale differences, p = 3: " in said
    assert len(data["alpha"]) == 81
    given = data["lr_times_curvature"], data["alpha"], 3
    assert data["radius_exclusive"] == pytest.approx(theory.easgd_round_robin_radius(*given), rel=1e-9, abs=1e-9)
    assert data["radius_stale"] == pytest.approx(theory.easgd_stale_radius(*given), rel=1e-9, abs=1e-9)


def test_admm_prints_the_radii_of_figure_1_and_where_the_trajectory_ends(
    here: Path, capsys: pytest.CaptureFixture
) -> None:
    cli.main(["theory", "admm", *SMALL["admm"]])
    said, data = capsys.readouterr().out, table(here / "theory-admm" / "admm-trajectory.csv")
    assert re.search(r"ADMM, p = 3: spectral radius 1\.0009738854 .* is 1\.204e\+09 after 20,000; ", said)
    assert re.search(r"ADMM, p = 8: spectral radius 1\.0022578662 .* is 1\.321e\+20 after 20,000; ", said)
    assert "EASGD with α = ηρ, p = 8: spectral radius 0.99911" in said
    assert list(data) == ["cycle", "admm_p3", "admm_p8", "easgd_p8"]
    assert data["admm_p8"][0] == 1000
    assert data["admm_p8"][-1] == pytest.approx(1.321e20, rel=1e-3)
    assert len(data["cycle"]) == 20_001


def test_moments_prints_the_limit_and_tabulates_divergence_as_infinite(
    here: Path, capsys: pytest.CaptureFixture
) -> None:
    cli.main(["theory", "moments", *SMALL["moments"], "--start", "2", "--sigma", "3"])
    said, data = capsys.readouterr().out, table(here / "theory-moments" / "moments.csv")
    assert "p·MSE → 0.0515800 σ²/h²" in said
    assert "p = 1, t = 1: least mean squared error 4 everywhere; " in said
    assert len(data["lr"]) == 2 * 3 * 64
    fine = (data["workers"] == 100) & (data["t"] == 10)
    given = {"lr": data["lr"][fine], "alpha": data["beta"][fine] / 100, "workers": 100}
    error = theory.center_mean(10, **given, start=2) ** 2 + theory.center_variance(10, **given, sigma=3)
    assert data["mean_squared_error"][fine] == pytest.approx(error, rel=1e-8)
    infinite = np.isinf(data["mean_squared_error"])
    assert infinite.any()
    assert np.isinf(data["t"][infinite]).all()


def test_averaging_prints_how_near_the_bound_the_average_is(here: Path, capsys: pytest.CaptureFixture) -> None:
    cli.main(["theory", "averaging", *SMALL["averaging"]])
    said, data = capsys.readouterr().out, table(here / "theory-averaging" / "averaging.csv")
    near = [float(word) for word in re.findall(r"double average is (\S+) σ²/\(p h²\) at t = 10,000", said)]
    assert near == pytest.approx([1, 1], abs=5e-3)
    assert data["t"][-1] == 10_000
    assert data["average_lr_0.5"][-1] == pytest.approx(near[1], abs=1e-6)
    assert data["center_lr_0.5"][-1] > 1000


# Folders


def test_a_second_run_replaces_the_first_in_its_folder(here: Path) -> None:
    words = ["theory", "averaging", *SMALL["averaging"], "--out", "deep/in/here"]
    assert cli.main(words) == 0
    data = here / "deep" / "in" / "here" / "averaging.csv"
    before = data.read_bytes()
    assert cli.main([*words, "--beta", "0.5"]) == 0
    assert data.read_bytes() != before
    assert cli.main(words) == 0
    assert data.read_bytes() == before
    assert sorted(path.name for path in data.parent.iterdir()) == ["averaging.csv", "averaging.png"]


def test_a_folder_with_other_files_is_refused_and_left_alone(here: Path, capsys: pytest.CaptureFixture) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "notes.txt").write_text("mine")
    said = refused(capsys, "theory", "stability", *SMALL["stability"], "--out", "mine")
    assert said.startswith("out=mine: holds other files (notes.txt), ")
    assert said.endswith("; give another --out.")
    assert [path.name for path in (here / "mine").iterdir()] == ["notes.txt"]
    (here / "file").write_text("mine")
    said = refused(capsys, "theory", "stability", *SMALL["stability"], "--out", "file")
    assert said == "out=file: is a file, and the figures need a folder; give another --out."
    assert (here / "file").read_text() == "mine"


def test_what_cannot_be_written_is_one_sentence_and_keeps_the_old_file(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["theory", "averaging", *SMALL["averaging"]]
    cli.main(words)
    data = here / "theory-averaging" / "averaging.csv"
    before = data.read_bytes()
    capsys.readouterr()

    def full(source: Path, target: Path) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", full)
    assert cli.main([*words, "--beta", "0.5"]) == 1
    sentence = "theory-averaging: the folder cannot be written to (No space left on device); give another --out."
    assert capsys.readouterr().err == f"easgd-local: error: {sentence}\n"
    assert data.read_bytes() == before
    assert sorted(path.name for path in data.parent.iterdir()) == ["averaging.csv", "averaging.png"]


# Wrong words


@pytest.mark.parametrize("line, sentence", [
    ("", "NAME is missing: give one of stability, admm, moments, averaging; see easgd-local theory --help."),
    ("stablity", "NAME=stablity: must be one of stability, admm, moments, averaging, did you mean stability; see "
     "easgd-local theory --help."),
    ("admm 3", "3: not understood, as values follow their flag; leave it out; see easgd-local theory admm --help."),
    ("admm --worker 3", "--worker: there is no such flag, did you mean --workers; see easgd-local theory admm --help."),
    ("admm --workers", "--workers: a value must follow; one that begins with a minus is written --workers=VALUE."),
    ("admm --workers 3,x", "--workers: 'x' is not a whole number; write it in digits, such as 8."),
    ("admm --lr fast", "--lr: 'fast' is not a number; write it like 0.05 or 5e-2."),
    ("admm --points 4 --workers 3,0", "workers=0: there must be at least 1 worker; try 4."),
    ("admm --points 4 --lr=-1", "lr=-1: the step size η must be positive and finite; try 0.1."),
    ("admm --points 4 --lr 1", "lr=1, rho=2.5: EASGD's α = ηρ = 2.5 beside ADMM must be at most 1; lower one."),
    ("admm --points 4 --rounds=-1", "rounds=-1: there cannot be fewer than no rounds; give 0 or more."),
    ("stability --points 1", "points=1: a grid needs at least 2 points on each side; .*"),
    ("moments --points 4 --sigma=-1", "sigma=-1: the noise's standard deviation σ must be at least 0 and finite; .*"),
    ("moments --points 4 --times 1.5", "t=1.5: the time t must be a whole number of steps, .*"),
    ("averaging --beta 1.9", "lr=0.02, alpha=0.475, workers=4, curvature=1: no limit as t -> ∞, as .*"),
    ("averaging --steps 1", "t=1: the time t must be a whole number of steps, at least 2; try 100."),
])  # fmt: skip
def test_mistakes_are_told_in_one_sentence(line: str, sentence: str, here: Path, capsys: pytest.CaptureFixture) -> None:
    said = refused(capsys, "theory", *line.split())
    pattern = sentence if sentence.endswith(".*") else re.escape(sentence)
    assert re.fullmatch(pattern, said), said
    assert not any(here.iterdir())


# The module


def test_the_module_is_found_on_the_package() -> None:
    assert easgd_local.theory is theory
    assert "theory" in dir(easgd_local)
    program = (
        "import sys, easgd_local as easgd\n"
        "assert 'numpy' not in sys.modules\n"
        "print(easgd.theory.easgd_alpha_limit(1.0))\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert float(done.stdout) == pytest.approx(2 / 3)


def test_every_public_name_has_a_docstring() -> None:
    assert [name for name in theory.__all__ if not getattr(theory, name).__doc__] == []
