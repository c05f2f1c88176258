"""What does training lose to the exchange on a GPU?

p workers share GPU 0 and train by EASGD as `easgd-local train` does, on random pictures that lie on the device, at
τ = 1, 10 and 64, with the exchange beside the gradient (`overlap`) and before it (`inline`). The bound is the same
workers with τ so large that they never meet. `step_s` is from one moment at which nothing is enqueued to another, over
the steps between, and `lost` the part of a step that the bound does without. Workers that share a GPU take turns on it
by the driver's slices of time, so only p = 1 says what a worker with a GPU of its own loses.

The model is torchvision's ResNet-50, 25.6 million parameters. bfloat16, channels last, and as `train` does it only
kernels that give the same bits every time; with --nondeterministic the fastest that cuDNN finds, for steps that leave
the exchange less room.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import harness
import numpy as np
from link import about, graphics_for, record

from easgd_local import models
from easgd_local.center import Center, Layout
from easgd_local.computing import Computing
from easgd_local.data import Dataset, MemorySplit
from easgd_local.devices import OnGpu
from easgd_local.flat import Flat
from easgd_local.gradient import Gradient
from easgd_local.graphics import Graphics
from easgd_local.learning_rate import LearningRate
from easgd_local.rules.easgd import EASGD
from easgd_local.schedules import Calendar
from easgd_local.worker import TrainingPlan, Worker

QUESTION = "What does training lose to the exchange on a GPU?"
NEVER = 2**30  # a period that no run reaches
BOUND, FEW = (NEVER, "overlap"), ((1, "overlap"), (10, "overlap"))
SETTINGS = {1: (BOUND, *FEW, (64, "overlap"), (1, "inline"), (10, "inline")), 4: (BOUND, *FEW)}  # by p
QUICK_SETTINGS = {2: (BOUND, FEW[0])}
LEAST_STEPS, QUICK_STEPS = 60, 4  # of one repetition, which are whole periods
REPETITIONS, QUICK_REPETITIONS = 5, 2
BATCH, SIDE, STORED, PICTURES = 64, 224, 232, 512
QUICK_BATCH, QUICK_SIDE = 4, 8
PATIENCE_S = 300.0

Setting = tuple[int, str]  # τ and the way of exchanging


def network(shape: tuple[int, int, int], classes: int) -> Any:
    """ResNet-50; a small network for small pictures."""
    from torchvision.models import resnet50

    if shape[1] < SIDE:
        return models.build("mlp", shape=shape, classes=classes)
    return resnet50(num_classes=classes)


def pictures(quick: bool) -> Dataset:
    """Random ones."""
    stored = QUICK_SIDE if quick else STORED
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (PICTURES, 3, stored, stored), np.uint8)
    split = MemorySplit(images, rng.integers(0, 10, PICTURES))
    crop = None if quick else SIDE
    return Dataset("random", split, split, tuple("0123456789"), scale=1 / 255, crop=crop, flip=not quick)


def plan_for(layout: Layout, graphics: Graphics, tau: int, given: Any) -> TrainingPlan:
    """What the workers of one setting agree on."""
    computing = Computing()
    if not graphics.pretended:
        computing = Computing(
            "bf16", True, "cuda", deterministic=not given.nondeterministic, pictures_on_device=True
        )  # fmt: skip
    return TrainingPlan(
        rule=EASGD(tau=tau, lr=1e-3), learning_rate=LearningRate("constant", 1e-3, NEVER),
        calendar=Calendar(tau, NEVER), layout=layout, turns="strict", buffers="average", threads=1, seed=0,
        folder=Path(), report_every=NEVER, graphics=graphics, model="", shape=(3, SIDE, SIDE), classes=10,
        batch_size=QUICK_BATCH if given.quick else BATCH, sampling="independent", weight_decay=1e-4,
        computing=computing, evaluation_samples=1,
    )  # fmt: skip


def measure(graphics: Graphics, workers: int, settings: tuple[Setting, ...], given: Any) -> Iterator[harness.Row]:
    """Rows for p = workers, one a setting; the bound is the first of them."""
    n = Flat(network(pictures(given.quick).input_shape, 10)).n
    bound = None
    for setting in settings:  # each has a center and processes of its own: all at once would not fit every GPU
        with Center.create(Layout(workers, n)) as center:
            times = together(center, graphics, setting, given)
        bound = bound or times
        yield row(workers, n, setting, given.nondeterministic, times, bound)


def together(center: Center, graphics: Graphics, setting: Setting, given: Any) -> list[float]:
    """Seconds of a step in each repetition, the mean over the workers."""
    context = mp.get_context("spawn")
    workers, barrier = center.layout.workers, context.Barrier(center.layout.workers)
    pipes = [context.Pipe() for _ in range(workers)]
    path = f"/proc/{os.getpid()}/fd/{center.fd}"
    processes = [
        context.Process(
            target=work, args=(rank, path, center.layout, graphics, setting, given, barrier, theirs)
        )
        for rank, (_, theirs) in enumerate(pipes)
    ]  # fmt: skip
    try:
        for process in processes:
            process.start()
        told = []
        for ours, theirs in pipes:
            theirs.close()
            told.append(ours.recv() if ours.poll(PATIENCE_S) else [])
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert all(told), "a worker has not ended in time"
    return [statistics.fmean(times) for times in zip(*told, strict=True)]


def work(
    rank: int, path: str, layout: Layout, graphics: Graphics, setting: Setting, given: Any, barrier: Barrier,
    conn: Connection,
) -> None:  # fmt: skip
    """One worker: warms up, then times; sends seconds of a step."""
    tau, exchange = setting
    repetitions = given.repetitions or (QUICK_REPETITIONS if given.quick else REPETITIONS)
    steps = QUICK_STEPS if given.quick else LEAST_STEPS if tau == NEVER else tau * -(-LEAST_STEPS // tau)
    plan = plan_for(layout, replace(graphics, exchange=exchange), tau, given)
    plan.computing.set_up()
    center = Center.attach(layout, os.open(path, os.O_RDWR))
    dataset = pictures(given.quick)
    place = OnGpu(center, rank, plan.calendar, replace(graphics, exchange=exchange))
    sampler = plan.sampler(rank, len(dataset.train))
    gradient = Gradient(
        network(dataset.input_shape, 10), dataset, sampler, rank=rank, weight_decay=plan.weight_decay,
        computing=plan.computing, memory=place,
    )  # fmt: skip
    worker = Worker(rank, center, plan, gradient, lambda *words, **values: None, 0, place)
    worker.warm_up()
    worker.take_up(None)
    timed(worker, steps, barrier)
    conn.send([timed(worker, steps, barrier) / steps for _ in range(repetitions)])
    barrier.wait(PATIENCE_S)
    worker.close(drained=True)


def timed(worker: Worker, steps: int, barrier: Barrier) -> float:
    """Seconds of so many steps, all workers beginning together, until nothing is enqueued."""
    worker.drain()
    barrier.wait(PATIENCE_S)
    began = time.perf_counter()
    for _ in range(steps):
        worker.make_step()
        worker.t += 1
    worker.drain()
    return time.perf_counter() - began


def row(
    workers: int, n: int, setting: Setting, nondeterministic: bool, times: list[float], bound: list[float]
) -> harness.Row:
    """One setting; what it loses is taken against the median of the bound."""
    tau, exchange = setting
    base = statistics.median(bound)
    name = "no exchange" if tau == NEVER else f"tau = {tau}, {exchange}"
    return {
        "entry": f"p = {workers} on one GPU, {name}{', nondeterministic' if nondeterministic else ''}",
        "workers": workers, "floats": n, "step_s": harness.spread(times),
        "lost": harness.spread(1 - base / one for one in times),
    }  # fmt: skip


def main() -> None:
    parser = harness.arguments(QUESTION)
    parser.add_argument("--nondeterministic", action="store_true", help="let cuDNN choose the fastest kernels")
    given = parser.parse_args()
    graphics = graphics_for("throughput_gpu", given)
    common = about("throughput_gpu", graphics)
    settings = QUICK_SETTINGS if given.quick else SETTINGS
    rows = (row for workers, chosen in settings.items() for row in measure(graphics, workers, chosen, given))
    record(rows, common, given)


if __name__ == "__main__":
    main()
