"""Synchronous EASGD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from easgd_local.rules.base import WorkerView
from easgd_local.rules.jacobi import Synchronous


@dataclass(frozen=True, kw_only=True)
class EASGDSync(Synchronous):
    """Elastic averaging SGD, synchronous: Zhang et al. 2015, equations 5 and 6 (arXiv:1412.6651).

        d^i <- α(x^i - c) for all i,  c <- c + Σ d^i     every τ steps, all with the old c
        x^i <- x^i - η g(x^i) - d^i                      every step, g and d at the same x^i

    The center moves to (1 - β)c + β·mean x^i. The Sync EASGD of You, Buluç, Demmel 2017 (arXiv:1708.02983) is the
    same mathematics.

    Hyperparameters: lr (η), tau (τ), one of alpha (α), beta (β = pα) and rho (ρ = α/η), beta_per (what β is a rate
    of).
    """

    name: ClassVar[str] = "easgd-sync"
    scratch = ("d",)

    def step(self, w: WorkerView) -> None:
        d = self.meet(w)  # every τ steps: d <- α(x - c);  c <- c + Σ d
        g = w.grad()  # at the x before the pull
        w.ops.descend(w.x, g, w.lr, d)  # x <- x - d - ηg
