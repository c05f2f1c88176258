"""Attached workers in threads of this process: real hooks, turns and center under loops of milliseconds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from easgd_local.attached import Attached
from easgd_local.attachment import Attachment
from easgd_local.batches import Positions
from easgd_local.center import Center, Layout
from easgd_local.config import MAX_STEPS
from easgd_local.flat import Flat
from easgd_local.outset import set_turns, shared_names
from easgd_local.plan import Plan, Start
from easgd_local.rules.base import Rule
from easgd_local.schedules import Calendar

BLOCK_BYTES = 64
Optimizers = tuple[torch.optim.Optimizer, ...]


class Net(nn.Module):
    """Odd sizes, so that blocks of 16 floats cut through the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def batch(i: int, t: int) -> tuple[Tensor, Tensor]:
    """The minibatch of worker i at clock t."""
    generator = torch.Generator().manual_seed(1000 * i + t)
    return torch.randn(4, 5, generator=generator), torch.randn(4, 3, generator=generator)


def loss_of(model: nn.Module, i: int, t: int) -> Tensor:
    inputs, targets = batch(i, t)
    return nn.functional.mse_loss(model(inputs), targets)


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return make()


class Silent:
    """A launcher that says nothing."""

    def poll(self) -> bool:
        return False


@dataclass
class Team:
    """p attached workers, each with its model and optimizers, around one center; a context manager."""

    rule: Rule
    models: list[nn.Module]
    optimizers: list[Optimizers]
    workers: list[Attached]
    center: Center
    posts: list[list[Any]]

    @classmethod
    def of(
        cls, rule: Rule, workers: int, optimizer: Callable[[nn.Module], Any], make: Callable[[], nn.Module] = Net, *,
        buffers: str = "average", optimizer_state: str = "local", turns: str | None = None, stateful: Any = (),
        faults: Any = (), folder: Path = Path(),
    ) -> Team:  # fmt: skip
        models = [seeded(make, seed) for seed in range(workers)]  # each starts elsewhere: worker 0's start counts
        made = [optimizer(model) for model in models]
        optimizers = [one if isinstance(one, tuple) else (one,) for one in made]
        flats = [Flat(model) for model in models]
        plan = Plan(
            rule=rule, calendar=Calendar(rule.period, MAX_STEPS, ahead=int(rule.replaces)),
            layout=Layout(workers, flats[0].n, shared_names(rule, workers), BLOCK_BYTES),
            turns=turns or rule.orders[0], buffers=buffers, threads=1, seed=0, folder=folder, report_every=10**9,
            faults=faults,
        )  # fmt: skip
        center = Center.create(plan.layout)
        set_turns(center, plan.calendar.rounds_before(0))
        posts: list[list[Any]] = [[] for _ in range(workers)]
        team = []
        for i in range(workers):
            attachment = Attachment(
                models[i], optimizers[i], optimizer_state, None, None, tuple(stateful), Positions(), torch.Generator()
            )
            post = lambda *args, i=i, **values: posts[i].append((*args, values))  # noqa: E731
            team.append(Attached(i, center, plan, flats[i], attachment, post, Silent(), Start()))  # type: ignore[arg-type]
        team[0].fill(None)
        for one in team:
            one.take_up(None)
            one.bind()
        return cls(rule, models, optimizers, team, center, posts)

    def run(self, steps: int, step: Callable[[Team, int, int], None] | None = None) -> Team:
        """Every worker makes its steps in a thread of its own; the first error of any is raised here."""
        errors: list[BaseException] = []

        def work(i: int) -> None:
            try:
                for t in range(steps):
                    (step or plain_step)(self, i, t)
            except BaseException as error:
                errors.append(error)
                self.center.abort[0] = 1

        threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(self.models))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), "a worker hangs"
        if errors:
            raise errors[0]
        return self

    @property
    def c(self) -> np.ndarray:
        return self.center.vectors[self.rule.reported].copy()

    def x(self, i: int) -> np.ndarray:
        return self.workers[i].x.copy()

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *exc: object) -> None:
        self.center.close()


def plain_step(team: Team, i: int, t: int) -> None:
    """What everybody's loop does."""
    for optimizer in team.optimizers[i]:
        optimizer.zero_grad()
    loss_of(team.models[i], i, t).backward()
    for optimizer in team.optimizers[i]:
        optimizer.step()
