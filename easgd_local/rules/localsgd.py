"""Local SGD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from easgd_local.rules.base import ExchangeView, WorkerView
from easgd_local.rules.local import Local


@dataclass(frozen=True, kw_only=True)
class LocalSGD(Local):
    """Local SGD, periodic averaging: Stich 2019 (arXiv:1805.09767), McMahan et al. 2017 (arXiv:1602.05629).

        c <- c + Σ (x^i - c)/p,  x^i <- c     every τ steps: all become the mean of the workers
        x^i <- x^i - η g(x^i)                 every step, or a step of another local optimizer (`inner`)

    The mean is written as a sum of differences, so that a worker that has died counts as one that stayed at c.

    Hyperparameters: lr (η), tau (τ), inner (the local optimizer), momentum (δ of inner = msgd).
    """

    name: ClassVar[str] = "localsgd"

    replaces: ClassVar[bool] = True

    def step(self, w: WorkerView) -> None:
        self.meet(w)
        self.move(w)

    def meet(self, w: ExchangeView) -> None:
        """Every τ steps: c <- c + Σ (x^i - c)/p, x^i <- c."""
        if not self.due(w.t):
            return
        for b in w.read():
            w.ops.difference(w.d[b], w.x[b], w.c[b], 1 / w.workers)  # d <- (x - c)/p
        for b in w.turns():
            w.ops.add(w.c[b], w.d[b])  # c <- c + d
        for b in w.read():
            w.ops.copy(w.x[b], w.c[b])  # x <- c
