"""PASSM and PASSM+."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from easgd_local.partition import overlap
from easgd_local.rules.base import Rule, WorkerView, check_momentum, hyperparameter


@dataclass(frozen=True, kw_only=True)
class PASSM(Rule):
    """Partitioned asynchronous subgradient on a shared model: Kungurtsev et al. 2021 (arXiv:1905.11845).

        u_b <- μu_b + g_b(x),  c_b <- c_b - ηu_b     every step, for the block b that the worker owns
        x <- c                                        every step, all of it, perhaps old here and new there

    The model is divided into p contiguous runs of layers with about equally many parameters. Each worker alone writes
    its own, so there is no lock, and computes the gradient of its own only: the backward pass stops below its first
    layer. u is the worker's. The layers of a worker that is dead and not replaced stay as they are.

    Hyperparameters: lr (η), momentum (μ).
    """

    name: ClassVar[str] = "passm"
    orders: ClassVar[tuple[str, ...]] = ("none", "strict")
    divides: ClassVar[bool] = True
    local = ("u",)

    lr: float = hyperparameter(0.02, "step size η")
    momentum: float = hyperparameter(0.9, "momentum coefficient δ of the rules with momentum")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_momentum(self.momentum)

    def step(self, w: WorkerView) -> None:
        g = w.grad(only=w.own)
        for b in w.turns():
            mine = overlap(b, w.own)
            w.ops.heavy_ball(w.c[mine], w.u[mine], g[mine], w.lr, self.momentum)  # u <- μu + g;  c <- c - ηu
            w.ops.copy(w.x[b], w.c[b])  # x <- c


@dataclass(frozen=True, kw_only=True)
class PASSMPlus(PASSM):
    """PASSM+: full and partial steps in alternation, after Kungurtsev et al. 2021 (arXiv:1905.11845) and their code.

        u <- μu + g(x),        c <- c - η(g + μu)            full step: t below full_steps, then every other t
        u_b <- μu_b + g_b(x),  c_b <- c_b - η(g_b + μu_b)    partial step: the block b that the worker owns
        x <- c                                               every step

    Nesterov's momentum, local to the worker. In full steps everybody writes everything: with turns = none a worker's
    change of a coordinate may then be lost to another one's.

    Hyperparameters: lr (η), momentum (μ), full_steps.
    """

    name: ClassVar[str] = "passm+"

    lr: float = hyperparameter(0.05, "step size η")
    full_steps: int = hyperparameter(50, "passm+: full steps before full and partial ones alternate")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.full_steps < 0:
            raise ValueError(f"full_steps={self.full_steps}: a number of steps must be at least 0; try 50.")

    def step(self, w: WorkerView) -> None:
        full = w.t < self.full_steps or (w.t - self.full_steps) % 2 == 1
        g = w.grad(only=None if full else w.own)
        for b in w.turns():
            mine = b if full else overlap(b, w.own)
            w.ops.nesterov_ball(w.c[mine], w.u[mine], g[mine], w.lr, self.momentum)  # u <- μu + g;  c <- c - η(g + μu)
            w.ops.copy(w.x[b], w.c[b])  # x <- c
