"""`easgd-local compare` without a process: entries, settings, the order of runs, tuning, what the records say."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from easgd_local import cli, data
from easgd_local.compare import contest, outset, tuning
from easgd_local.compare.command import execute, make_comparison
from easgd_local.compare.contest import open_contest, rotated
from easgd_local.compare.entries import Entry, parse
from easgd_local.compare.figures import figure
from easgd_local.compare.measuring import Interrupted, moved_bytes
from easgd_local.compare.rival import optimizer_of
from easgd_local.compare.rivals import DDP, ENTRANTS, PostLocalSGD
from easgd_local.compare.saved import restored, write_json
from easgd_local.compare.settings import Comparison, duration
from easgd_local.compare.standing import edges, spread, standings, to_target
from easgd_local.compare.tables import bytes_text, markdown
from easgd_local.fork_server import warm_up
from easgd_local.rules.eamsgd import EAMSGD
from easgd_local.rules.easgd import EASGD
from easgd_local.rules.msgd import MSGD
from tests.conftest import children, eventually

# Entries


def test_an_entry_is_a_rule_with_its_own_flags() -> None:
    first, second = parse(["eamsgd tau=16 --lr=0.01 beta-per=step", "post-local-sgd ddp_steps=7"])
    assert first.rule == EAMSGD(tau=16, lr=0.01, beta_per="step")
    assert first.label == "eamsgd tau=16 lr=0.01 beta_per=step" and not first.is_rival
    assert second.rule == PostLocalSGD(ddp_steps=7) and second.is_rival


def test_equal_entries_get_labels_and_folders_of_their_own() -> None:
    entries = parse(["ddp", "easgd tau=3", "ddp", "ddp lr=0.2"])
    assert [one.label for one in entries] == ["ddp", "easgd tau=3", "ddp 2", "ddp lr=0.2"]
    assert len({one.folder for one in entries}) == 4 and not any(" " in one.folder for one in entries)


def test_the_order_of_turns_is_a_flag_of_an_entry() -> None:
    comparison = make_comparison(entries=["easgd turns=free", "passm"], workers=2)
    assert [comparison.config(one, steps=1).turns for one in comparison.entries] == ["free", "none"]


def test_a_comparison_is_read_back_from_json() -> None:
    given = make_comparison(
        entries=["localsgd inner=adam", "easgd turns=none", "ddp threads=3"], budget="2m", tune=True, seed=5
    )
    assert Comparison.from_json(json.loads(json.dumps(given.to_json()))).to_json() == given.to_json()
    assert given.budget_s == 120 and given.run_seeds == [5, 6, 7] and given.tuning_seed == 8


def test_an_entry_with_one_worker_gets_the_threads_of_all() -> None:
    comparison = make_comparison(entries=["msgd", "ddp", "msgd threads=1"], workers=3, threads=2)
    configs = [comparison.config(one, steps=40) for one in comparison.entries]
    assert [(one.workers, one.threads, one.eval_every) for one in configs] == [(1, 6, 2), (3, 2, 2), (1, 1, 2)]


def test_an_entry_may_have_workers_of_its_own() -> None:
    comparison = make_comparison(entries=["easgd", "easgd workers=16", "msgd"], workers=4, epochs=2.0, batch_size=10)
    configs = [comparison.config(one, steps=40) for one in comparison.entries]
    assert [one.workers for one in configs] == [4, 16, 1] and comparison.most_workers == 16
    assert [comparison.fixed_steps(one, 1600) for one in comparison.entries] == [80, 20, 320]


def test_epochs_give_all_entries_the_same_number_of_samples() -> None:
    comparison = make_comparison(entries=["msgd", "ddp"], workers=4, epochs=2.0, batch_size=10)
    assert [comparison.fixed_steps(one, 1000) for one in comparison.entries] == [200, 50]


@pytest.mark.parametrize("text, seconds", [("90s", 90), ("10m", 600), ("1.5h", 5400), (".5s", 0.5)])
def test_a_budget_is_a_time_with_its_unit(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text, kind, lr, changed", [
    ("ddp", "SGD", 0.1, {"momentum": 0.9, "nesterov": True}), ("ddp momentum=0", "SGD", 0.1, {"nesterov": False}),
    ("ddp optimizer=adam", "Adam", 0.0005, {"amsgrad": False}),
    ("ddp optimizer=amsgrad lr=0.01", "Adam", 0.01, {"amsgrad": True}),
    ("ddp optimizer=adamw", "AdamW", 0.0005, {"amsgrad": False}),
])  # fmt: skip
def test_the_optimizer_of_ddp_is_the_one_of_torch_that_is_named(
    text: str, kind: str, lr: float, changed: dict[str, Any]
) -> None:
    plan: Any = SimpleNamespace(rival=parse([text])[0].rule, weight_decay=0.25)
    model: Any = torch.nn.Linear(2, 2)
    made = optimizer_of(plan, model)
    assert type(made).__name__ == kind
    assert {"lr": lr, "weight_decay": 0.25, **changed}.items() <= made.param_groups[0].items()


# Mistakes


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that must be refused with one sentence and leave nothing behind; returns the sentence."""
    monkeypatch.chdir(tmp_path)
    warm_up("easgd_local.preload_loop")

    def attempt(*words: str) -> str:
        try:
            code: object = cli.main(["compare", *words])
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        assert (code, said.out) == (2, "")
        assert re.fullmatch(r"easgd-local: error: [^\n]+[.?]\n", said.err), said.err
        assert not list(tmp_path.iterdir()) and eventually(lambda: not children())
        return said.err.removeprefix("easgd-local: error: ").rstrip("\n")

    return attempt


