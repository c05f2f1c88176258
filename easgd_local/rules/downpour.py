"""DOWNPOUR and its averaged forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from easgd_local.rules.base import ExchangeView, WorkerView, check_average, hyperparameter
from easgd_local.rules.periodic import Periodic


@dataclass(frozen=True, kw_only=True)
class Downpour(Periodic):
    """DOWNPOUR: Dean et al. 2012, in the form of Zhang et al. 2015 (arXiv:1412.6651).

        c <- c + v,  x <- c,  v <- 0            every τ steps
        x <- x - η g(x),  v <- v - η g(x)       every step

    All of what the workers have gathered moves the center, so p workers move it p times as far: it wants a small η, and
    a large τ makes it unstable. With p = 1 it is SGD.

    Hyperparameters: lr (η), tau (τ).
    """

    name: ClassVar[str] = "downpour"
    orders: ClassVar[tuple[str, ...]] = ("strict", "free", "none")
    local = ("v",)
    replaces: ClassVar[bool] = True
    over_local: ClassVar[tuple[str, ...]] = ("y",)
    over_scratch: ClassVar[tuple[str, ...]] = ("v",)

    lr: float = hyperparameter(0.1, "step size η")
    tau: int = hyperparameter(1, "communication period τ, in steps of the worker's clock")

    def step(self, w: WorkerView) -> None:
        if self.due(w.t):
            for b in w.turns():
                self.exchange(w, b)
        g = w.grad()
        w.ops.accumulate(w.x, w.v, g, w.lr)  # x <- x - ηg;  v <- v - ηg

    def meet(self, w: ExchangeView) -> None:
        """Every τ steps: the exchange, with v, the sum of the steps, as x less y, what x was after the last one."""
        if not self.due(w.t):
            return
        for b in w.turns():
            w.ops.difference(w.v[b], w.x[b], w.y[b], 1.0)  # v <- x - y
            self.exchange(w, b)
            w.ops.copy(w.y[b], w.x[b])  # y <- x

    def exchange(self, w: ExchangeView, b: slice) -> None:
        """The visit of block b."""
        w.ops.push(w.c[b], w.x[b], w.v[b])  # c <- c + v;  x <- c;  v <- 0


@dataclass(frozen=True, kw_only=True)
class ADownpour(Downpour):
    """DOWNPOUR whose result is the average of the center over time: Zhang et al. 2015, section 5 (arXiv:1412.6651).

        c <- c + v,  x <- c,  v <- 0,  z <- (1 - a)z + ac,  a = 1/(k + 1)     every τ steps
        x <- x - η g(x),  v <- v - η g(x)                                     every step

    k is the number of the center's update, whoever makes it; z starts at c, lives at the center, and is what is
    evaluated and exported: the mean of all the values that c has had.

    Hyperparameters: lr (η), tau (τ).
    """

    name: ClassVar[str] = "adownpour"
    orders: ClassVar[tuple[str, ...]] = ("strict", "free")
    shared: ClassVar[tuple[str, ...]] = ("z",)
    copies: ClassVar[tuple[str, ...]] = ("z",)
    reported: ClassVar[str] = "z"
    counts: ClassVar[bool] = True

    def exchange(self, w: ExchangeView, b: slice) -> None:
        super().exchange(w, b)
        w.ops.average(w.z[b], w.c[b], self.rate(w.update))  # z <- (1 - a)z + ac

    def rate(self, k: int) -> float:
        """a at the center's k-th update."""
        return 1 / (k + 1)


@dataclass(frozen=True, kw_only=True)
class MVADownpour(ADownpour):
    """DOWNPOUR whose result is a moving average of the center: Zhang et al. 2015, section 5 (arXiv:1412.6651).

    c <- c + v,  x <- c,  v <- 0,  z <- (1 - a)z + ac     every τ steps, a constant (the paper's: 0.001)
    x <- x - η g(x),  v <- v - η g(x)                     every step

    Hyperparameters: lr (η), tau (τ), average_rate (a).
    """

    name: ClassVar[str] = "mvadownpour"
    counts: ClassVar[bool] = False

    lr: float = hyperparameter(0.05, "step size η")
    average_rate: float = hyperparameter(0.001, "rate a of the moving average that mvasgd and mvadownpour report")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_average(self.average_rate)

    def rate(self, k: int) -> float:
        return self.average_rate
