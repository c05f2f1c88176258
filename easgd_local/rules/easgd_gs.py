"""EASGD in the Gauss-Seidel forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from easgd_local.rules.base import WorkerView, hyperparameter
from easgd_local.rules.elastic import Elastic

FIRST = ("center", "worker")


@dataclass(frozen=True, kw_only=True)
class EASGDGaussSeidel(Elastic):
    """Elastic averaging SGD, Gauss-Seidel: the two updates of EASGD, the second with the fresh value of the first.

        first = center:  c <- c + α(x - c),  then  x <- x - η g(x) - α(x - c) with the new c
        first = worker:  x <- x - η g(x) - α(x - c),  then  c <- c + α(x - c) with the new x

    every τ steps; x <- x - η g(x) in the others. Zhang et al. 2015 (arXiv:1412.6651) take both from the old values
    (Jacobi, the rule easgd). On a quadratic the round robin has the same spectrum in all three forms, hence the same
    bound on α.
    """

    name: ClassVar[str] = "easgd-gs"
    orders: ClassVar[tuple[str, ...]] = ("strict", "free")
    scratch = ("d",)

    first: str = hyperparameter("center", "which moves first at an exchange: center or worker")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first not in FIRST:
            raise ValueError(f"first={self.first}: must be one of {', '.join(FIRST)}; choose one of them.")

    def step(self, w: WorkerView) -> None:
        if not self.due(w.t):
            w.ops.descend(w.x, w.grad(), w.lr)  # x <- x - ηg
        elif self.first == "center":
            self._center_first(w)
        else:
            self._worker_first(w)

    def _center_first(self, w: WorkerView) -> None:
        alpha = self.moving_rate(w.workers)
        for b in w.turns():
            w.ops.pull_center_first(w.x[b], w.c[b], w.d[b], alpha)  # c <- c + α(x - c);  d <- α(x - c)
        g = w.grad()  # at the x before the pull
        w.ops.descend(w.x, g, w.lr, w.d)  # x <- x - d - ηg

    def _worker_first(self, w: WorkerView) -> None:
        alpha, g = self.moving_rate(w.workers), w.grad()
        for b in w.turns():  # x <- x - α(x - c) - ηg;  c <- c + α(x - c)
            w.ops.pull_worker_first(w.x[b], w.c[b], w.d[b], g[b], w.lr, alpha)
