"""How much cheaper is PASSM+'s partial step than a full one? Seconds and operations of one gradient, part by part.

The model is divided among four workers as PASSM+ divides it. The gradient of each part is timed in turn with the full
one, round after round, and `share_of_full_s` is taken within the round; `share_of_full_operations` is counted by
torch's FlopCounterMode. A worker of PASSM+ alternates full and partial steps, so its mean step is half-way between.

First the result is checked: the gradient of a part is that part of the full gradient, to the bit.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from harness import Row, about, arguments, record, spread
from torch.utils.flop_counter import FlopCounterMode

from easgd_local import data, models
from easgd_local.backend.cpu import CpuOps, vector
from easgd_local.flat import Flat
from easgd_local.gradient import Gradient
from easgd_local.partition import partition

WORKERS = 4
SETTINGS = {"cifar7": (3, 32, 32), "mlp": (1, 8, 8)}


def gradient_of(model: str, batch_size: int) -> Gradient:
    """The gradient of a built-in model on synthetic pictures."""
    dataset = data.make_synthetic(0, shape=SETTINGS[model], train_samples=4 * batch_size, test_samples=8)
    torch.manual_seed(0)
    net = models.build(model, shape=dataset.input_shape, classes=10)
    sampler = data.shard(0, 0, 1, batch_size, 4 * batch_size)
    return Gradient(net, dataset, sampler, rank=0, weight_decay=0.0)


def measure(model: str, batch_size: int, repetitions: int) -> list[Row]:
    """A row for the full step, and one for each part."""
    gradient, ops = gradient_of(model, batch_size), CpuOps()
    x = vector(gradient.n)
    x[:] = Flat(gradient.flat.model).values()
    layers = gradient.layers
    cut = partition([layer.stop - layer.start for layer in layers], WORKERS)
    parts = [None, *(slice(layers[part[0]].start, layers[part[-1]].stop) for part in cut)]
    check(gradient, x, parts)
    seconds = np.array([[seconds_of(gradient, ops, x, part) for part in parts] for _ in range(repetitions + 1)])[1:]
    operations = [operations_of(gradient, ops, x, part) for part in parts]
    return [
        {
            "entry": f"{model} {'full step' if part is None else f'part {number} of {WORKERS}'}",
            "batch_size": batch_size,
            "parameters": gradient.flat.parameters if part is None else part.stop - part.start,
            "step_s": spread(seconds[:, number]), "share_of_full_s": spread(seconds[:, number] / seconds[:, 0]),
            "share_of_full_operations": operations[number] / operations[0],
        }
        for number, part in enumerate(parts)
    ]  # fmt: skip


def check(gradient: Gradient, x: np.ndarray, parts: list[slice | None]) -> None:
    """Each partial gradient is the slice of the full one."""
    full = gradient(CpuOps(), 0, x).copy()
    for part in parts[1:]:
        assert part is not None
        assert np.array_equal(gradient(CpuOps(), 0, x, part)[part], full[part])


def seconds_of(gradient: Gradient, ops: CpuOps, x: np.ndarray, part: slice | None) -> float:
    """One gradient, timed."""
    began = time.perf_counter()
    gradient(ops, 0, x, part)
    return time.perf_counter() - began


def operations_of(gradient: Gradient, ops: CpuOps, x: np.ndarray, part: slice | None) -> int:
    """One gradient, counted."""
    with FlopCounterMode(display=False) as counter:
        gradient(ops, 0, x, part)
    return int(counter.get_total_flops())


def main() -> None:
    given = arguments("How much cheaper is PASSM+'s partial step than a full one?").parse_args()
    torch.set_num_threads(1)
    common = about("partial")
    models_and_batches = [("mlp", 32)] if given.quick else [("cifar7", 128)]
    rows = [row for one in models_and_batches for row in measure(*one, given.repetitions or (3 if given.quick else 21))]
    record(rows, common, given)


if __name__ == "__main__":
    main()
