"""The papers' experiments: run at any scale, kept as rows, drawn, and held against what the papers say."""

from __future__ import annotations

import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import children, eventually

ROOT = Path(__file__).parents[1]
PAPER, RESULTS = ROOT / "bench" / "paper", ROOT / "bench" / "results" / "paper"


@pytest.fixture(scope="module")
def paper() -> Any:
    """The modules beside the scripts."""
    folders = [str(PAPER), str(ROOT / "bench"), str(ROOT / "docs")]
    sys.path[:0] = folders
    try:
        import draw
        import experiments
        import findings
        import make_results
        import rows
        import run

        yield SimpleNamespace(
            draw=draw, experiments=experiments.EXPERIMENTS, findings=findings, make_results=make_results, rows=rows,
            run=run,
        )  # fmt: skip
    finally:
        for folder in folders:
            sys.path.remove(folder)


# What is run


@pytest.mark.parametrize(
    "name", ["cifar-tau", "cifar-p", "imagenet-p", "passm", "apam", "apam-delay", "digits"]
)  # fmt: skip
def test_every_experiment_is_a_comparison_at_any_scale(paper: Any, name: str) -> None:
    experiment = paper.experiments[name]
    full, small = (experiment.comparison(scale=scale, seeds=1) for scale in (1, 0.001))
    for one in (full, small):
        assert [entry.label for entry in one.entries] == list(experiment.labels)
    for entry in full.entries:
        assert small.fixed_steps(entry, 50_000) == pytest.approx(0.001 * full.fixed_steps(entry, 50_000), abs=1)


def test_the_sweep_of_tau_is_the_papers(paper: Any) -> None:
    comparison = paper.experiments["cifar-tau"].comparison(scale=1, seeds=1)
    configs = [comparison.config(one, steps=10) for one in comparison.entries]
    found: dict[str, set[int]] = {}
    for one in configs:
        found.setdefault(one.rule.name, set()).add(one.rule.period)
    taus = {1, 4, 16, 64}
    assert found == {
        "easgd": taus, "eamsgd": taus, "downpour": taus, "adownpour": taus, "mvadownpour": taus, "mdownpour": {1},
        "msgd": {1},
    }  # fmt: skip
    assert {one.workers for one in configs if one.rule.name != "msgd"} == {4}
    assert {(one.model, one.data, one.batch_size, one.weight_decay) for one in configs} == {
        ("cifar7", "cifar10", 128, 1e-4)
    }  # fmt: skip
    assert {one.rule.momentum for one in configs if hasattr(one.rule, "momentum")} == {0.99}


def test_the_sweeps_of_p_are_the_papers(paper: Any) -> None:
    for name, counts in (("cifar-p", {4, 8, 16}), ("imagenet-p", {4, 8})):
        comparison = paper.experiments[name].comparison(scale=1, seeds=1)
        for entry in comparison.entries:
            if not entry.rule.sequential:
                assert comparison.workers(entry) in counts
                assert entry.rule.period == (10 if entry.rule.name in ("easgd", "eamsgd") else 1)


def test_a_part_of_the_data_is_spread_over_all_of_it(paper: Any) -> None:
    from easgd_local import data

    digits = data.load("digits")
    part = paper.run.part(digits, 0.1)
    assert (len(part.train), len(part.test)) == (144, 36) and set(part.train.labels) == set(range(10))
    assert paper.run.part(digits, 1.0) is digits


def script(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PAPER / f"{name}.py"), *map(str, words)], capture_output=True, text=True, timeout=50
    )