@pytest.mark.parametrize("words, sentence", [
    ([], "entries=none: a comparison needs at least two"),
    (["msgd"], "entries=msgd: a comparison needs at least two"),
    (["msgd", "eesgd"], "entry=eesgd: the entries are .* did you mean e?a?m?sgd or "),
    (["msgd", "dpp"], r"entry=dpp: the entries are .*ddp, post-local-sgd; did you mean ddp\?"),
    (["msgd", ""], "entry=: the entries are"),
    (["msgd", "ddp 'lr=1"], "cannot be read .* write it like 'eamsgd tau=16 lr=0.01'"),
    (["msgd", "ddp tau=3"], "tau=3: ddp has no tau, only lr, optimizer, momentum; .*, or use .*post-local-sgd"),
    (["msgd", "ddp turns=free"], "turns=free: ddp is defined for turns together"),
    (["msgd", "easgd turns=fre"], "turns=fre: easgd is defined for turns strict, free, none"),
    (["msgd", "easgd turns=together"], "turns=together: the rule easgd is defined for"),
    (["msgd", "easgd tau"], "tau is no flag with its value; write it like tau=16"),
    (["msgd", "easgd tau=x"], "tau=x: easgd needs a whole number"),
    (["msgd", "easgd lr=x"], "lr=x: easgd needs a number"),
    (["msgd", "easgd threads=0"], "threads=0: of each worker, must be a whole number of at least 1"),
    (["msgd", "easgd lr=1 lr=2"], "gives a flag twice"),
    (["msgd", "easgd tau=0"], "tau=0: "),
    (["msgd", "ddp momentum=1"], "momentum=1.0: "),
    (["msgd", "ddp optimizer=adma"], "optimizer=adma: ddp has sgd, adam, adamw, amsgrad"),
    (["msgd", "ddp optimizer=adam momentum=0.5"], "momentum=0.5: belongs to optimizer=sgd"),
    (["msgd", "post-local-sgd ddp_steps=-1"], "ddp_steps=-1: must be at least 0"),
    (["msgd", "ddp", "--target-error", "1"], r"target_error=1.0: .* must lie in \(0, 1\)"),
    (["msgd", "ddp", "--target-error", "nan"], "target_error=nan: "),
    (["msgd", "easgd workers=0"], "workers=0: must be a whole number of at least 1"),
    (["msgd workers=2", "ddp"], "workers=2: the rule msgd is sequential"),
    (["msgd", "ddp", "--tune-over", "tau"], "tune_over=tau: lr must be among them; write lr,tau"),
    (["msgd", "ddp", "--tune-over", "lr,mu"], "tune_over=mu: must be one of lr, tau, beta"),
    (["msgd", "ddp", "--tune-over", ""], "tune_over=: must be one of lr, tau, beta"),
    (["msgd", "ddp", "--tune-over", "lr,tau,lr"], "tune_over=lr,tau,lr: names one of them twice"),
    (["msgd", "easgd lr=0." + "0" * 200 + "1"], "entry=easgd lr=0.0+...: is longer than 200 characters"),
    (["msgd", "ddp", "--tune-lrs", "4"], "tune_lrs=4: as many smaller as larger ones"),
    (["msgd", "ddp", "--tune-cost", "0"], "tune_cost=0.0: in compared runs, must be positive"),
    (["msgd", "ddp", "--seeds", "0"], "seeds=0: must be at least 1"),
    (["msgd", "ddp", "--budget", "10"], "budget=10: must be a time above nothing, with its unit"),
    (["msgd", "ddp", "--budget", "0s"], "budget=0s: must be a time above nothing"),
    (["msgd", "ddp", "--budget", "9s", "--steps", "9"], "budget=9s and steps=9: both fix the length"),
    (["msgd", "ddp", "--steps", "9", "--epochs", "1"], "steps=9 and epochs=1.0: both fix the length"),
    (["msgd", "ddp", "--precision", "fp16"], "precision=fp16: ddp is torch's own, with neither a scaled loss nor"),
    (["eamsgd tua=3", "ddp"], "tua=3: eamsgd has no tua, did you mean tau\\?"),
    (["eamsgd beta1=0.5", "ddp"], "beta1=0.5: eamsgd has no beta1, only .*, or use an entry that has it: apam"),
    (["msgd", "ddp", "--tf32"], "tf32=True: says how a GPU computes, but device=auto; leave it out"),
    (["msgd", "ddp", "--workers", "0"], "workers=0: must be at least 1"),
    (["msgd", "ddp", "--seed", str(2**63 - 2)], "seed=.*: must be below"),
    (["msgd", "ddp", "--tau", "3"], "--tau: belongs to an entry, in one word with its rule, such as 'eamsgd tau=16"),
    (["msgd", "ddp", "--lr", "3"], "--lr: belongs to an entry"),
    (["msgd", "tau=16", "ddp"], "entry=tau=16: a flag belongs into one word with its rule; .* 'eamsgd tau=16'"),
    (["msgd", "ddp", "--resume", "old"], "resume=old and msgd: .* leave msgd out"),
    (["--resume", "old"], "resume=old: no comparison is there"),
    (["msgd", "ddp", "--budget", "0.00001s"], "budget=1e-05s: one evaluation takes .* give a larger budget"),
    (["msgd", "ddp", "--batch-size", "400"], "batch_size=400 x workers=4 = 1600 samples a step"),
    (["msgd", "passm", "--workers", "9"], "workers=9: the model has 6 parameter tensors"),
    (["msgd", "ddp", "--model", "mpl"], "model 'mpl' is not known, did you mean 'mlp'"),
])  # fmt: skip
def test_a_mistake_is_refused_with_one_sentence(refused: Callable[..., str], words: list[str], sentence: str) -> None:
    assert re.search(sentence, refused(*words))


