"""Real workers, real turns, a real center, but threads of this process: runs of milliseconds on made-up gradients."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from easgd_local.backend.cpu import CpuOps
from easgd_local.center import Center, Layout
from easgd_local.computing import Computing
from easgd_local.learning_rate import LearningRate
from easgd_local.partition import partition
from easgd_local.rules.base import Rule
from easgd_local.schedules import Calendar
from easgd_local.worker import TrainingPlan, Worker
from tests import paper

N, BUFFERS = 75, 5  # coordinates, of which the last few are buffers where a test wants some
LAYERS = (slice(0, 16), slice(16, 31), slice(32, 33), slice(48, 75))  # odd lengths, at multiples of 16


def noisy_quadratic(i: int, t: int, x: np.ndarray) -> np.ndarray:
    """g = hx - ξ with a fixed ξ for each (i, t)."""
    h = np.linspace(0.1, 2, len(x)).astype(x.dtype)
    return h * x - np.random.default_rng([i, t]).standard_normal(len(x)).astype(x.dtype)


class Gradients:
    """What a worker sees of model and data: a function of (rank, t, x)."""

    samples_per_step, loss = 1, 0.0

    def __init__(self, rank: int, function: paper.Gradient, layers: tuple[slice, ...], n: int, buffers: int) -> None:
        self._rank, self._function, self.layers = rank, function, list(layers)
        self.n, self.buffers = n, slice(n - buffers, n)
        self._g, self._handed_out = np.zeros(0), b""

    def __call__(self, ops: CpuOps, t: int, at: np.ndarray, only: slice | None = None) -> np.ndarray:
        self.check()
        self._g = self._function(self._rank, t, at)
        if only is not None:
            self._g[: only.start] = self._g[only.stop :] = 0
        self._handed_out = self._g.tobytes()
        return self._g

    def check(self) -> None:
        """The rule has not written into g."""
        assert self._g.tobytes() == self._handed_out, "g was written to"

    def zero(self, ops: CpuOps) -> np.ndarray:
        return np.zeros(self.n, np.float32)

    def close(self) -> None: ...


@dataclass
class Outcome:
    """Copies of the vectors at the end: the center's by name, each worker's x, its local vectors, what it posted."""

    shared: dict[str, np.ndarray]
    x: list[np.ndarray]
    local: list[dict[str, np.ndarray]]
    posts: list[list[tuple[object, ...]]] = field(default_factory=list)

    @property
    def c(self) -> np.ndarray:
        return self.shared["c"]


def starting_point(n: int = N) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(n).astype(np.float32)


def plan_of(
    rule: Rule, workers: int, steps: int, *, n: int, block_bytes: int, turns: str, rate: LearningRate
) -> TrainingPlan:
    allotted = tuple(f"{name}{i}" for name in rule.allotted for i in range(workers))
    return TrainingPlan(
        rule=rule, learning_rate=rate, calendar=Calendar(rule.period, steps),
        layout=Layout(workers, n, ("c", *rule.shared, *allotted), block_bytes), model="", shape=(1, 1, 1), classes=1,
        batch_size=1, sampling="shard", seed=0, weight_decay=0.0, turns=turns, computing=Computing(), buffers="average",
        threads=1, folder=Path(), report_every=10**9, evaluation_samples=1,
    )  # fmt: skip


def train(
    rule: Rule, workers: int = 1, steps: int = 20, gradient: paper.Gradient = noisy_quadratic, *,
    start: np.ndarray | None = None, block_bytes: int = 64, turns: str | None = None, buffers: int = 0,
    layers: tuple[slice, ...] = LAYERS, schedule: LearningRate | None = None,
) -> Outcome:  # fmt: skip
    """Runs `steps` steps of `workers` workers from `start`; with blocks of 16 floats unless told otherwise."""
    start = starting_point() if start is None else start
    rate = schedule or LearningRate("constant", rule.lr, steps)
    plan = plan_of(
        rule, workers, steps, n=len(start), block_bytes=block_bytes, turns=turns or rule.orders[0], rate=rate
    )
    with Center.create(plan.layout) as center:
        copies = [f"{name}{i}" for name in rule.allotted for i in range(workers)]
        for name in ("c", *rule.copies, *copies):
            if name in center.vectors:
                center.vectors[name][:] = start
        posts: list[list[tuple[object, ...]]] = [[] for _ in range(workers)]
        team = [
            Worker(
                i, center, plan, Gradients(i, gradient, layers, len(start), buffers),
                lambda *args, i=i, **values: posts[i].append((*args, values)), 0,
            )
            for i in range(workers)
        ]  # fmt: skip
        for one in team:
            one.take_up(None)
        together(center, team)
        for one in team:
            one._gradient.check()  # type: ignore[attr-defined]
        shared = {name: value.copy() for name, value in center.vectors.items()}
        kept = [{name: value.copy() for name, value in one._kept.items()} for one in team]
        return Outcome(shared, [vectors.pop("x") for vectors in kept], kept, posts)


def together(center: Center, team: list[Worker]) -> None:
    """Runs the workers to their ends, each in a thread; the first error of any is raised here."""
    errors: list[BaseException] = []

    def work(one: Worker) -> None:
        try:
            with np.errstate(all="ignore"):
                one.run()
        except BaseException as error:
            errors.append(error)
            center.abort[0] = 1

    center.leave[0] = 1
    threads = [threading.Thread(target=work, args=(one,), daemon=True) for one in team]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a worker hangs"
    if errors:
        raise errors[0]


def blocks_of(workers: int, n: int = N, block_bytes: int = 64) -> list[slice]:
    layout = Layout(workers, n, ("c",), block_bytes)
    return [layout.block(b) for b in range(layout.blocks)]


def owned(workers: int, layers: tuple[slice, ...] = LAYERS) -> list[slice]:
    parts = partition([layer.stop - layer.start for layer in layers], workers)
    return [slice(layers[part[0]].start, layers[part[-1]].stop) for part in parts]
