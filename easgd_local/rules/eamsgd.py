"""EAMSGD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from easgd_local.rules.base import WorkerView, check_momentum, hyperparameter
from easgd_local.rules.jacobi import Jacobi


@dataclass(frozen=True, kw_only=True)
class EAMSGD(Jacobi):
    """Elastic averaging with Nesterov momentum, asynchronous: Zhang et al. 2015, Algorithm 2 (arXiv:1412.6651).

        d <- α(x - c),  x <- x - d,  c <- c + d     every τ steps
        v <- δv - η g(x + δv),  x <- x + v          every step, g taken before the pull

    The difference never enters the velocity. With momentum = 0 it is EASGD.

    Hyperparameters: lr (η), tau (τ), one of alpha (α), beta (β = pα) and rho (ρ = α/η), beta_per (what β is a rate
    of), momentum (δ).
    """

    name: ClassVar[str] = "eamsgd"
    local = ("v",)
    scratch = ("d", "y")

    lr: float = hyperparameter(0.05, "step size η")
    momentum: float = hyperparameter(0.9, "momentum coefficient δ of the rules with momentum")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_momentum(self.momentum)

    def step(self, w: WorkerView) -> None:
        d = self.meet(w)  # every τ steps: d <- α(x - c);  c <- c + d
        w.ops.lookahead(w.y, w.x, w.v, self.momentum)  # y <- x + δv, at the x before the pull
        g = w.grad(at=w.y)
        w.ops.nesterov(w.x, w.v, g, w.lr, self.momentum, d)  # v <- δv - ηg;  x <- x - d + v
