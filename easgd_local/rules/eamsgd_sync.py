"""Synchronous EAMSGD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from easgd_local.rules.base import WorkerView, check_momentum, hyperparameter
from easgd_local.rules.jacobi import Synchronous


@dataclass(frozen=True, kw_only=True)
class EAMSGDSync(Synchronous):
    """Elastic averaging with Nesterov momentum, synchronous: Zhang et al. 2015, equation 7 (arXiv:1412.6651).

        d^i <- α(x^i - c) for all i,  c <- c + Σ d^i               every τ steps, all with the old c
        v^i <- δv^i - η g(x^i + δv^i),  x^i <- x^i - d^i + v^i     every step, g and d at the same x^i

    With momentum = 0 it is easgd-sync.

    Hyperparameters: lr (η), tau (τ), one of alpha (α), beta (β = pα) and rho (ρ = α/η), beta_per (what β is a rate
    of), momentum (δ).
    """

    name: ClassVar[str] = "eamsgd-sync"
    local = ("v",)
    scratch = ("d", "y")

    lr: float = hyperparameter(0.05, "step size η")
    momentum: float = hyperparameter(0.9, "momentum coefficient δ of the rules with momentum")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_momentum(self.momentum)

    def step(self, w: WorkerView) -> None:
        d = self.meet(w)  # every τ steps: d <- α(x - c);  c <- c + Σ d
        w.ops.lookahead(w.y, w.x, w.v, self.momentum)  # y <- x + δv, at the x before the pull
        g = w.grad(at=w.y)
        w.ops.nesterov(w.x, w.v, g, w.lr, self.momentum, d)  # v <- δv - ηg;  x <- x - d + v
