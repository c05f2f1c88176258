"""DiLoCo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from easgd_local.rules.base import ClosingView, ExchangeView, WorkerView, hyperparameter
from easgd_local.rules.local import INNER_HELP, Local


@dataclass(frozen=True, kw_only=True)
class DiLoCo(Local):
    """DiLoCo, local optimizers and Nesterov momentum on their mean difference: Douillard et al. 2023
    (arXiv:2311.08105).

        s <- Σ (x^i - c)/p,  u <- μu + s,  c <- c + η_o(s + μu),  x^i <- c     every τ steps, all with the old c
        x^i <- a step of the local optimizer (`inner`)                         every step

    u, and s, which gathers the sum, live at the center. With outer_lr = 1 and outer_momentum = 0 it is localsgd.

    Hyperparameters: lr (η), tau (τ), inner (the local optimizer), momentum (δ of inner = msgd), outer_lr (η_o),
    outer_momentum (μ).
    """

    name: ClassVar[str] = "diloco"
    shared: ClassVar[tuple[str, ...]] = ("u", "s")
    replaces: ClassVar[bool] = True

    inner: str = hyperparameter("adamw", INNER_HELP)
    outer_lr: float = hyperparameter(0.7, "diloco: step size η_o of the center")
    outer_momentum: float = hyperparameter(0.9, "diloco: momentum coefficient μ of the center")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.outer_lr < float("inf"):
            raise ValueError(f"outer_lr={self.outer_lr}: the center's step size must be positive and finite; try 0.7.")
        if not 0 <= self.outer_momentum < 1:
            raise ValueError(f"outer_momentum={self.outer_momentum}: μ must be at least 0 and below 1; try 0.9.")

    def step(self, w: WorkerView) -> None:
        self.meet(w)
        self.move(w)

    def meet(self, w: ExchangeView) -> None:
        """Every τ steps: s <- Σ (x^i - c)/p, which `close` moves the center with, and x^i <- c."""
        if not self.due(w.t):
            return
        for b in w.read():
            w.ops.difference(w.d[b], w.x[b], w.c[b], 1 / w.workers)  # d <- (x - c)/p
        for b in w.turns():
            w.open(w.s[b])  # s <- 0, the first
            w.ops.add(w.s[b], w.d[b])  # s <- s + d
        for b in w.read():
            w.ops.copy(w.x[b], w.c[b])  # x <- c

    def close(self, w: ClosingView, b: slice) -> None:
        w.ops.nesterov_ball(
            w.c[b], w.u[b], w.s[b], -self.outer_lr, self.outer_momentum
        )  # u <- μu + s;  c <- c + η_o(s + μu)
