"""What is known of a comparison before its first run: do its values work on these data, what costs an evaluation?"""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from easgd_local import checks, hardware, models
from easgd_local.compare.rival_run import check_seats
from easgd_local.compare.settings import Comparison
from easgd_local.computing import Computing
from easgd_local.data import Dataset
from easgd_local.evaluate import evaluate
from easgd_local.flat import Flat
from easgd_local.gpus import find
from easgd_local.partition import share_out
from easgd_local.prepare import load


def look(comparison: Comparison, dataset: Dataset | None = None) -> Dataset:
    """Loads the data unless given, and builds the model once; `ValueError` for what cannot work, before anything is
    written."""
    config = comparison.template
    checks.gpu_flags(config)
    if config.device == "cuda":
        graphics = find()
        for one in comparison.entries:
            if one.is_rival:
                check_seats(one.label, comparison.workers(one), graphics)
    dataset = dataset or load(config)
    torch.manual_seed(config.seed)
    model = models.build(config.model, shape=dataset.input_shape, classes=len(dataset.classes))
    models.check(model, dataset.input_shape)
    checks.samples(replace(config, workers=comparison.most_workers), dataset)
    for one in comparison.entries:
        if one.rule.divides:
            share_out(Flat(model).layers, comparison.workers(one))  # says if there are too few
    if comparison.budget_s is not None and config.device != "cuda":  # what one costs there is not known in this process
        torch.set_num_threads(hardware.cores())
        computing, took_s = Computing(config.precision, config.channels_last), []
        model = computing.narrowed(model)
        for _ in range(3):
            began = time.perf_counter()
            evaluate(model, dataset, samples=config.eval_samples, computing=computing)
            took_s.append(time.perf_counter() - began)
        _check_budget(comparison.budget_s, min(took_s))
    return dataset


def _check_budget(budget_s: float, evaluation_s: float) -> None:
    if budget_s < evaluation_s:
        raise ValueError(
            f"budget={budget_s:g}s: one evaluation takes {evaluation_s:.2g} s here, and a run must be longer than "
            f"that to show anything; give a larger budget."
        )