def here(monkeypatch: pytest.MonkeyPatch, module: Any, *words: object) -> None:
    """The same in this process."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, words)])
    module.main()


def test_an_experiment_runs_goes_on_and_is_drawn(
    paper: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PASSM+ against DDP on the digits, a thousandth as long: one run each, then again with nothing left to do."""
    words = ["passm", "--scale", "0.002", "--seeds", "1", "--tune-cost", "0", "--data", "digits", "--model", "mlp",
             "--out", tmp_path / "runs", "--rows", tmp_path]  # fmt: skip
    done = script("run", *words)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "passm.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == ["passm+ lr=0.01", "passm lr=0.01", "ddp lr=0.01"]
    for row in rows:
        assert {"date", "commit", "load", "hardware", "versions", "scale", "settings", "curve"} <= set(row)
        assert row["status"] == "done" and not row["trial"] and "data_dir" not in row["settings"]
    here(monkeypatch, paper.run, *words)
    assert "test error" in done.stdout and "test error" not in capsys.readouterr().out
    assert len((tmp_path / "passm.jsonl").read_text().splitlines()) == 3
    with pytest.raises(SystemExit, match=r"data_scale=0\.5: the experiment in"):
        here(monkeypatch, paper.run, *words, "--data-scale", "0.5")
    here(monkeypatch, paper.draw, "passm", "--rows", tmp_path, "--out", tmp_path)
    assert (tmp_path / "paper-passm.png").read_bytes().startswith(b"\x89PNG")
    runs = paper.rows.read(tmp_path, "passm")
    text = "\n".join(paper.make_results.section(paper.experiments["passm"], runs))
    assert "passm --scale 0.002 --seeds 1 --data digits --model mlp --tune-cost 0\n" in text
    assert "| passm+ lr=0.01 | done | 0.01, momentum=0.9 | 4 |" in text
    assert re.search(r"\| passm\+ takes 1.2 times .* \| not decided \| [\d.]+ times", text)
    assert eventually(lambda: not children())


@pytest.mark.parametrize("words, sentence", [
    (["run", "cifar-tau", "--scale", "0"], "scale=0.0: .* must lie in (0, 1]; try 0.01"),
    (["run", "digits", "--data-scale", "2"], "data_scale=2.0: .* must lie in (0, 1]"),
    (["run", "imagenet-p", "--data-dir", "/nowhere"], "data_dir=/nowhere: there is no such folder"),
    (["run", "apam", "--data", "synthetic", "--data-scale", "0.5"], "data_scale=0.5: synthetic pictures are made anew"),
    (["run", "passm", "--data", "digits", "--model", "mlp", "--data-scale", "0.01"], "batch_size=128 x workers=4"),
    (["run", "cifar"], "invalid choice: 'cifar'"),
    (["draw", "cifar"], "cifar: no such experiment; choose of cifar-tau"),
    (["draw", "--rows", "/nowhere"], "there are no rows in /nowhere; run run.py first"),
    (["draw", "imagenet-p", "--rows", "/nowhere"], "there are no rows in /nowhere; run run.py imagenet-p first"),
])  # fmt: skip
def test_a_mistake_gets_one_sentence(
    words: list[str], sentence: str, paper: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    name, *rest = words
    out = ["--out", str(tmp_path / "runs")] if name == "run" else []
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *rest, *out])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        getattr(paper, name).main()
    said = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err  # argparse prints by itself
    last = said.strip().splitlines()[-1]
    assert end.value.code and last.startswith(f"{name}.py: error: ")
    assert re.search(re.escape(sentence).replace(r"\.\*", ".*"), last), last
    assert not list(tmp_path.iterdir()) and eventually(lambda: not children())


# What is made of the rows


def record(label: str, seed: int, error: float, *, lr: float = 0.1, steps: int = 10, **more: Any) -> dict[str, Any]:
    numbers = {"seconds": 10.0, "samples_per_s": 7.0, "exchange_s": None, "wait_s": 1.0, "moved_bytes": 3.0}
    made = {"label": label, "seed": seed, "test_error": error, "lr": lr, "wanted_steps": steps, "workers": 4}
    return {**made, "status": "done", "curve": [], **numbers, **more}


def sweep(paper: Any, errors: dict[str, float], trials: list[dict[str, Any]] | None = None) -> Any:
    """Two seeds of every entry of the sweep of τ: each within 0.1 % of 50 %, or of what `errors` says for its label."""
    labels = paper.experiments["cifar-tau"].labels
    found = [record(one, seed, errors.get(one, 0.5) + 0.001 * seed) for one in labels for seed in (0, 1)]
    return paper.rows.Runs(found, trials or [])