def test_two_processes_of_nccl_on_one_gpu_are_refused(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outset, "find", lambda: SimpleNamespace(names=("a GPU",)))
    said = refused("msgd", "ddp", "--workers", "2", "--device", "cuda")
    assert said.startswith("workers=2: ddp on 1 GPU: NCCL takes one process per GPU; use at most 1,")


# The order of runs, with runs that are made up


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Runs are not run: each is noted under "runs", and `outcome` makes its record."""
    notes: dict[str, Any] = {"runs": [], "outcome": lambda entry, config: {}}

    def measure(entry: Entry, config: Any, dataset: Any) -> dict[str, Any]:
        assert dataset is DIGITS
        notes["runs"].append((entry.label, config.seed, config.steps, entry.rule.lr))
        point = {"t": config.steps, "seconds": 2.0, "samples": 64, "test_error": 0.05, "train_loss": 0.1}
        known = {"label": entry.label, "seed": config.seed, "lr": entry.rule.lr, "wanted_steps": config.steps}
        done = {"status": "done", "cause": None, "seconds": config.steps / 50, "test_error": 0.05, "test_loss": 0.2,
                "workers": 2, "samples_per_s": 9.0, "exchange_s": None, "wait_s": None, "moved_bytes": 5.0,
                "curve": [point]}  # fmt: skip
        return known | done | notes["outcome"](entry, config)

    monkeypatch.setattr(contest, "measure", measure)
    yield notes


DIGITS = data.load("digits")


def play(comparison: Comparison, folder: Path) -> contest.Contest:
    with open_contest(comparison, folder, DIGITS) as one:
        list(one.run())
    return one


def test_the_order_of_entries_rotates_between_seeds(made_up: dict[str, Any], tmp_path: Path) -> None:
    play(make_comparison(entries=["msgd", "ddp", "easgd"], seed=4, steps=7, workers=2), tmp_path)
    order = "msgd 4, ddp 4, easgd 4, ddp 5, easgd 5, msgd 5, easgd 6, msgd 6, ddp 6"
    assert ", ".join(f"{label} {seed}" for label, seed, *_ in made_up["runs"]) == order
    assert rotated(parse(["msgd", "ddp"]), 3)[0].label == "ddp"


def test_every_line_says_how_long_the_runs_that_are_left_will_take(made_up: dict[str, Any], tmp_path: Path) -> None:
    took = {"msgd": 70.0, "ddp": 3600.0}
    made_up["outcome"] = lambda entry, config: {"wall_s": took[entry.label]}
    with open_contest(make_comparison(entries=["msgd", "ddp"], seeds=2, steps=7), tmp_path, DIGITS) as one:
        said = [line.partition("; ")[2] for line in one.run()]
    # 1. Only msgd is known, and stands for all; then everybody is, and the order of the second seed is ddp, msgd.
    assert said == [
        "1 of 4 over, about 0:03:30 to go", "2 of 4 over, about 1:01:10 to go", "3 of 4 over, about 0:01:10 to go", "",
    ]  # fmt: skip


def test_what_is_recorded_is_not_run_again_but_for_what_failed(made_up: dict[str, Any], tmp_path: Path) -> None:
    comparison = make_comparison(entries=["msgd", "ddp", "easgd"], seeds=2, steps=7, workers=2)
    fates = {("ddp", 1): {"status": "failed", "cause": "?"}, ("msgd", 1): {"status": "diverged", "cause": "?"}}

    def outcome(entry: Entry, config: Any) -> dict[str, Any]:
        if entry.label == "easgd" and config.seed == 1 and fates:
            raise Interrupted
        return fates.get((entry.label, config.seed), {})

    made_up["outcome"] = outcome
    with pytest.raises(Interrupted):
        play(comparison, tmp_path)
    fates.clear()
    made_up["runs"].clear()
    one = play(comparison, tmp_path)
    assert [run[:2] for run in made_up["runs"]] == [("ddp", 1), ("easgd", 1), ("msgd", 1)]
    made_up["runs"].clear()
    assert play(comparison, tmp_path).records == one.records and made_up["runs"] == []


@pytest.mark.parametrize("change, sentence", [
    ({"entries": ["msgd", "easgd"]}, "entries=msgd, easgd: .* was started with msgd, ddp,"),
    ({"batch_size": 16}, "batch_size=16: .* was started with 32"),
    ({"seeds": 3}, "seeds=3: .* was started with 2"),
    ({"steps": None, "budget": "9s"}, "budget_s=9.0: .* was started with None"),
])  # fmt: skip
def test_a_comparison_that_goes_on_refuses_changes(
    made_up: dict[str, Any], tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    given: dict[str, Any] = {"entries": ["msgd", "ddp"], "seeds": 2, "steps": 7}
    play(make_comparison(**given), tmp_path)
    with pytest.raises(ValueError, match=sentence):
        play(make_comparison(**(given | change)), tmp_path)


def test_a_folder_with_other_files_is_left_alone(made_up: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds other files \(thesis.tex\)"):
        play(make_comparison(entries=["msgd", "ddp"]), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="is a file"):
        play(make_comparison(entries=["msgd", "ddp"]), tmp_path / "thesis.tex")


def test_two_comparisons_do_not_share_a_folder(tmp_path: Path) -> None:
    comparison = make_comparison(entries=["msgd", "ddp"])
    with open_contest(comparison, tmp_path, DIGITS), pytest.raises(ValueError, match="is in progress there"):
        play(comparison, tmp_path)


def test_the_budget_becomes_steps_by_a_timed_run_of_each_entry(made_up: dict[str, Any], tmp_path: Path) -> None:
    rates = {"msgd": 50, "ddp": 200}
    made_up["outcome"] = lambda entry, config: {"seconds": config.steps / rates[entry.label]}
    one = play(make_comparison(entries=["msgd", "ddp"], seeds=1, budget="10s"), tmp_path)
    assert [(label, steps) for label, seed, steps, _ in made_up["runs"] if seed == 0] == [("msgd", 500), ("ddp", 2000)]
    assert one.state["paces"]["ddp"]["steps_per_s"] == 200 and one.state["paces"]["ddp"]["timed_steps"] >= 200


def test_the_pace_is_that_of_the_least_disturbed_timed_run(made_up: dict[str, Any], tmp_path: Path) -> None:
    rates = iter([100, 40, 100, 5] + [100] * 20)
    made_up["outcome"] = lambda entry, config: {"seconds": config.steps / next(rates)}
    one = play(make_comparison(entries=["msgd", "ddp"], seeds=1, budget="10s"), tmp_path)
    assert one.state["paces"]["msgd"]["steps_per_s"] == 100


def test_a_report_says_where_training_times_are_not_equal(made_up: dict[str, Any], tmp_path: Path) -> None:
    made_up["outcome"] = lambda entry, config: {"seconds": config.steps / (25 if config.seed else 50)}
    comparison = make_comparison(entries=["msgd", "ddp lr=0.3"], seeds=1, budget="10s", seed=0)
    one = play(comparison, tmp_path)
    text = markdown(comparison, standings(one.records, 0.1), one.state)
    assert "Unequal: against the budget of 10 s the median training time was: msgd 5 s, ddp lr=0.3 5 s." in text


def test_an_entry_whose_timed_run_fails_is_reported(made_up: dict[str, Any], tmp_path: Path) -> None:
    made_up["outcome"] = lambda entry, _: {"status": "failed", "cause": "boom"} if entry.label == "ddp" else {}
    one = play(make_comparison(entries=["msgd", "ddp"], seeds=1, budget="10s", tune=True), tmp_path)
    assert {each["label"]: each["status"] for each in one.records} == {"msgd": "done", "ddp": "failed"}


# Tuning


def trial(lr: float, error: float = 0.1, loss: float = 1.0, status: str = "done") -> dict[str, Any]:
    return {"values": {"lr": lr}, "test_error": error, "test_loss": loss, "status": status}


def test_the_best_trial_has_the_least_error_then_the_least_loss() -> None:
    trials = [trial(9, 0.01, status="diverged"), trial(1, 0.2), trial(2, 0.1, 0.5), trial(3, 0.1, 0.4), trial(4, 0.3)]
    assert [one["lr"] for one in tuning.best_first(trials)] == [3, 2, 1, 4, 9]


def test_halving_keeps_the_best_and_runs_them_longer() -> None:
    asked = []

    def tried(values: dict[str, float], steps: int) -> dict[str, Any]:
        asked.append((values["lr"], steps))
        return trial(values["lr"], abs(math.log(values["lr"] / 0.3)))

    given = tuning.candidates(EASGD(lr=0.1), ["lr"], lrs=5, workers=4, steps=100)
    assert tuning.search(given, 100, tried) == {"lr": 0.316}
    assert asked == [(0.01, 25), (0.0316, 25), (0.1, 25), (0.316, 25), (1, 25), (0.316, 50), (0.1, 50)]
    assert sum(steps for _, steps in asked) / 100 == tuning.cost_of(tuning.rungs(5)) == 2.25


def test_the_more_candidates_the_shorter_the_first_trials() -> None:
    assert tuning.rungs(2) == [(2, 1 / 2)]
    assert tuning.rungs(3) == [(3, 1 / 4), (2, 1 / 2)]
    assert tuning.rungs(15) == [(15, 1 / 16), (10, 1 / 8), (5, 1 / 4), (2, 1 / 2)]
    assert tuning.rungs(1) == []


def test_a_search_costs_what_it_may() -> None:
    assert tuning.rungs(3, 0.875) == [(3, 1 / 8), (2, 1 / 4)]
    assert tuning.rungs(5, 1e9) == [(5, 1.0), (2, 1.0)]  # no trial is longer than a compared run
    assert tuning.rungs(1, 0.5) == []


def test_tau_and_beta_are_tried_around_an_entrys_own_where_it_has_them() -> None:
    """45 begin with 1/32 of the steps: of 16 steps, τ = 40 would meet not once, τ = 10 is the entry's own."""
    names = ("lr", "tau", "beta")
    found = tuning.candidates(EASGD(lr=0.1), names, lrs=5, workers=4, steps=512)
    assert {one["tau"] for one in found} == {10, 2} and {one["beta"] for one in found} == {0.9, 0.3, 2.7}
    assert len(found) == 5 * 2 * 3
    assert 40 in {one["tau"] for one in tuning.candidates(EASGD(), names, lrs=5, workers=4, steps=10_000)}
    two = tuning.candidates(EASGD(), names, lrs=1, workers=2, steps=512)
    assert {one["beta"] for one in two} == {0.9, 0.3}  # 2.7 / 2 is no moving rate
    given = tuning.candidates(EASGD(alpha=0.2), names, lrs=3, workers=4, steps=99)
    assert {tuple(one) for one in given} == {("lr", "tau")}
    assert tuning.candidates(MSGD(lr=0.1), names, lrs=1, workers=1, steps=9) == [{"lr": 0.1}]


