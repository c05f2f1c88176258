"""MDOWNPOUR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from easgd_local.rules.base import Rule, WorkerView, check_momentum, hyperparameter


@dataclass(frozen=True, kw_only=True)
class MDownpour(Rule):
    """DOWNPOUR with Nesterov momentum at the center: Zhang et al. 2015, section 5 (arXiv:1412.6651).

        v <- δv - η g(x),  c <- c - η g(x) + δv,  x <- c     every step

    c holds the look-ahead point, so with one worker this is exactly MSGD. v lives at the center. Every gradient goes to
    that velocity, hence τ = 1.

    Hyperparameters: lr (η), momentum (δ), tau (τ, 1 and nothing else).
    """

    name: ClassVar[str] = "mdownpour"
    shared: ClassVar[tuple[str, ...]] = ("v",)

    lr: float = hyperparameter(0.01, "step size η")
    momentum: float = hyperparameter(0.9, "momentum coefficient δ of the rules with momentum")
    tau: int = hyperparameter(1, "communication period τ, in steps of the worker's clock")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_momentum(self.momentum)
        if self.tau != 1:
            raise ValueError(
                f"tau={self.tau}: mdownpour takes every gradient to the velocity at the center, so it is defined for "
                f"tau=1 only (Zhang et al. 2015, section 5); leave tau out, or use downpour or eamsgd."
            )

    def step(self, w: WorkerView) -> None:
        g = w.grad()
        for b in w.turns():  # v <- δv - ηg;  c <- c - ηg + δv;  x <- c
            w.ops.nesterov_at_center(w.c[b], w.v[b], w.x[b], g[b], w.lr, self.momentum)
