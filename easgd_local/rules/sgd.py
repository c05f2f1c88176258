"""SGD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from easgd_local.rules.base import Rule, WorkerView


@dataclass(frozen=True, kw_only=True)
class SGD(Rule):
    """Stochastic gradient descent, sequential (p = 1): the baseline SGD of Zhang et al. 2015 (arXiv:1412.6651).

    x <- x - η g(x),  c <- x

    Hyperparameters: lr (η).
    """

    name: ClassVar[str] = "sgd"
    sequential: ClassVar[bool] = True

    def step(self, w: WorkerView) -> None:
        g = w.grad()
        w.ops.descend(w.x, g, w.lr)  # x <- x - ηg
        for b in w.turns():
            w.ops.copy(w.c[b], w.x[b])  # c <- x