def test_each_entry_runs_at_its_own_best_step_size(made_up: dict[str, Any], tmp_path: Path) -> None:
    best = {"msgd": 0.158, "ddp": 0.01}
    made_up["outcome"] = lambda entry, _: {"test_error": abs(entry.rule.lr - best[entry.label])}
    comparison = make_comparison(entries=["msgd", "ddp"], seeds=2, steps=100, tune=True)
    one = play(comparison, tmp_path)
    compared = {(label, lr) for label, seed, _, lr in made_up["runs"] if seed < 2}
    assert compared == set(best.items())
    trials = json.loads((tmp_path / "tune.json").read_text())
    assert len(trials) == 14 and {each["seed"] for each in trials} == {2} and one.state["trials"] == trials
    made_up["runs"].clear()
    play(comparison, tmp_path)
    assert made_up["runs"] == []


def test_a_trial_is_long_enough_for_the_workers_to_meet() -> None:
    """Of 40 steps a quarter would be 10, and with τ = 10 the center would not have moved."""
    lengths = []

    def tried(values: dict[str, float], steps: int) -> dict[str, Any]:
        lengths.append(steps)
        return trial(values["lr"])

    given = [{"lr": lr} for lr in (0.1, 0.2, 0.3)]
    tuning.search(given, 40, tried, least=21)
    assert lengths == [21, 21, 21, 21, 21]
    tuning.search(given, 15, tried, least=21)
    assert lengths[5:] == [15] * 5  # no trial is longer than a compared run