def verdicts(paper: Any, runs: Any) -> dict[str, str]:
    found = paper.findings.cifar_tau(runs, runs.standing(0.4))
    return {one.claim: one.verdict for one in found}


def labels_of(paper: Any, rule: str) -> list[str]:
    return [one for one in paper.experiments["cifar-tau"].labels if one.split()[0] == rule]


def test_a_finding_is_confirmed_refuted_or_left_open_by_the_errors_and_their_spread(paper: Any) -> None:
    best, own = labels_of(paper, "eamsgd"), labels_of(paper, "downpour")
    good = verdicts(paper, sweep(paper, dict.fromkeys(best, 0.3) | {own[2]: 0.7, own[3]: 0.8}))
    assert all(good[f"eamsgd is best of all at τ = {tau}"] == "confirmed" for tau in (1, 4, 16, 64))
    assert good["downpour is better at τ = 1 and 4 than at 16 and 64"] == "confirmed"
    assert good["a longer τ is not worse for eamsgd"] == "confirmed"
    other = verdicts(paper, sweep(paper, {best[0]: 0.3, best[1]: 0.6, own[2]: 0.3, own[3]: 0.3}))
    assert other["eamsgd is best of all at τ = 1"] == "confirmed"
    assert other["eamsgd is best of all at τ = 4"] == "refuted"
    assert other["downpour is better at τ = 1 and 4 than at 16 and 64"] == "refuted"
    assert other["a longer τ is not worse for eamsgd"] == "refuted"
    assert verdicts(paper, sweep(paper, {}))["eamsgd is best of all at τ = 1"] == "not decided"


def test_one_run_decides_nothing(paper: Any) -> None:
    whole = sweep(paper, dict.fromkeys(labels_of(paper, "eamsgd"), 0.3))
    first = paper.rows.Runs([one for one in whole.compared if one["seed"] == 0], [])
    assert set(verdicts(paper, first).values()) == {"not decided"}


def test_what_has_not_been_run_decides_nothing(paper: Any) -> None:
    whole = sweep(paper, dict.fromkeys(labels_of(paper, "eamsgd"), 0.3))
    for count in (0, 1, 6):  # all of τ = 1 but msgd
        labels = paper.experiments["cifar-tau"].labels[:count]
        part = paper.rows.Runs([one for one in whole.compared if one["label"] in labels], [])
        assert set(verdicts(paper, part).values()) == {"not decided"}


def test_apam_that_diverges_with_many_workers_is_not_as_accurate(paper: Any) -> None:
    counts = (1, 2, 5, 10, 20)
    found = [record(f"apam workers={p} lr=0.0005", seed, 0.5 + 0.001 * seed) for p in counts for seed in (0, 1)]
    for one in found[-2:]:
        one |= {"status": "diverged", "test_error": math.nan}
    runs = paper.rows.Runs(found, [])
    (said,) = paper.findings.apam(runs, runs.standing(0.4))
    assert said.verdict == "refuted" and said.numbers.endswith("p = 20: no run done")


@pytest.mark.parametrize("ours, theirs, verdict", [
    ((1.0, 1.1), (1.5, 1.6), "confirmed"), ((1.0, 1.4), (1.5, 1.6), "not decided"), ((1.0, 1.1), (1.1, 1.1), "refuted"),
])  # fmt: skip
def test_passm_is_called_sooner_only_where_all_runs_say_so(
    paper: Any, ours: tuple[float, float], theirs: tuple[float, float], verdict: str
) -> None:
    found = [record("passm+ lr=0.01", seed, 0.5, seconds=ours[seed]) for seed in (0, 1)]
    found += [record("ddp lr=0.01", seed, 0.5, seconds=theirs[seed]) for seed in (0, 1)]
    runs = paper.rows.Runs(found, [])
    accurate, sooner = paper.findings.passm(runs, runs.standing(0.4))
    assert (accurate.verdict, sooner.verdict) == ("confirmed", verdict)


