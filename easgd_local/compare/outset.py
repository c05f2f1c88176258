"""What is known of a comparison before its first run: do its values work on these data, what costs an evaluation?"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from easgd_local import data, hardware, models
from easgd_local.compare.settings import Comparison
from easgd_local.evaluate import evaluate
from easgd_local.flat import Flat
from easgd_local.partition import partition
from easgd_local.prepare import load


@dataclass(frozen=True)
class Outset:
    """Facts of the data and of the model: lengths of the training and the test set, parameters."""

    train_samples: int
    test_samples: int
    parameters: int


def look(comparison: Comparison) -> Outset:
    """Loads the data and builds the model once; `ValueError` for what cannot work, before anything is written."""
    config = comparison.template
    dataset = load(config)
    torch.manual_seed(config.seed)
    model = models.build(config.model, shape=dataset.input_shape, classes=len(dataset.classes))
    models.check(model, dataset.input_shape)
    order = data.shard if config.sampling == "shard" else data.independent
    order(config.seed, 0, comparison.workers, config.batch_size, len(dataset.train))  # says when there are too few
    if any(one.rule.divides for one in comparison.entries):
        partition([entry.stop - entry.start for entry in Flat(model).trained], comparison.workers)  # says if too few
    if comparison.budget_s is not None:
        torch.set_num_threads(hardware.cores())
        took_s = []
        for _ in range(3):
            began = time.perf_counter()
            evaluate(model, dataset, samples=config.eval_samples, precision=config.precision)
            took_s.append(time.perf_counter() - began)
        _check_budget(comparison.budget_s, min(took_s))
    return Outset(len(dataset.train), len(dataset.test), sum(one.numel() for one in model.parameters()))


def _check_budget(budget_s: float, evaluation_s: float) -> None:
    if budget_s < evaluation_s:
        raise ValueError(
            f"budget={budget_s:g}s: one evaluation takes {evaluation_s:.2g} s here, and a run must be longer than "
            f"that to show anything; give a larger budget."
        )