def test_ctrl_c_after_the_last_step_of_a_run_keeps_it_and_stops_the_comparison(
    made_up: dict[str, Any], tmp_path: Path
) -> None:
    made_up["outcome"] = lambda entry, config: {"interrupts": int(entry.label == "msgd")}
    comparison = make_comparison(entries=["msgd", "ddp"], seeds=1, steps=7)
    with pytest.raises(Interrupted):
        play(comparison, tmp_path)
    assert [run[0] for run in made_up["runs"]] == ["msgd"]
    play(comparison, tmp_path)
    assert [run[0] for run in made_up["runs"]] == ["msgd", "ddp"]


def test_a_best_step_size_at_the_edge_is_told_in_the_report(made_up: dict[str, Any], tmp_path: Path) -> None:
    best = {"msgd": 0.5, "ddp": 0.1}
    made_up["outcome"] = lambda entry, _: {"test_error": abs(entry.rule.lr - best[entry.label])}
    one = play(make_comparison(entries=["msgd", "ddp"], seeds=1, steps=100, tune=True), tmp_path)
    found = edges(one.state)
    assert list(found) == ["msgd"] and found["msgd"].startswith("best step size 0.5 is the largest that was tried")
    text = markdown(one.comparison, standings(one.records, 0.1), one.state)
    assert "| msgd |  | its best step size 0.5 is the largest" in text
    assert "msgd lr=0.05 momentum=0.9; ddp lr=0.1 optimizer=sgd momentum=0.9" in text


