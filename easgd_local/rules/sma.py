"""Synchronous model averaging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from easgd_local.rules.base import ClosingView, ExchangeView, WorkerView, hyperparameter
from easgd_local.rules.local import Local

if TYPE_CHECKING:
    from easgd_local.backend.cpu import Vector


@dataclass(frozen=True, kw_only=True)
class SMA(Local):
    """Synchronous model averaging with momentum at the center: Crossbow, Koliousis et al. 2019, Algorithm 1
    (arXiv:1901.02244).

        d^i <- α(x^i - c) for all i,  u <- μu + Σ d^i,  c <- c + u     every τ steps, all with the old c
        x^i <- x^i - η g(x^i) - d^i                                    every step, g and d at the same x^i

    u, the last move of the center, and s, which gathers Σ d, live at the center. α = 1/p, as in the paper; `inner`
    names another local optimizer. The paper's restart of the averaging when η changes is left out.

    Hyperparameters: lr (η), tau (τ), inner (the local optimizer), momentum (δ of inner = msgd), center_momentum
    (μ).
    """

    name: ClassVar[str] = "sma"
    shared: ClassVar[tuple[str, ...]] = ("u", "s")

    tau: int = hyperparameter(1, "communication period τ, in steps of the worker's clock")
    center_momentum: float = hyperparameter(0.9, "sma: momentum coefficient μ of the center")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.center_momentum < 1:
            raise ValueError(f"center_momentum={self.center_momentum}: μ must be at least 0 and below 1; try 0.9.")

    def step(self, w: WorkerView) -> None:
        d = self.meet(w)
        self.move(w)  # with g at the x before the pull
        if d is not None:
            w.ops.subtract(w.x, d)  # x <- x - d

    def meet(self, w: ExchangeView) -> Vector | None:
        """Every τ steps: d <- α(x - c) with the old c, s <- Σ d, which `close` moves the center with."""
        if not self.due(w.t):
            return None
        for b in w.read():
            w.ops.difference(w.d[b], w.x[b], w.c[b], 1 / w.workers)  # d <- α(x - c)
        for b in w.turns():
            w.open(w.s[b])  # s <- 0, the first
            w.ops.add(w.s[b], w.d[b])  # s <- s + d
        return w.d

    def close(self, w: ClosingView, b: slice) -> None:
        w.ops.heavy_ball(w.c[b], w.u[b], w.s[b], -1.0, self.center_momentum)  # u <- μu + s;  c <- c + u
