"""What does elastic averaging cost? Samples a second of two workers that meet every τ steps, against two that never do.

- easgd: one run of `easgd_local.train`, rule EASGD, p = 2, τ = 10.
- independent: the bound. Two runs of `easgd_local.train` at the same time, p = 1 each and no exchange after the first
  step: same model, data, batch, threads, code. `share_of_independent` is taken repetition by repetition.
- ddp: PyTorch's DistributedDataParallel over gloo, two processes, written as its users do.

All train the network cifar7 by plain SGD on the synthetic pictures (--quick: mlp on the digits), one thread a process.
The order of the three goes round from one repetition to the next. Start-up and evaluation are outside: the processes
say at what time they had done how many samples, and the rate is that of the time in which all of them were stepping.

First the result is checked: after every run the loss of each process has fallen below that of guessing.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from threading import Barrier
from typing import Any

import harness
import numpy as np

import easgd_local as easgd

WORKERS, TAU, CLASSES = 2, 10, 10
NEVER = 2**40
LR, WEIGHT_DECAY = 0.05, 1e-4
PATIENCE_S = 300.0
WARM_UP = 0.1  # share of the steps that are not counted


@dataclass(frozen=True)
class Setting:
    """What the three have in common."""

    data: str
    model: str
    steps: int
    batch_size: int


@dataclass(frozen=True)
class Course:
    """How one process went: it had done `samples[k]` samples at `times_s[k]`; its last reported loss."""

    times_s: list[float]
    samples: list[int]
    loss: float


def run_easgd(pool: ProcessPoolExecutor, setting: Setting) -> list[Course]:
    """Two workers and their center."""
    return pool.submit(train, easgd.EASGD(lr=LR, tau=TAU), WORKERS, setting, 0, None).result()


def run_independent(pool: ProcessPoolExecutor, setting: Setting) -> list[Course]:
    """Two runs of one worker each, at the same time."""
    alone = easgd.EASGD(lr=LR, tau=NEVER, alpha=0.0)
    with get_context("spawn").Manager() as manager:
        together = manager.Barrier(WORKERS)
        runs = [pool.submit(train, alone, 1, setting, seed, together) for seed in range(WORKERS)]
        return [course for run in runs for course in run.result()]


def run_ddp(pool: ProcessPoolExecutor, setting: Setting) -> list[Course]:
    """PyTorch's own."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        return [one.result() for one in [pool.submit(train_ddp, rank, meeting, setting) for rank in range(WORKERS)]]


ENTRIES: dict[str, Callable[[ProcessPoolExecutor, Setting], list[Course]]] = {
    "independent": run_independent, "easgd": run_easgd, "ddp": run_ddp,
}  # fmt: skip


def train(rule: Any, workers: int, setting: Setting, seed: int, together: Barrier | None) -> list[Course]:
    """A run of this package as a user starts it; the course of each worker, from its reports.

    Runs that are to be timed `together` wait for each other after the evaluation of the start, just before stepping.
    """
    reports: dict[int, list[tuple[float, int, float]]] = defaultdict(list)

    def listen(event: dict[str, Any]) -> None:
        if event["kind"] == "center" and event["t"] == 0 and together is not None:
            together.wait(PATIENCE_S)
        if event["kind"] == "worker":
            reports[event["rank"]].append((time.perf_counter(), event["samples"], event["loss"]))

    with tempfile.TemporaryDirectory() as folder:
        config = easgd.Config(
            rule=rule, workers=workers, data=setting.data, model=setting.model, batch_size=setting.batch_size,
            steps=setting.steps, threads=1, weight_decay=WEIGHT_DECAY, seed=seed, eval_every=0, eval_samples=1,
            out=str(Path(folder) / "run"),
        )  # fmt: skip
        summary = easgd.train(config, listeners=[listen])
    assert summary["status"] == "done", summary
    return [course(reports[rank]) for rank in range(workers)]


