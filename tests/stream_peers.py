"""One worker on a GPU, pretended or real, as a process of the fork server, which has imported torch already."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from easgd_local.backend.cuda import CudaOps, DeviceVector
from easgd_local.center import Center
from easgd_local.devices import OnGpu
from easgd_local.graphics import Graphics
from easgd_local.learning_rate import LearningRate
from easgd_local.rules import rule_class
from easgd_local.rules.base import Rule
from easgd_local.schedules import Calendar
from easgd_local.worker import TrainingPlan, Worker
from tests.threads import LAYERS, noisy_quadratic, plan_of


class DeviceGradients:
    """A made-up gradient: fetches the point, when the device has got there, and brings g back."""

    samples_per_step, loss = 1, 0.0

    def __init__(self, rank: int, place: OnGpu, n: int, function: str) -> None:
        self.n, self.buffers, self.layers = n, slice(n, n), list(LAYERS)
        self._rank, self._place, self._g, self._function = rank, place, place.gpu.allocate(n), FUNCTIONS[function]

    def __call__(self, ops: CudaOps, t: int, at: DeviceVector, only: slice | None = None) -> DeviceVector:
        self._place.touch([at], [self._g])  # as a model's forward pass has to
        x, g = (self._place.tensor(one) for one in (at, self._g))
        values = self._function(self._rank, t, x.cpu().numpy())
        if only is not None:
            values[: only.start] = values[only.stop :] = 0
        g.copy_(torch.from_numpy(values))
        return self._g

    def zero(self, ops: CudaOps) -> DeviceVector:
        ops.fill(self._g, 0.0)
        return self._g

    def close(self) -> None: ...


def noise(i: int, t: int, x: np.ndarray) -> np.ndarray:
    """A gradient that does not depend on x: sums are the same in every order, but for rounding."""
    return np.random.default_rng([i, t]).standard_normal(len(x)).astype(x.dtype)


FUNCTIONS = {"noisy quadratic": noisy_quadratic, "noise": noise}


def plan_for(
    rule: dict[str, Any], workers: int, steps: int, n: int, evaluate_every: int = 0, turns: str = "strict"
) -> TrainingPlan:
    made: Rule = rule_class(rule["name"])(**{name: value for name, value in rule.items() if name != "name"})
    rate = LearningRate("constant", made.lr, steps)
    plan = plan_of(made, workers, steps, n=n, block_bytes=64, turns=turns, rate=rate)
    object.__setattr__(plan, "calendar", Calendar(made.period, steps, evaluate_every=evaluate_every))
    return plan


def main(
    memory: str, environment: dict[str, str], found: Graphics, rank: int, dies_at: int | None = None, forgets: str = "",
    function: str = "noisy quadratic", exchange: str = "overlap", words: str = "memops", **values: Any,
) -> None:  # fmt: skip
    """Runs worker `rank` to its end, on the center in the file `memory`."""
    os.environ.update(environment)  # the fork server's is older
    plan = plan_for(**values)
    center = Center.attach(plan.layout, os.open(memory, os.O_RDWR))
    place = OnGpu(center, rank, plan.calendar, replace(found, exchange=exchange, words=words))
    gradient = DeviceGradients(rank, place, plan.layout.n, function)
    worker = Worker(rank, center, plan, gradient, lambda *args, **kwargs: None, 0, place)
    if forgets == "the turn":
        place._turns._words.wait = lambda stream, row, index, value: None  # type: ignore[method-assign]
    if forgets == "the exchange":
        place.ops.order = lambda reads, writes: None  # type: ignore[method-assign]
    worker.take_up(None)
    center.held[rank] = 1  # ready
    while not center.leave[0]:  # all set off together
        os.sched_yield()
    if dies_at is None:
        worker.run()
        place.close(drained=True)
        return
    while worker.t < dies_at:
        worker._rule.step(worker)
        worker.t += 1
    turns = worker.turns()
    next(turns)
    next(turns)  # some blocks of this exchange are enqueued
    os.kill(os.getpid(), 9)
