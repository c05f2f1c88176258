"""Training functions for `launch` whose losses are quadratic: linear models with least squares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from easgd_local.loop import LoopWorker
from easgd_local.rules.base import Rule

START, TARGET = 3.0, 1.0


def features(curvatures: Sequence[float]) -> Tensor:
    """X, diagonal, with (1/m) XᵀX = diag(h) up to rounding; m is a power of 2, so the mean over rows adds none."""
    m = len(curvatures)
    assert m & (m - 1) == 0
    return torch.diag((m * torch.tensor(curvatures, dtype=torch.float64)).sqrt()).float()


def coordinates(model: nn.Module) -> dict[str, Any]:
    """The weights, exactly."""
    return {f"w{number}": value for number, value in enumerate(next(model.parameters()).flatten().double())}


def full_batches(
    worker: LoopWorker, rule: Rule, lr: float, curvatures: Sequence[float], steps: int, apart: float
) -> None:
    """Least squares on all of the data: Σ_j h_j (w_j - w*)²/2. Worker i aims at w* = TARGET + i·apart."""
    x = features(curvatures)
    y = x.sum(1) * (TARGET + worker.rank * apart)
    model = nn.Linear(len(curvatures), 1, bias=False)
    nn.init.constant_(model.weight, START)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    worker.attach(model, optimizer, rule, evaluate=coordinates, evaluate_every=1)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x).squeeze(1) - y).square().mean().div(2).backward()
        optimizer.step()


def moments(model: nn.Module) -> dict[str, Any]:
    """Mean and variance over the coordinates, each an experiment of its own."""
    offsets = next(model.parameters()).double() - TARGET
    return {"mean": offsets.mean(), "variance": offsets.var()}


def minibatches(worker: LoopWorker, rule: Rule, lr: float, h: float, sigma: float, copies: int, steps: int) -> None:
    """So many copies of the noisy quadratic at once: a step sees one sample, whose target has noise for each copy."""
    model = nn.Linear(1, copies, bias=False)
    nn.init.constant_(model.weight, START)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    worker.attach(model, optimizer, rule, evaluate=moments, evaluate_every=1)
    x = torch.full((1, 1), h**0.5)
    for _ in range(steps):
        noise = torch.randn(1, copies, generator=worker.generator) * (sigma / h**0.5)
        optimizer.zero_grad()
        (model(x) - x * TARGET - noise).square().sum().div(2).backward()  # g = h (w - w*) - √h·noise
        optimizer.step()
