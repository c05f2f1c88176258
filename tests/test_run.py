"""Whole runs in real processes: equal to the listings, equal to each other, and to themselves after an interruption."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from easgd_local import checkpoint, data, metrics, models
from easgd_local.backend.cpu import CpuOps, vector
from easgd_local.center import Layout
from easgd_local.computing import Computing
from easgd_local.config import Config
from easgd_local.faults import Fault
from easgd_local.flat import Flat
from easgd_local.gradient import Gradient
from easgd_local.partition import partition
from easgd_local.prepare import prepare
from easgd_local.rules import RULES, rule_class
from easgd_local.rules.admm import ADMM
from easgd_local.rules.apam import APAM
from easgd_local.rules.asgd import ASGD, MVASGD
from easgd_local.rules.base import Rule
from easgd_local.rules.diloco import DiLoCo
from easgd_local.rules.downpour import ADownpour, Downpour, MVADownpour
from easgd_local.rules.eamsgd import EAMSGD
from easgd_local.rules.eamsgd_sync import EAMSGDSync
from easgd_local.rules.easgd import EASGD
from easgd_local.rules.easgd_gs import EASGDGaussSeidel
from easgd_local.rules.easgd_sync import EASGDSync
from easgd_local.rules.localsgd import LocalSGD
from easgd_local.rules.mdownpour import MDownpour
from easgd_local.rules.msgd import MSGD
from easgd_local.rules.passm import PASSM, PASSMPlus
from easgd_local.rules.sgd import SGD
from easgd_local.rules.sma import SMA
from easgd_local.summary import Clock
from tests import listings

pytestmark = pytest.mark.usefixtures("nothing_left")
Runner = Callable[..., dict[str, Any]]


def start_and_gradients(config: Config) -> tuple[np.ndarray, list[Gradient]]:
    """The center's start and each worker's gradient, as `config` describes them."""
    torch.set_num_threads(1)
    dataset, workers = data.load(config.data), config.workers
    torch.manual_seed(config.seed)
    start = Flat(models.build(config.model, shape=dataset.input_shape, classes=len(dataset.classes))).values()
    gradients = []
    for rank in range(workers):
        model = models.build(config.model, shape=dataset.input_shape, classes=len(dataset.classes))
        sampler = data.shard(config.seed, rank, workers, config.batch_size, len(dataset.train))
        gradients.append(
            Gradient(
                model,
                dataset,
                sampler,
                rank=rank,
                weight_decay=config.weight_decay,
                computing=Computing(config.precision),
            )
        )
    return start, gradients


def listing(config: Config) -> str:
    """center_sha256 of the run that `config` describes, computed from the listing in this process."""
    start, gradients = start_and_gradients(config)
    workers = config.workers

    def gradient(i: int, t: int, x: np.ndarray) -> np.ndarray:
        point = vector(len(x))  # on a page, as a worker's vectors are
        point[:] = x
        return gradients[i](CpuOps(), t, point)

    layout = Layout(workers, len(start), ("c",), config.block_bytes)
    blocks = [layout.block(b) for b in range(layout.blocks)]
    layers = gradients[0].layers
    own = []
    if config.rule.divides:
        parts = partition([layer.stop - layer.start for layer in layers], workers)
        own = [slice(layers[part[0]].start, layers[part[-1]].stop) for part in parts]
    end = listings.compute(config.rule, start, workers, config.steps, gradient, blocks, own)
    return hashlib.sha256(end["c"].tobytes()).hexdigest()


# The listings. 17,226 parameters do not divide by 5 or 7 blocks of 64-byte lines; 1000-byte blocks make about 70.


@pytest.mark.parametrize(
    ("rule", "workers", "block_bytes"),
    [
        (EASGD(lr=0.1, tau=1, alpha=0.5), 2, 4 << 20),
        (EASGD(lr=0.1, tau=3, alpha=1.0), 3, 1000),
        (EASGD(lr=0.1, tau=3, alpha=0.0), 2, 1000),
        (EAMSGD(lr=0.03, tau=3, beta=0.9, momentum=0.8), 4, 1000),
        (EAMSGD(lr=0.03, tau=1, alpha=0.5, momentum=0.9), 3, 4 << 20),
        (EASGDSync(lr=0.1, tau=2, alpha=0.2), 3, 1000),
        (EAMSGDSync(lr=0.03, tau=3, alpha=0.2, momentum=0.8), 4, 4 << 20),
        (EASGDGaussSeidel(lr=0.1, tau=2, alpha=0.4, first="center"), 3, 1000),
        (EASGDGaussSeidel(lr=0.1, tau=2, alpha=0.4, first="worker"), 2, 1000),
        (Downpour(lr=0.02, tau=3), 3, 1000),
        (ADownpour(lr=0.02, tau=2), 3, 1000),
        (MVADownpour(lr=0.02, tau=1, average_rate=0.1), 2, 4 << 20),
        (MDownpour(lr=0.01, momentum=0.8), 3, 1000),
        (ADMM(lr=0.05, rho=0.5), 3, 1000),
        (APAM(lr=0.001), 3, 1000),
        (APAM(lr=0.001, delay=2), 2, 1000),
        (PASSM(lr=0.05, momentum=0.8), 3, 1000),
        (PASSMPlus(lr=0.02, momentum=0.8, full_steps=5), 3, 1000),
        (LocalSGD(lr=0.1, tau=3, inner="sgd"), 3, 1000),
        (SMA(lr=0.1, tau=2, inner="msgd", momentum=0.5, center_momentum=0.4), 3, 1000),
        (DiLoCo(lr=0.1, tau=3, inner="sgd"), 4, 1000),
        (SGD(lr=0.1), 1, 1000),
        (MSGD(lr=0.05, momentum=0.8), 1, 4 << 20),
        (ASGD(lr=0.1), 1, 1000),
        (MVASGD(lr=0.1, average_rate=0.1), 1, 1000),
    ],
    ids=lambda value: value.name if isinstance(value, Rule) else str(value),
)
def test_the_processes_compute_the_listing_to_the_bit(rule: Any, workers: int, block_bytes: int, run: Runner) -> None:
    values = {
        "rule": rule, "workers": workers, "steps": 14, "batch_size": 8, "block_bytes": block_bytes, "threads": 1,
        "seed": 5, "eval_every": 0, "turns": "together" if "together" in rule.orders else "strict",
    }  # fmt: skip
    assert run(**values)["center_sha256"] == listing(Config(**values))


# Every rule, in processes


@pytest.mark.parametrize("name", RULES)
def test_every_rule_resumes_from_a_checkpoint_to_the_same_bits(name: str, run: Runner, tmp_path: Path) -> None:
    rule = rule_class(name)
    given = {"tau": 3, "lr": 0.01, "delay": 2, "full_steps": 5, "inner": "msgd"}
    made = rule(**{one.name: given[one.name] for one in fields(rule) if one.name in given and name != "mdownpour"})
    values = {"rule": made, "steps": 27, "workers": 1 if rule.sequential else 2, "block_bytes": 5000, "eval_every": 8}
    values["turns"] = "together" if "together" in rule.orders else "strict"
    whole = run(**values, checkpoint_every=13)
    folder = shutil.copytree(whole["folder"], tmp_path / "again")
    for later in checkpoint.steps(folder)[1:]:
        shutil.rmtree(later)
    Path(folder, "summary.json").unlink()  # as if it had been killed
    second = run(**values, checkpoint_every=13, resume=str(folder))
    assert second["center_sha256"] == whole["center_sha256"]
    exported = [safetensors.torch.load_file(Path(one["folder"], "center.safetensors")) for one in (whole, second)]
    assert all(torch.equal(exported[0][key], exported[1][key]) for key in exported[0])


@pytest.mark.parametrize("name", RULES)
def test_with_its_defaults_every_rule_reaches_less_than_ten_percent_error_on_the_digits(name: str, run: Runner) -> None:
    """As `easgd-local train RULE` does it: four processes (one for sequential rules), steps of 32 samples. Half of the
    default 500 steps are enough, but for an average over a thousand."""
    steps = None if name == "mvasgd" else 250
    summary = run(rule=rule_class(name)(), workers=None, steps=steps, batch_size=32)
    assert summary["workers"] == (1 if RULES[name].sequential else 4)
    assert summary["test_error"] < 0.1


@pytest.mark.parametrize("name", [name for name in RULES if not RULES[name].sequential])
def test_under_every_rule_the_others_go_on_when_a_worker_dies_in_an_exchange(name: str, run: Runner) -> None:
    rule, t = rule_class(name)(), 20
    summary = run(
        rule=rule, workers=3, steps=60, faults=(Fault("kill-in-exchange", 1, t),), block_bytes=5000, eval_every=30
    )
    assert summary["status"] == "done"
    assert [failure["rank"] for failure in summary["failures"]] == [1]
    assert [report["steps"] for report in summary["worker_reports"]] == [60, t, 60]
    assert np.isfinite(summary["test_loss"])


@pytest.mark.parametrize("name", ["admm", "diloco", "adownpour", "passm"])
def test_under_rules_with_state_at_the_center_a_dead_worker_is_replaced(name: str, run: Runner) -> None:
    rule = rule_class(name)(**({"inner": "sgd"} if name == "diloco" else {}))
    summary = run(
        rule=rule, workers=3, steps=400, faults=(Fault("kill-in-exchange", 1, 20),), on_failure="respawn", eval_every=0
    )
    assert summary["status"] == "done"
    assert [report["steps"] for report in summary["worker_reports"]] == [400, 400, 400]
    assert np.isfinite(summary["test_loss"])


def test_shared_vectors_are_reported_by_name_and_size(run: Runner) -> None:
    summary = run(rule=APAM(), steps=5)
    size_bytes = summary["vectors"]["shared"]["c"]
    assert summary["vectors"]["shared"] == dict.fromkeys(("c", "m", "v", "vhat"), size_bytes)
    report = Path(summary["folder"], "report.md").read_text()
    assert re.search(r"\| shared \| vhat \| [\d,]+ \|", report)
    summary = run(rule=ADMM(), steps=5, workers=3)
    assert summary["vectors"]["shared"].keys() == {"c", "y0", "y1", "y2"}


def test_the_averaged_rules_evaluate_and_export_their_average(run: Runner) -> None:
    summary = run(rule=MVADownpour(lr=0.02, average_rate=1e-6), steps=60)  # an average that stays at the start
    assert summary["train_loss"] > 2.2
    assert run(rule=Downpour(lr=0.02), steps=60)["center_sha256"] == summary["center_sha256"]
    exported = safetensors.torch.load_file(Path(summary["folder"], "center.safetensors"))
    torch.manual_seed(0)
    start = models.build("mlp", shape=(1, 8, 8), classes=10).state_dict()
    assert all((exported[name] - start[name]).abs().max() < 1e-4 for name in start)


def test_a_cosine_belongs_to_the_length_of_its_run(run: Runner) -> None:
    values = {"rule": EASGD(lr=0.1, tau=2), "schedule": "cosine", "warmup": 5}
    whole, again = run(**values, steps=30), run(**values, steps=30, checkpoint_every=10)
    assert whole["center_sha256"] == again["center_sha256"] != run(**values, steps=31)["center_sha256"]
    with pytest.raises(ValueError, match=r"steps=60: the run in .* was started with steps=30"):
        run(**values, steps=60, resume=again["folder"])


def test_passm_writes_without_turns_what_each_process_owns(run: Runner) -> None:
    """After one step no order of events matters: every coordinate has one writer, and all started from one point."""
    values = {"rule": PASSM(lr=0.1), "workers": 3, "steps": 1, "batch_size": 8, "threads": 1, "seed": 5}
    assert run(**values, eval_every=0)["center_sha256"] == listing(Config(**values))


def test_hogwild_loses_updates_at_most(tmp_path: Path, run: Runner) -> None:
    """Two workers visit the center once, at step 3, from known points. What each coordinate can become is enumerated:
    a worker reads it for d, reads it again to add d, and writes it, in any interleaving with the other."""
    values = {
        "rule": EASGD(lr=0.1, tau=3, alpha=0.4),
        "workers": 2,
        "steps": 4,
        "batch_size": 8,
        "threads": 1,
        "seed": 5,
    }
    start, x = points_before_the_exchange(Config(**values, turns="none"))
    alpha, allowed = np.float32(0.4), []
    for order in sorted(set(permutations("aaabbb"))):
        c, done = start.copy(), {"a": 0, "b": 0}
        d, total = {}, {}
        for who in order:
            if done[who] == 0:
                d[who] = alpha * (x["ab".index(who)] - c)
            elif done[who] == 1:
                total[who] = c + d[who]
            else:
                c = total[who]
            done[who] += 1
        allowed.append(c)
    for attempt in range(3):
        summary = run(**values, turns="none", eval_every=0, checkpoint_every=0, out=str(tmp_path / f"none-{attempt}"))
        state = safetensors.torch.load_file(Path(summary["folder"], "center.safetensors"))
        model = models.build("mlp", shape=(1, 8, 8), classes=10)
        model.load_state_dict(state)
        c = Flat(model).values()
        assert np.any([c == one for one in allowed], axis=0).all()
        assert not np.array_equal(c, start)


def points_before_the_exchange(config: Config) -> tuple[np.ndarray, list[np.ndarray]]:
    """The center's start, and where each worker is when it comes to its second exchange."""
    start, gradients = start_and_gradients(config)
    x = []
    for rank in range(config.workers):
        at = vector(len(start))
        at[:] = start
        for t in range(config.rule.tau):
            at[:] = at - np.float32(config.rule.lr) * gradients[rank](CpuOps(), t, at)
        x.append(at)
    return start, x


