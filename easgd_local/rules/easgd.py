"""EASGD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from easgd_local.rules.base import WorkerView
from easgd_local.rules.jacobi import Jacobi


@dataclass(frozen=True, kw_only=True)
class EASGD(Jacobi):
    """Elastic averaging SGD, asynchronous: Zhang et al. 2015, Algorithm 1 (arXiv:1412.6651).

        d <- α(x - c),  x <- x - d,  c <- c + d     every τ steps
        x <- x - η g(x)                             every step, g taken before the pull

    With alpha = 0 the workers never meet: plain SGD, p times.

    Hyperparameters: lr (η), tau (τ), one of alpha (α), beta (β = pα) and rho (ρ = α/η), beta_per (what β is a rate
    of).
    """

    name: ClassVar[str] = "easgd"
    scratch = ("d",)

    def step(self, w: WorkerView) -> None:
        d = self.meet(w)  # every τ steps: d <- α(x - c);  c <- c + d
        g = w.grad()  # at the x before the pull
        w.ops.descend(w.x, g, w.lr, d)  # x <- x - d - ηg
