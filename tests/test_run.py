"""Whole runs in real processes: equal to the listings, equal to each other, and to themselves after an interruption."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from easgd_local import data, metrics, models
from easgd_local.backend.cpu import CpuOps, vector
from easgd_local.center import Layout
from easgd_local.config import Config
from easgd_local.flat import Flat
from easgd_local.gradient import Gradient
from easgd_local.rules.eamsgd import EAMSGD
from easgd_local.rules.easgd import EASGD
from easgd_local.rules.msgd import MSGD
from easgd_local.rules.sgd import SGD
from tests import paper

pytestmark = pytest.mark.usefixtures("nothing_left")
Runner = Callable[..., dict[str, Any]]


def listing(config: Config) -> str:
    """center_sha256 of the run that `config` describes, computed from the listing in this process."""
    torch.set_num_threads(1)
    dataset, workers = data.load(config.data), config.workers
    torch.manual_seed(config.seed)
    start = Flat(models.build(config.model, shape=dataset.input_shape, classes=len(dataset.classes))).values()
    gradients = []
    for rank in range(workers):
        model = models.build(config.model, shape=dataset.input_shape, classes=len(dataset.classes))
        sampler = data.shard(config.seed, rank, workers, config.batch_size, len(dataset.train))
        gradients.append(
            Gradient(model, dataset, sampler, rank=rank, weight_decay=config.weight_decay, precision=config.precision)
        )

    def gradient(i: int, t: int, x: np.ndarray) -> np.ndarray:
        point = vector(len(x))  # on a page, as a worker's vectors are
        point[:] = x
        return gradients[i](CpuOps(), t, point)

    layout = Layout(workers, len(start), ("c",), config.block_bytes)
    order = paper.round_robin(workers, [layout.block(b) for b in range(layout.blocks)])
    x, v, c = [start.copy() for _ in range(workers)], [np.zeros_like(start) for _ in range(workers)], start.copy()
    rule, steps = config.rule, range(config.steps)
    if isinstance(rule, EAMSGD):
        alpha = rule.moving_rate(workers)
        paper.eamsgd(
            x, v, c, gradient, eta=rule.lr, alpha=alpha, delta=rule.momentum, tau=rule.tau, steps=steps, order=order
        )
    elif isinstance(rule, EASGD):
        alpha = rule.moving_rate(workers)
        paper.easgd(x, c, gradient, eta=rule.lr, alpha=alpha, tau=rule.tau, steps=steps, order=order)
    elif isinstance(rule, MSGD):
        paper.msgd(c, v[0], gradient, eta=rule.lr, delta=rule.momentum, steps=steps)
    else:
        paper.sgd(c, gradient, eta=rule.lr, steps=steps)
    return hashlib.sha256(c.tobytes()).hexdigest()


# The listings. 17,226 parameters do not divide by 5 or 7 blocks of 64-byte lines; 1000-byte blocks make about 70.


@pytest.mark.parametrize(
    ("rule", "workers", "block_bytes"),
    [
        (EASGD(lr=0.1, tau=1, alpha=0.5), 2, 4 << 20),
        (EASGD(lr=0.1, tau=3, alpha=1.0), 3, 1000),
        (EASGD(lr=0.1, tau=3, alpha=0.0), 2, 1000),
        (EAMSGD(lr=0.03, tau=3, beta=0.9, momentum=0.8), 4, 1000),
        (EAMSGD(lr=0.03, tau=1, alpha=0.5, momentum=0.9), 3, 4 << 20),
        (SGD(lr=0.1), 1, 1000),
        (MSGD(lr=0.05, momentum=0.8), 1, 4 << 20),
    ],
)
def test_the_processes_compute_the_listing_to_the_bit(rule: Any, workers: int, block_bytes: int, run: Runner) -> None:
    values = {
        "rule": rule, "workers": workers, "steps": 14, "batch_size": 8, "block_bytes": block_bytes, "threads": 1,
        "seed": 5, "eval_every": 0,
    }  # fmt: skip
    assert run(**values)["center_sha256"] == listing(Config(**values))


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
    values = {"rule": EAMSGD(tau=tau), "workers": workers, "steps": 600, "eval_every": 20}
    whole = run(**values)
    folder = tmp_path / "stopped"
    thread = interrupt(folder, after=100)
    first = run(**values, out=str(folder))
    thread.join()
    assert first["status"] == "interrupted"
    assert 100 < first["steps"] < 600
    second = run(**values, resume=str(folder))
    assert second["status"] == "done"
    assert second["center_sha256"] == whole["center_sha256"]
    steps = [event["t"] for event in metrics.read(folder) if event["kind"] == "center"]
    assert steps == sorted(set(steps))  # the log goes on where it stopped, nothing twice


def test_a_run_goes_on_from_a_periodic_checkpoint_with_more_steps_as_if_it_had_never_ended(run: Runner) -> None:
    whole = run(steps=64)
    short = run(steps=40, checkpoint_every=15)
    assert [path.name for path in sorted(Path(short["folder"], "checkpoints").iterdir())] == [
        "step-00000015", "step-00000030", "step-00000040",
    ]  # fmt: skip
    longer = run(steps=64, checkpoint_every=15, resume=short["folder"])
    assert longer["center_sha256"] == whole["center_sha256"]


def test_a_run_killed_outright_resumes_from_its_last_checkpoint_to_the_same_center(tmp_path: Path, run: Runner) -> None:
    folder = tmp_path / "killed"
    values = {"steps": 800, "checkpoint_every": 50}
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


# What is measured and what is left behind


def test_the_run_folder_is_complete(run: Runner) -> None:
    summary = run(steps=40, eval_every=10, workers=3)
    folder = Path(summary["folder"])
    present = {path.name for path in folder.iterdir()}
    assert present == {
        "config.json", "metrics.jsonl", "summary.json", "center.safetensors", "curves.png", "report.md", "logs",
    }  # fmt: skip
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


@pytest.mark.parametrize("buffers", ["average", "recalibrate"])
def test_the_center_of_a_network_with_batch_norm_has_statistics_of_its_own(buffers: str, run: Runner) -> None:
    summary = run(
        data="synthetic", model="shufflenet_v2_x0_5", rule=EASGD(tau=1, lr=0.05), steps=25, batch_size=16,
        buffers=buffers, eval_samples=250,
    )  # fmt: skip
    state = safetensors.torch.load_file(Path(summary["folder"], "center.safetensors"))
    assert state["conv1.1.running_mean"].abs().max() > 0.01  # not those of a fresh model
    assert state["conv1.1.num_batches_tracked"].dtype == torch.int64
    if buffers == "recalibrate":  # the running average of the other policy is still far behind after 25 steps
        assert summary["test_error"] < 0.8


def test_a_run_in_bf16_and_one_with_independent_sampling_learn(run: Runner) -> None:
    assert run(steps=200, precision="bf16")["test_error"] < 0.2
    assert run(steps=200, sampling="independent")["test_error"] < 0.2
