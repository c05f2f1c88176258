"""ASGD and MVASGD: SGD whose result is an average of its iterates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from easgd_local.rules.base import Rule, WorkerView, check_average, hyperparameter


@dataclass(frozen=True, kw_only=True)
class ASGD(Rule):
    """SGD whose result is the average of its iterates, sequential (p = 1): the baseline ASGD of Zhang et al. 2015
    (arXiv:1412.6651, section 5), after Polyak and Juditsky 1992.

        x <- x - η g(x),  c <- x,  z <- (1 - a)z + ac,  a = 1/(k + 1)

    k is the number of the step, from 1; z starts at c and is what is evaluated and exported: the mean of all iterates.

    Hyperparameters: lr (η).
    """

    name: ClassVar[str] = "asgd"
    shared: ClassVar[tuple[str, ...]] = ("z",)
    copies: ClassVar[tuple[str, ...]] = ("z",)
    reported: ClassVar[str] = "z"
    sequential: ClassVar[bool] = True
    counts: ClassVar[bool] = True

    def step(self, w: WorkerView) -> None:
        g = w.grad()
        w.ops.descend(w.x, g, w.lr)  # x <- x - ηg
        for b in w.turns():
            w.ops.copy(w.c[b], w.x[b])  # c <- x
            w.ops.average(w.z[b], w.c[b], self.rate(w.update))  # z <- (1 - a)z + ac

    def rate(self, k: int) -> float:
        """a at step k."""
        return 1 / (k + 1)


@dataclass(frozen=True, kw_only=True)
class MVASGD(ASGD):
    """SGD whose result is a moving average of its iterates, sequential (p = 1): the baseline MVASGD of Zhang et al.
    2015 (arXiv:1412.6651, section 5).

        x <- x - η g(x),  c <- x,  z <- (1 - a)z + ac,  a constant (the paper's: 0.001)

    Hyperparameters: lr (η), average_rate (a).
    """

    name: ClassVar[str] = "mvasgd"
    counts: ClassVar[bool] = False

    average_rate: float = hyperparameter(0.001, "rate a of the moving average that mvasgd and mvadownpour report")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_average(self.average_rate)

    def rate(self, k: int) -> float:
        return self.average_rate