def test_a_search_with_a_failed_trial_decides_nothing_until_it_has_been_run_again(
    made_up: dict[str, Any], tmp_path: Path
) -> None:
    """The trial that dies is that of the best step size: compared at another one, the entry would be wronged."""
    dead = {"status": "failed", "cause": "killed", "test_error": 0.0}
    made_up["outcome"] = lambda entry, config: dead if (entry.label, entry.rule.lr) == ("ddp", 0.1) else {}
    comparison = make_comparison(entries=["msgd", "ddp"], seeds=1, steps=100, tune=True)
    records = {one["label"]: one for one in play(comparison, tmp_path).records}
    assert records["msgd"]["status"] == "done"
    assert records["ddp"]["status"] == "failed" and records["ddp"]["cause"] == "in a trial at lr = 0.1: killed"
    made_up["outcome"] = lambda entry, config: {"test_error": abs(entry.rule.lr - 0.1)}
    made_up["runs"].clear()
    (again,) = (one for one in play(comparison, tmp_path).records if one["label"] == "ddp")
    assert again["status"] == "done" and again["lr"] == 0.1
    assert all(label == "ddp" for label, *_ in made_up["runs"])


@pytest.mark.parametrize("name", sorted(ENTRANTS))
def test_an_entrys_own_values_are_among_those_that_are_tried(name: str) -> None:
    rule = replace(ENTRANTS[name](), lr=0.0123456)
    if name != "mdownpour" and any(one.name == "tau" for one in fields(rule)):
        rule = replace(rule, tau=13)
    own = {one: getattr(rule, one) for one in ("lr", "tau") if hasattr(rule, one)}
    found = tuning.candidates(rule, ("lr", "tau", "beta"), lrs=3, workers=1, steps=10_000)
    assert any(own.items() <= one.items() for one in found)