def train_ddp(rank: int, meeting: str, setting: Setting) -> Course:
    """One process of DistributedDataParallel."""
    import torch
    import torch.distributed as dist
    from torch.nn import functional as F
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    from easgd_local import data, models

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    loaded = data.load(setting.data)
    pictures, labels = loaded.train.read(np.arange(len(loaded.train)))
    dataset = TensorDataset(loaded.scale * torch.from_numpy(pictures), torch.from_numpy(labels))
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORKERS)
    try:
        model = DistributedDataParallel(models.build(setting.model, shape=loaded.input_shape, classes=CLASSES))
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
        sampler = DistributedSampler(dataset)
        loader = DataLoader(dataset, setting.batch_size, sampler=sampler, drop_last=True)
        reports, losses, step = [], [], 0
        for epoch in range(math.ceil(setting.steps / len(loader))):
            sampler.set_epoch(epoch)
            for inputs, targets in loader:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs), targets)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                step += 1
                if step % report_every(setting) == 0:
                    reports.append((time.perf_counter(), step * setting.batch_size, float(np.mean(losses))))
                    losses.clear()
                if step == setting.steps:
                    break
    finally:
        dist.destroy_process_group()
    return course(reports)


def report_every(setting: Setting) -> int:
    """Steps from one report to the next, as `easgd_local.train` makes them."""
    return max(1, setting.steps // 100)


def course(reports: list[tuple[float, int, float]]) -> Course:
    """Its reports as columns."""
    times_s, samples, losses = zip(*reports, strict=True)
    return Course(list(times_s), list(samples), losses[-1])


def samples_per_s(courses: list[Course]) -> float:
    """Of all together, from when the last has warmed up to when the first is done."""
    began = max(one.times_s[math.ceil(WARM_UP * len(one.times_s))] for one in courses)
    ended = min(one.times_s[-1] for one in courses)
    assert ended > began, "the processes did not step at the same time: give more --steps"
    done = [np.interp((began, ended), one.times_s, one.samples) for one in courses]
    return sum(float(after - before) for before, after in done) / (ended - began)


def measure(setting: Setting, repetitions: int, *, learns: bool) -> list[harness.Row]:
    """Rows of the three entries."""
    rates: dict[str, list[float]] = {name: [] for name in ENTRIES}
    names = list(ENTRIES)
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        for repetition in range(repetitions):
            turn = repetition % len(names)
            for name in names[turn:] + names[:turn]:
                courses = ENTRIES[name](pool, setting)
                assert len(courses) == WORKERS
                for one in courses:
                    assert one.samples[-1] == setting.steps * setting.batch_size, f"{name}: {one.samples[-1]} samples"
                    assert not learns or one.loss < math.log(CLASSES), f"{name} has not learnt: loss {one.loss}"
                rates[name].append(samples_per_s(courses))
    bound = np.array(rates["independent"])
    return [
        {
            "entry": name, "workers": WORKERS, "data": setting.data, "model": setting.model, "steps": setting.steps,
            "batch_size": setting.batch_size,
            "samples_per_s": harness.spread(rates[name]),
            "step_s": harness.spread(WORKERS * setting.batch_size / np.array(rates[name])),
            "share_of_independent": harness.spread(np.array(rates[name]) / bound),
        }
        for name in names
    ]  # fmt: skip


def main() -> None:
    parser = harness.arguments("What does elastic averaging cost in samples a second?")
    parser.add_argument("--steps", type=int, help="steps of each process; default 200")
    parser.add_argument("--batch-size", type=int, help="samples of a step; default 32")
    given = parser.parse_args()
    if given.quick:
        setting, repetitions = Setting("digits", "mlp", given.steps or 200, given.batch_size or 32), 1
    else:
        setting, repetitions = Setting("synthetic", "cifar7", given.steps or 200, given.batch_size or 32), 9
    common = harness.about("throughput")
    rows = measure(setting, given.repetitions or repetitions, learns=not given.quick)
    harness.record(rows, common, given)


if __name__ == "__main__":
    main()
