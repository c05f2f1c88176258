"""Evaluation of the center on a copy, in a process of its own: no worker's weights or random state are touched."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from easgd_local import calibrate, data, hardware, models
from easgd_local.backend.cpu import vector
from easgd_local.center import Center
from easgd_local.computing import USUAL, Computing
from easgd_local.data import Dataset, Split
from easgd_local.flat import Flat
from easgd_local.worker import TrainingPlan

BATCH = 250  # for statistics
SCORED_AT_ONCE = 125  # small enough that activations stay near the processor


@dataclass(frozen=True)
class Scores:
    """Mean cross-entropy without the weight decay term, and the fraction of wrong answers."""

    train_loss: float
    test_loss: float
    test_error: float


def evaluate(model: nn.Module, dataset: Dataset, *, samples: int, computing: Computing = USUAL) -> Scores:
    """Scores of `model` on `samples` evenly spaced training samples, centrally cropped, and on the whole test set."""
    model.eval()
    train_loss, _ = _score(model, dataset, dataset.train, evenly_spaced(len(dataset.train), samples), computing)
    test_loss, test_error = _score(model, dataset, dataset.test, np.arange(len(dataset.test)), computing)
    return Scores(train_loss, test_loss, test_error)


def recalibrate(model: nn.Module, dataset: Dataset, *, samples: int, computing: Computing = USUAL) -> None:
    """Replaces the running statistics of every BatchNorm by the mean of those of batches of training samples.

    Each batch is spread over the whole set, since folders of pictures come class by class and a batch of one class
    varies too little.
    """
    indices = evenly_spaced(len(dataset.train), samples)
    batches = -(-len(indices) // BATCH)
    pictures = dataset.train.stream(indices[first::batches] for first in range(batches))
    calibrate.recalibrate(model, (computing.inputs(data.prepare(images, dataset)) for images, _ in pictures))


def evenly_spaced(count: int, samples: int) -> NDArray[np.int64]:
    """At most `samples` indices below `count`, evenly spaced."""
    return np.arange(min(samples, count)) * count // min(samples, count)


@torch.no_grad()
def _score(
    model: nn.Module, dataset: Dataset, split: Split, indices: NDArray[np.int64], computing: Computing
) -> tuple[float, float]:
    loss, wrong = 0.0, 0
    for images, labels in split.stream(_batches(indices)):
        targets = data.to_device(torch.from_numpy(labels), torch.device(computing.device))
        with computing.context():
            answers = model(computing.inputs(data.prepare(images, dataset))).float()
        loss += F.cross_entropy(answers, targets, reduction="sum").item()
        wrong += int((answers.argmax(1) != targets).sum())
    return loss / len(indices), wrong / len(indices)


def _batches(indices: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return [indices[start : start + SCORED_AT_ONCE] for start in range(0, len(indices), SCORED_AT_ONCE)]


def main(conn: Connection, fds: list[int], plan: TrainingPlan, description: dict[str, Any]) -> None:
    """The evaluator process: for each question copies the center's snapshot, says "taken", answers with scores.

    The workers are held meanwhile, so it may use all the cores, and the first GPU where they use GPUs.
    """
    torch.set_num_threads(hardware.cores())
    plan.computing.set_up()
    center = Center.attach(plan.layout, fds[0])
    dataset = data.from_memfd(fds[1] if len(fds) > 1 else None, description)
    device = torch.device(plan.computing.device)
    model = models.build(plan.model, shape=plan.shape, classes=plan.classes).to(device)
    flat = Flat(plan.computing.narrowed(model))
    copy = vector(flat.n)
    x = torch.from_numpy(copy).to(device)  # the same memory on the CPU
    flat.bind(x)
    conn.send(("ready",))
    while conn.recv() is not None:
        np.copyto(copy, center.snapshot[plan.rule.reported])
        np.copyto(copy[flat.buffers], center.snapshot["c"][flat.buffers])
        conn.send(("taken",))
        began = time.perf_counter()
        x.copy_(torch.from_numpy(copy))
        flat.halves.round()
        if plan.buffers == "recalibrate":
            recalibrate(model, dataset, samples=plan.evaluation_samples, computing=plan.computing)
        scores = evaluate(model, dataset, samples=plan.evaluation_samples, computing=plan.computing)
        statistics = x[flat.buffers].cpu().numpy().copy()
        conn.send(("evaluated", asdict(scores), statistics, time.perf_counter() - began))