def test_runs_without_curves_and_with_losses_that_are_no_numbers_are_drawn(paper: Any) -> None:
    bad = {"t": 0, "samples": 0, "train_loss": math.nan, "test_loss": math.nan, "test_error": 0.9}
    about = {"settings": {"model": "m", "data": "d", "batch_size": 1}, "scale": 1.0}
    for curve in ([], [bad], [bad, bad | {"t": 1, "train_loss": 2.0}]):
        runs = paper.rows.Runs([record("passm+ lr=0.01", 0, 0.9, status="failed") | about | {"curve": curve}], [])
        assert paper.draw.figure(paper.experiments["passm"], runs).axes


def test_a_run_that_diverged_is_worse_than_any_that_did_not(paper: Any) -> None:
    runs = sweep(paper, {})
    for one in runs.compared:
        if one["label"] in labels_of(paper, "downpour")[2:]:
            one |= {"status": "diverged", "test_error": math.nan}
    assert verdicts(paper, runs)["downpour is better at τ = 1 and 4 than at 16 and 64"] == "confirmed"


@pytest.mark.parametrize("late, verdict", [
    ({"status": "diverged"}, "confirmed"), ({"test_error": 0.9, "train_loss": 3.0}, "confirmed"),
    ({"test_error": 0.9, "train_loss": 2.3}, "refuted"),  # slow, but not unstable
    ({"test_error": 0.5, "train_loss": 3.0}, "refuted"),
])  # fmt: skip
def test_downpour_is_called_unstable_where_the_same_step_size_no_longer_learns(
    paper: Any, late: dict[str, Any], verdict: str
) -> None:
    own = labels_of(paper, "downpour")
    trials = [record(one, 3, 0.5, lr=lr) for one, lr in zip(own, (0.005, 0.005, 0.00506, 0.00506), strict=True)]
    for one in trials[2:]:
        one |= late
    trials += [record(own[2], 3, 0.5, lr=0.00506, steps=20)]  # a longer trial at the same step size does not count
    runs = sweep(paper, {}, trials)
    for one in runs.compared:
        one["curve"] = [{"train_loss": loss, "test_error": 0.9} for loss in (2.3, 1.5)]
    assert verdicts(paper, runs)["downpour is very unstable at τ = 16 and 64"] == verdict


def test_the_newest_rows_of_the_scale_run_last_are_read(paper: Any, tmp_path: Path) -> None:
    def row(entry: str, scale: float, error: float, *, trial: bool = False) -> str:
        made = {"entry": entry, "trial": trial, "scale": scale, "data_scale": 1.0, "settings": {}, "search": {}}
        return json.dumps(made | {"hardware": {"processor": "x"}, "wanted_steps": 3, "test_error": error}) + "\n"

    lines = [row("a", 1, 0.1), row("b", 1, 0.2), row("a", 0.5, 0.3), row("a", 1, 0.4), row("t", 1, 0.5, trial=True)]
    (tmp_path / "x.jsonl").write_text("".join(lines))
    runs = paper.rows.read(tmp_path, "x")
    assert sorted((one["entry"], one["test_error"]) for one in runs.compared) == [("a", 0.4), ("b", 0.2)]
    assert [one["entry"] for one in runs.trials] == ["t"]
    assert paper.rows.read(tmp_path, "y") is None


def test_the_results_are_up_to_date(paper: Any) -> None:
    page = runpy.run_path(str(ROOT / "docs" / "make_results.py"))["page"]()
    assert (ROOT / "docs" / "results.md").read_text("utf-8") == page, "run python docs/make_results.py"
    for picture in re.findall(r"\]\((pictures/[^)]+)\)", page):
        assert (ROOT / "docs" / picture).exists(), "run python bench/paper/draw.py"


def test_every_row_that_is_kept_says_what_it_was_made_with() -> None:
    for path in RESULTS.glob("*.jsonl"):
        for line in path.read_text("utf-8").splitlines():
            row = json.loads(line)
            needed = {"entry", "trial", "commit", "hardware", "versions", "scale", "settings", "search", "status"}
            assert needed <= set(row)
            assert not row["commit"].endswith("-dirty")