@pytest.mark.parametrize("text", [
    '{"settings": {"tune": true}}', "{}", "[]", '{"settings": ',
])  # fmt: skip
def test_a_damaged_comparison_or_that_of_another_version_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match="is damaged"):
        list(execute(entries=[], resume=str(tmp_path)))


@pytest.mark.parametrize("change", [
    lambda one: one["settings"].update(tune=True), lambda one: one["settings"].update(seeds="three"),
    lambda one: one["settings"]["entries"][0]["rule"].update(name="esgd"),
    lambda one: one["settings"]["entries"][0].pop("workers"), lambda one: one["records"][0].update(label="other"),
    lambda one: one["records"][0].pop("curve"), lambda one: one.pop("records"), lambda one: one.pop("tuned"),
])  # fmt: skip
def test_a_comparison_that_was_edited_is_refused(
    change: Callable[[dict[str, Any]], Any], made_up: dict[str, Any], tmp_path: Path
) -> None:
    play(make_comparison(entries=["msgd", "ddp"], seeds=1, steps=7), tmp_path)
    saved = json.loads((tmp_path / "results.json").read_text())
    change(saved)
    (tmp_path / "results.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"is damaged, or was written by another version|seeds=three"):
        list(execute(entries=[], resume=str(tmp_path)))


# What the records say


def point(seconds: float, error: float) -> dict[str, float]:
    return {"t": 1, "seconds": seconds, "samples": 10 * seconds, "test_error": error, "train_loss": 0.0}


def test_the_time_to_the_target_is_that_of_the_first_evaluation_at_or_below_it() -> None:
    curve = [point(0, 0.9), point(1, math.nan), point(2, 0.1), point(3, 0.2), point(4, 0.05)]
    assert to_target(curve, 0.1) == curve[2] and to_target(curve, 0.09) == curve[4] and to_target(curve, 0.01) is None


def test_a_standing_counts_the_runs_that_are_done_and_those_that_are_not() -> None:
    numbers = {"seconds": 5.0, "samples_per_s": 7.0, "exchange_s": None, "wait_s": 1.0, "moved_bytes": 3.0}
    shared = {"label": "a", "lr": 0.1, "workers": 2, "wanted_steps": 9, "status": "done", **numbers}
    records = [
        {**shared, "test_error": 0.02, "curve": [point(1, 0.5), point(3, 0.1)]},
        {**shared, "test_error": 0.04, "curve": [point(1, 0.5), point(7, 0.1)]},
        {**shared, "test_error": 0.50, "curve": [point(1, 0.5)]},
        {"label": "a", "lr": 0.1, "status": "diverged", "curve": [point(0, 0.05)]},
    ]
    (one,) = standings(records, 0.1)
    assert one.reached == 2 and one.status == "diverged 1/4" and one.exchange_s is None
    assert one.seconds_to_target is not None and one.test_error is not None
    assert (one.seconds_to_target.median, one.seconds_to_target.least, one.seconds_to_target.largest) == (5, 3, 7)
    assert (one.test_error.n, round(one.test_error.mean, 6)) == (3, 0.186667)


def test_a_spread_of_one_has_no_deviation() -> None:
    one = spread([3.0, None])
    assert one is not None and (one.n, one.mean, one.deviation) == (1, 3, None) and spread([None]) is None


def test_the_bytes_moved_are_those_that_the_algorithm_touches() -> None:
    # EASGD reads and writes c: 2 floats; a ring of 4 sends and receives 3/4 of a vector twice in each process.
    assert moved_bytes(EASGD(tau=10), 4, exchanges=5, parameters=100) == 2 * 4 * 5 * 100
    assert moved_bytes(DDP(), 4, exchanges=4, parameters=100) == 4 * 4 * 100 * (2 * 2 * 3 / 4)
    assert moved_bytes(DDP(), 1, exchanges=4, parameters=100) == 0
    assert [PostLocalSGD(tau=10, ddp_steps=5).meetings(steps) for steps in (3, 5, 6, 15, 16)] == [3, 5, 6, 6, 7]
    assert bytes_text(3 * 2e6) == "6 MB" and bytes_text(0) == "0 B"


def test_the_report_names_what_failed_and_says_what_is_equal(made_up: dict[str, Any], tmp_path: Path) -> None:
    failed = {"status": "failed", "cause": "a | pipe"}
    made_up["outcome"] = lambda entry, config: failed if entry.label == "ddp" and config.seed == 0 else {}
    comparison = make_comparison(entries=["msgd", "ddp"], seeds=1, steps=7, tune=True)
    one = play(comparison, tmp_path)
    text = markdown(comparison, standings(one.records, 0.1), one.state)
    assert "| ddp | 0 | failed | a \\| pipe |" in text and "7 steps of each worker" in text
    assert "| msgd | done | 0.005 | 2 | 7 | 2 s | 64 | 1/1 | 5.00 % (n = 1) |" in text


def test_numbers_that_are_not_finite_survive_the_file(tmp_path: Path) -> None:
    values = {"records": [{"test_loss": math.inf, "curve": [{"train_loss": math.nan, "t": 1}]}]}
    write_json(tmp_path / "a.json", values)
    found = restored(json.loads((tmp_path / "a.json").read_text()))
    assert math.isnan(found["records"][0]["curve"][0]["train_loss"]) and math.isnan(found["records"][0]["test_loss"])


def test_the_picture_has_a_line_for_each_entry_through_its_medians() -> None:
    shared = {"label": "a", "status": "done"}
    runs = [{**shared, "curve": [point(0, 0.9), point(seconds, error)]} for seconds, error in ((1, 0.3), (2, 0.2))]
    runs += [{**shared, "curve": [point(0, 0.9), point(6, 0.1)]}, {"label": "b", "status": "failed", "curve": []}]
    runs += [{"label": "c", "status": "diverged", "curve": [point(0, 0.9)]}]
    by_time, by_samples = figure(runs, 0.25, "heading").axes
    assert [line.get_label() for line in by_time.lines] == ["a", "c (1 of 1 not done)", "target"]
    assert list(by_time.lines[0].get_xdata()) == [0, 2] and list(by_samples.lines[0].get_xdata()) == [0, 20]
    assert np.allclose(by_time.lines[0].get_ydata(), [90, 20])
    assert "(s)" in by_time.get_xlabel() and "(%)" in by_time.get_ylabel() and "samples" in by_samples.get_xlabel()
