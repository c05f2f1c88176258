"""EASGD in the Gauss-Seidel forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from easgd_local.rules.base import ExchangeView, WorkerView, hyperparameter
from easgd_local.rules.elastic import Elastic

if TYPE_CHECKING:
    from easgd_local.backend.cpu import Vector

FIRST = ("center", "worker")


@dataclass(frozen=True, kw_only=True)
class EASGDGaussSeidel(Elastic):
    """Elastic averaging SGD, Gauss-Seidel: the two updates of Zhang et al. 2015 (arXiv:1412.6651), one after the other.

        first = center:  c <- c + α(x - c),  then  x <- x - η g(x) - α(x - c) with the new c
        first = worker:  x <- x - η g(x) - α(x - c),  then  c <- c + α(x - c) with the new x

    every τ steps; x <- x - η g(x) in the others. The paper takes both from the old values (Jacobi, the rule easgd). On
    a quadratic hx²/2 the two forms have one spectrum with p = 1, and other ones with more workers. The round robin with
    the center first is stable for every α in [0, 1] up to ηh = 4(√2 - 1) = 1.657 (derived for p = 1, checked by number
    for others), a wider region than Jacobi's; with the worker first the region shrinks as p grows.

    Hyperparameters: lr (η), tau (τ), one of alpha (α), beta (β = pα) and rho (ρ = α/η), beta_per (what β is a rate
    of), first (who moves first).
    """

    name: ClassVar[str] = "easgd-gs"
    orders: ClassVar[tuple[str, ...]] = ("strict", "free")
    scratch = ("d",)

    first: str = hyperparameter("center", "which moves first at an exchange: center or worker")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first not in FIRST:
            raise ValueError(f"first={self.first}: must be one of {', '.join(FIRST)}; choose one of them.")

    def spectral_radius(self, workers: int, curvature: float = 1.0) -> float:
        """Of one cycle of the round robin on (x^1, ..., x^p, c) at τ = 1 and curvature h."""
        alpha, c, cycle = self.moving_rate(workers), workers, np.eye(workers + 1)
        for i in range(workers):
            pull, move = np.eye(workers + 1), np.eye(workers + 1)
            pull[c, [i, c]] = alpha, 1 - alpha  # c <- c + α(x - c)
            move[i, [i, c]] = 1 - self.lr * curvature - alpha, alpha  # x <- x - ηhx - α(x - c)
            cycle = (move @ pull if self.first == "center" else pull @ move) @ cycle
        return float(np.abs(np.linalg.eigvals(cycle)).max())

    def _alpha_warnings(self, workers: int, h: float, turns: str, known: str) -> list[str]:
        radius = self.spectral_radius(workers, h)
        if radius <= 1 + 1e-9:
            return []
        return [
            f"alpha={self.moving_rate(workers):.4g}: the round robin of {self.name} with {self.first} first has the "
            f"spectral radius {radius:.4g} at lr={self.lr}, {workers} workers and curvature {known}, beyond 1: expect "
            f"oscillation; lower alpha or lr."
        ]

    @property
    def attachable(self) -> bool:
        return self.first == "center"  # the other form needs g in the exchange

    def step(self, w: WorkerView) -> None:
        if self.first == "worker" and self.due(w.t):
            self._worker_first(w)
            return
        d = self.meet(w)  # every τ steps: c <- c + α(x - c);  d <- α(x - c), with the new c
        g = w.grad()  # at the x before the pull
        w.ops.descend(w.x, g, w.lr, d)  # x <- x - d - ηg

    def meet(self, w: ExchangeView) -> Vector | None:
        """The form with the center first, every τ steps: c <- c + α(x - c), d <- α(x - c) with the new c."""
        if not self.due(w.t):
            return None
        alpha = self.moving_rate(w.workers)
        for b in w.turns():
            w.ops.pull_center_first(w.x[b], w.c[b], w.d[b], alpha)  # c <- c + α(x - c);  d <- α(x - c)
        return w.d

    def _worker_first(self, w: WorkerView) -> None:
        alpha, g = self.moving_rate(w.workers), w.grad()
        for b in w.turns():  # x <- x - α(x - c) - ηg;  c <- c + α(x - c)
            w.ops.pull_worker_first(w.x[b], w.c[b], w.d[b], g[b], w.lr, alpha)
