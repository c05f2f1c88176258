"""How good is the center of a network with BatchNorm under each policy for its statistics? Test error on the digits.

The loop is a user's own under `launch`: a perceptron with BatchNorm, SGD at η = 0.1, batches of 32, four workers, after
two epochs, where the averaged statistics still lag behind, and after ten. The same seeds for all; with the same seed
the same start and the same batches.
"""

from __future__ import annotations

import tempfile
from itertools import product
from pathlib import Path

import torch
from harness import Row, about, arguments, record, spread
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import easgd_local as easgd
from easgd_local import data
from easgd_local.attachment import BUFFERS

RULES = {"EASGD": easgd.EASGD(tau=10), "LocalSGD": easgd.LocalSGD(tau=10)}


def digits() -> list[TensorDataset]:
    """For training and for testing."""
    known = data.load("digits")
    return [
        TensorDataset(torch.from_numpy(data.prepare(split.images, known)), torch.from_numpy(split.labels))
        for split in (known.train, known.test)
    ]


def test_error(model: nn.Module) -> dict[str, float]:
    inputs, targets = digits()[1].tensors
    return {"test_error": float((model(inputs).argmax(1) != targets).float().mean())}


def loop(worker: easgd.LoopWorker, rule: easgd.Rule, policy: str, epochs: int) -> None:
    # torch's generator is seeded by the run's seed and the rank; all start from worker 0's values.
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainset = digits()[0]
    batches = DataLoader(trainset, batch_size=100) if policy == "recalibrate" else None
    worker.attach(model, optimizer, rule, buffers=policy, calibrate_on=batches, evaluate=test_error)
    loader = worker.loader(trainset, 32)
    for _ in range(epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()


def measure(name: str, policy: str, epochs: int, workers: int, seeds: range) -> Row:
    """One row: all seeds."""
    errors = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            center = easgd.launch(
                loop, workers=workers, args=(RULES[name], policy, epochs), seed=seed, threads=1, view=False,
                out=Path(folder, "run"),
            )  # fmt: skip
        errors.append(center.summary["scores"]["test_error"])
    return {
        "entry": f"{name}, {policy}, {epochs} epochs", "workers": workers, "tau": RULES[name].tau,
        "steps": center.summary["steps"], "test_error": spread(errors),
    }  # fmt: skip


def main() -> None:
    given = arguments("How good is the center of a network with BatchNorm under each policy?").parse_args()
    common = about("buffers")
    lengths, workers = ((1,), 2) if given.quick else ((2, 10), 4)
    seeds = range(given.repetitions or (1 if given.quick else 10))
    settings = product(lengths, list(RULES)[: 1 if given.quick else None], BUFFERS)
    record((measure(name, policy, epochs, workers, seeds) for epochs, name, policy in settings), common, given)


if __name__ == "__main__":
    main()
