"""One worker process of the built-in training loop: model and data, and the loop around a rule's `step`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np
import torch

from easgd_local import data, faults, models
from easgd_local.backend.cpu import CpuOps, Vector
from easgd_local.center import Center
from easgd_local.computing import Computing
from easgd_local.devices import Place, place_of
from easgd_local.gradient import Gradient
from easgd_local.learning_rate import LearningRate
from easgd_local.loss_scale import STATE as LOSS_SCALE
from easgd_local.optimizers import STEPS, Optimizer
from easgd_local.partition import share_out
from easgd_local.plan import Plan, Start, Stopped
from easgd_local.turns import Aborted
from easgd_local.visitor import Visitor


class GradientOf(Protocol):
    """What a worker needs to know of its model and data."""

    n: int
    buffers: slice
    loss: Any
    loss_scale: Any
    samples_per_step: int

    @property
    def layers(self) -> list[slice]: ...
    def __call__(self, ops: CpuOps, t: int, at: Vector, only: slice | None = None) -> Vector: ...
    def zero(self, ops: CpuOps) -> Vector: ...
    def warm_up(self, ops: CpuOps, t: int, at: Vector) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class TrainingPlan(Plan):
    """And what the built-in training loop needs besides: a function of the configuration."""

    learning_rate: LearningRate
    model: str
    shape: tuple[int, int, int]
    classes: int
    batch_size: int
    sampling: str
    weight_decay: float
    computing: Computing
    evaluation_samples: int

    def sampler(self, rank: int, samples: int) -> data.Sampler:
        """The order of samples of worker `rank`."""
        return data.SAMPLINGS[self.sampling](self.seed, rank, self.layout.workers, self.batch_size, samples)


class Worker(Visitor):
    """What a rule may touch: x, c and its other named vectors, the clock t, `grad`, `turns` and the operations."""

    _plan: TrainingPlan

    def __init__(
        self,
        rank: int,
        center: Center,
        plan: TrainingPlan,
        gradient: GradientOf,
        post: Callable[..., None],
        t: int,
        place: Place | None = None,
    ) -> None:
        rule, buffers = plan.rule, gradient.buffers
        super().__init__(rank, center, plan, buffers, post, t, kept=rule.local, scratch=rule.scratch, place=place)
        self._gradient = gradient
        if rule.optimizer:
            self._start_optimizer()
        if plan.computing.scales_loss:
            gradient.loss_scale = self._kept[LOSS_SCALE] = self._place.vector(2)

    def _start_optimizer(self) -> None:
        rule, trained = self._rule, slice(0, self._gradient.layers[-1].stop)
        self._kept[STEPS] = self._place.vector(1)
        state = {name: self._kept[name][trained] for name in rule.local} | {STEPS: self._kept[STEPS]}
        decay = self._plan.weight_decay if rule.decoupled else 0.0
        self._optimizer, self._trained = Optimizer(rule.optimizer, self.x[trained], state, decay, self._place), trained

    # What rules use

    @property
    def lr(self) -> float:
        """η at the present t."""
        return self._plan.learning_rate(self.t)

    @cached_property
    def own(self) -> slice:
        """The coordinates of the layers that this worker owns."""
        return share_out(self._gradient.layers, self.workers)[self.rank]

    def grad(self, at: Vector | None = None, only: slice | None = None) -> Vector:
        """g at `at` (default x) on the minibatch of clock t, or some coordinates of it. Read-only; valid until the next
        call."""
        point = self._kept["x"] if at is None else at
        if self._reloaded_at == self.t:  # the point is what it was before it was reloaded
            return self._gradient.zero(self.ops)
        if point is not self.x:  # buffers such as running statistics are part of x wherever the gradient is taken
            self.ops.copy(point[self._gradient.buffers], self.x[self._gradient.buffers])
        g = self._gradient(self.ops, self.t, point, only)
        if point is not self.x:
            self.ops.copy(self.x[self._gradient.buffers], point[self._gradient.buffers])
        return g

    def optimize(self, g: Vector) -> None:
        """One step of the rule's local torch optimizer on the trainable part of x, with g."""
        self._optimizer.step(g[self._trained], self.lr)

    def _begin(self) -> None:
        self._rule.begin(self)

    def warm_up(self) -> None:
        """A gradient that moves nothing, before `take_up`: compiles and loads what the device needs before there is
        anything on it that waits for other workers."""
        self._gradient.warm_up(self.ops, self.t, self.x)
        self.drain()

    # The loop

    @property
    def samples_per_step(self) -> int | None:
        return self._gradient.samples_per_step

    def make_step(self) -> None:
        """One step of the rule, on a GPU only enqueued; the clock stays."""
        self._rule.step(self)
        self._draw_buffers()
        self._place.step_made()

    def run(self) -> None:
        """Steps until the calendar's last; raises `Stopped` after saving its state when the launcher asks for that."""
        plan = self._plan
        while self.t < plan.calendar.steps:
            self._boundary()
            began = time.perf_counter() - self._turns.wait_s
            if faults.due(plan.faults, "nan", self.rank, self.t):
                self.ops.fill(self.x[: self._gradient.n // 2], float("nan"))
            self.make_step()
            self._count_step(self._gradient.loss)
            self._report_now_and_then()
            faults.keep_pace(plan.faults, self.rank, self.t, time.perf_counter() - self._turns.wait_s - began)
        self._boundary()
        self._made_last = True
        self._settle()
        self._report()
        self._post("finished")
        self._linger()


def main(
    conn: Connection, fds: list[int], rank: int, plan: TrainingPlan, description: dict[str, Any], start: Start
) -> None:
    """The worker process: sets up, says "ready", waits for the word to go, steps to the end, says how it ended."""
    torch.set_num_threads(plan.threads)
    plan.computing.set_up()
    center = Center.attach(plan.layout, fds[0])
    dataset = data.from_memfd(fds[1] if len(fds) > 1 else None, description)
    model = models.build(plan.model, shape=plan.shape, classes=plan.classes)
    sampler = plan.sampler(rank, len(dataset.train))
    place = place_of(center, rank, plan.calendar, plan.graphics)
    gradient = Gradient(
        model, dataset, sampler, rank=rank, computing=plan.computing, memory=place,
        weight_decay=0.0 if plan.rule.decoupled else plan.weight_decay,
    )  # fmt: skip

    def post(kind: str, *args: Any, **values: Any) -> None:
        conn.send((kind, *args, values) if values else (kind, *args))

    if plan.computing.device != "cpu":
        warnings.showwarning = _telling(post, warnings.showwarning)
    worker, drained = Worker(rank, center, plan, gradient, post, start.t, place), False
    try:
        with np.errstate(all="ignore"):  # overflow and NaN are counted in the exchange, not warned about
            if plan.graphics is not None or plan.computing.compiled:
                worker.warm_up()
            if not start.joins:
                worker.take_up(start.saved)
            post("ready")
            t = conn.recv()
            if start.joins:
                worker.join(t)
            worker.run()
            drained = True
    except Stopped:
        worker.drain()
        drained = True
        post("stopped")
    except Aborted:
        pass
    except Exception:
        worker.finish_exchange()
        raise
    finally:
        gradient.close()
        worker.close(drained=drained)


def _telling(post: Callable[..., None], usual: Callable[..., None]) -> Callable[..., None]:
    """What torch says of algorithms that are not deterministic, the launcher shall hear."""

    def show(message: Warning | str, *others: Any, **more: Any) -> None:
        usual(message, *others, **more)
        if "determin" in str(message):
            post("warning", str(message).partition(".")[0])

    return show