# Reproducibility


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_two_equal_runs_give_the_same_center(workers: int, run: Runner) -> None:
    once = run(rule=EAMSGD(tau=2), workers=workers)
    again = run(rule=EAMSGD(tau=2), workers=workers)
    assert once["center_sha256"] == again["center_sha256"]


def test_the_center_does_not_depend_on_the_load_of_the_machine_nor_on_who_looks_at_it(run: Runner) -> None:
    quiet = run(workers=3, steps=60)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        loaded = run(workers=3, steps=60, eval_every=7, checkpoint_every=11)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert loaded["center_sha256"] == quiet["center_sha256"]


def test_another_seed_gives_another_center(run: Runner) -> None:
    assert run(seed=1)["center_sha256"] != run(seed=2)["center_sha256"]


# Interruption and resumption


def interrupt(folder: Path, *, after: int, number: int = signal.SIGINT) -> threading.Thread:
    """Sends a signal to this process once the run's log shows an evaluation at a step ≥ `after`."""

    def send() -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if any(event["kind"] == "center" and event["t"] >= after for event in metrics.read(folder)):
                os.kill(os.getpid(), number)
                return
            time.sleep(0.002)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize(("workers", "tau"), [(3, 7), (2, 1)])
def test_a_run_interrupted_and_resumed_gives_the_same_center(
    workers: int, tau: int, tmp_path: Path, run: Runner
) -> None:
    values = {"rule": EAMSGD(tau=tau), "workers": workers, "steps": 400, "eval_every": 20}
    whole = run(**values)
    folder = tmp_path / "stopped"
    thread = interrupt(folder, after=100)
    first = run(**values, out=str(folder))
    thread.join()
    assert first["status"] == "interrupted"
    assert 100 <= first["steps"] < 400
    second = run(**values, resume=str(folder))
    assert second["status"] == "done"
    for name in ("center_sha256", "steps", "samples", "exchanges"):  # of the whole run, like its seconds
        assert second[name] == whole[name], name
    assert second["seconds"] > first["seconds"] and second["evaluate_s"] > first["evaluate_s"]
    assert [one["exchanges"] for one in second["worker_reports"]] == [-(-400 // tau)] * workers
    steps = [event["t"] for event in metrics.read(folder) if event["kind"] == "center"]
    assert steps == sorted(set(steps))  # the log goes on where it stopped, nothing twice


def test_a_run_goes_on_from_a_periodic_checkpoint_with_more_steps_as_if_it_had_never_ended(run: Runner) -> None:
    whole = run(steps=64)
    short = run(steps=40, checkpoint_every=15)
    assert [path.name for path in sorted(Path(short["folder"], "checkpoints").iterdir())] == [
        "step-00000015", "step-00000030", "step-00000040",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"^steps=40: the run in .*, so nothing is left to do; give more --steps"):
        run(steps=40, checkpoint_every=15, resume=short["folder"])
    longer = run(steps=64, checkpoint_every=15, resume=short["folder"])
    assert longer["center_sha256"] == whole["center_sha256"]


def test_a_run_that_is_done_since_its_last_checkpoint_is_not_trained_again(run: Runner) -> None:
    first = run(steps=40, checkpoint_every=15)
    shutil.rmtree(Path(first["folder"], "checkpoints", "step-00000040"))
    with pytest.raises(ValueError, match=r"^steps=40: the run in .* is done, .* its newest checkpoint, at step 30\.$"):
        run(steps=40, checkpoint_every=15, resume=first["folder"])


def test_a_run_killed_between_its_last_checkpoint_and_its_summary_concludes_when_resumed(run: Runner) -> None:
    first = run(steps=40, checkpoint_every=20)
    for name in ("summary.json", "center.safetensors", "report.md"):
        Path(first["folder"], name).unlink()
    again = run(steps=40, checkpoint_every=20, resume=first["folder"])
    assert (again["status"], again["samples"]) == ("done", first["samples"])
    assert again["center_sha256"] == first["center_sha256"] and again["test_error"] == first["test_error"]
    assert Path(first["folder"], "center.safetensors").exists()


def test_a_run_killed_outright_resumes_from_its_last_checkpoint_to_the_same_center(tmp_path: Path, run: Runner) -> None:
    folder = tmp_path / "killed"
    values = {"steps": 500, "checkpoint_every": 25}
    whole = run(**values)
    code = (
        "import easgd_local as easgd\nif __name__ == '__main__':\n"
        f"    easgd.train(easgd.Config(rule=easgd.EAMSGD(tau=3), workers=2, batch_size=8, threads=1, **{values!r},"
        f" out={str(folder)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    while len(list((folder / "checkpoints").glob("step-*"))) < 2:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert run(**values, resume=str(folder))["center_sha256"] == whole["center_sha256"]


def test_a_run_continues_from_its_center_with_another_number_of_workers(run: Runner) -> None:
    first = run(steps=200, checkpoint_every=100, eval_every=100)
    second = run(steps=300, checkpoint_every=100, eval_every=100, workers=3, resume=first["folder"])
    assert second["status"] == "done"
    assert any("3 workers instead of 2" in warning for warning in second["warnings"])
    assert second["test_error"] < 0.2  # the start at the center was a trained one
    assert second["samples"] == 8 * (200 * 2 + 100 * 3)


# What is measured and what is left behind


def test_the_run_folder_is_complete(run: Runner) -> None:
    summary = run(steps=40, eval_every=10, workers=3, drawn=True)
    folder = Path(summary["folder"])
    present = {path.name for path in folder.iterdir()}
    assert present == {
        "config.json", "metrics.jsonl", "summary.json", "center.safetensors", "curves.png", "report.md", "logs",
    }  # fmt: skip
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    saved = json.loads((folder / "summary.json").read_text())
    assert saved.items() <= summary.items()
    for key in ("status", "rule", "workers", "steps", "exchanges", "seconds", "samples_per_s", "wait_s", "exchange_s",
                "train_loss", "test_loss", "test_error", "center_sha256"):  # fmt: skip
        assert saved[key] is not None
    assert (saved["steps"], saved["exchanges"], saved["samples"]) == (40, 3 * 14, 40 * 3 * 8)
    config = json.loads((folder / "config.json").read_text())
    assert {"config", "versions", "hardware"} <= config.keys()
    assert config["config"]["rule"]["tau"] == 3


def test_the_center_file_loads_into_the_plain_model_and_scores_as_reported(run: Runner) -> None:
    summary = run(steps=300)
    model = models.build("mlp", shape=(1, 8, 8), classes=10)
    model.load_state_dict(safetensors.torch.load_file(Path(summary["folder"], "center.safetensors")), strict=True)
    dataset = data.load("digits")
    images, labels = dataset.test.read(np.arange(len(dataset.test)))
    with torch.no_grad():
        answers = model.eval()(torch.from_numpy(data.prepare(images, dataset))).argmax(1).numpy()
    assert (answers != labels).mean() == summary["test_error"] < 0.1


def test_the_center_is_evaluated_at_exact_rounds(run: Runner) -> None:
    """What a long run reports for step T is what a run of T steps ends with."""
    long = run(steps=60, eval_every=20, workers=3, rule=EASGD(tau=7))
    events = {event["t"]: event for event in metrics.read(long["folder"]) if event["kind"] == "center"}
    assert sorted(events) == [0, 20, 40, 60]
    for t in (20, 40):
        short = run(steps=t, workers=3, rule=EASGD(tau=7))
        assert events[t]["test_loss"] == short["test_loss"]
        assert events[t]["train_loss"] == short["train_loss"]


def test_evaluation_time_is_not_training_time(run: Runner) -> None:
    summary = run(steps=100, eval_every=2)
    events = [event for event in metrics.read(summary["folder"]) if event["kind"] == "center"]
    assert summary["evaluate_s"] == pytest.approx(sum(event["evaluate_s"] for event in events))
    began = Path(summary["folder"], "config.json").stat().st_mtime
    ended = Path(summary["folder"], "metrics.jsonl").stat().st_mtime
    in_training = sum(event["evaluate_s"] for event in events[1:-1])
    assert summary["seconds"] <= ended - began - in_training


def test_the_clock_stops_when_the_last_worker_holds_and_not_when_the_launcher_sees_that(run, monkeypatch) -> None:
    stops: list[tuple[float | None, float]] = []

    class Watched(Clock):
        def stop(self, at_s: float | None = None) -> None:
            stops.append((at_s, time.perf_counter()))
            super().stop(at_s)

    monkeypatch.setattr("easgd_local.run.Clock", Watched)
    began = time.perf_counter()
    run(steps=60, eval_every=20)
    held = [(at_s, now) for at_s, now in stops if at_s is not None]
    assert held and all(began < at_s < now for at_s, now in held)

    clock = Clock(2.0)
    began = time.perf_counter()
    clock.start()
    started = time.perf_counter()
    clock.stop(started + 5.0)
    assert 7.0 <= clock.seconds <= 7.0 + started - began + 1e-6


@pytest.mark.parametrize("buffers", ["average", "recalibrate"])
def test_the_center_of_a_network_with_batch_norm_has_statistics_of_its_own(buffers: str, run: Runner) -> None:
    summary = run(
        data="synthetic", model="shufflenet_v2_x0_5", rule=EASGD(tau=1, lr=0.05), batch_size=16, buffers=buffers,
        steps=25 if buffers == "recalibrate" else 8, eval_samples=250,
    )  # fmt: skip
    state = safetensors.torch.load_file(Path(summary["folder"], "center.safetensors"))
    assert state["conv1.1.running_mean"].abs().max() > 0.01  # not those of a fresh model
    assert state["conv1.1.num_batches_tracked"].dtype == torch.int64
    if buffers == "recalibrate":  # the running average of the other policy would still be far behind
        assert summary["test_error"] < 0.8


def test_a_run_in_bf16_and_one_with_independent_sampling_learn(run: Runner) -> None:
    assert run(steps=200, precision="bf16")["test_error"] < 0.2
    assert run(steps=200, precision="bf16-true")["test_error"] < 0.2
    assert run(steps=200, sampling="independent")["test_error"] < 0.2


def test_channels_last_and_the_precision_reach_the_workers_plan_and_a_run_ends(tmp_path: Path, run: Runner) -> None:
    small = {"model": "cifar7", "data": "synthetic", "steps": 2, "batch_size": 4, "eval_every": 0}
    how = {"channels_last": True, "precision": "bf16"}
    with prepare(Config(rule=EASGD(), out=str(tmp_path / "plan"), **{**small, **how})) as prepared:
        assert prepared.plan.computing == Computing("bf16", True)
    assert run(**small, **how)["status"] == "done"
