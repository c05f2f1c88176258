"""Asynchronous ADMM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from easgd_local.rules.base import Rule, WorkerView, hyperparameter


@dataclass(frozen=True, kw_only=True)
class ADMM(Rule):
    """Asynchronous ADMM, linearised: Zhang et al. 2015, equations 8 to 11 (arXiv:1412.6651).

        λ^i <- λ^i - (x^i - c)
        x^i <- [x^i - η g(x^i) + ηρ(λ^i + c)]/(1 + ηρ)     every step, by one worker after the other
        c   <- (1/p) Σ_j (x^j - λ^j)

    The sum is kept incrementally: each worker replaces its own last contribution y^i = x^i - λ^i, which lives at the
    center, so that a worker that takes the place of a dead one goes on from there. The contribution of one that is dead
    and not replaced stays where it was.

    Unlike the elastic rules the round robin is unstable in a wide region of (η, ρ), see figure 1 of the paper, where
    trajectories first decay and then blow up.

    Hyperparameters: lr (η), rho (ρ).
    """

    name: ClassVar[str] = "admm"
    allotted: ClassVar[tuple[str, ...]] = ("y",)
    copies: ClassVar[tuple[str, ...]] = ("y",)
    local = ("multiplier",)

    rho: float = hyperparameter(1.0, "elasticity ρ = α/η, instead of alpha or beta; for admm its penalty")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.rho and 1e-37 < self.lr * self.rho < 1e37):
            raise ValueError(f"rho={self.rho}: ADMM's penalty must be positive, and ηρ finite in float32; try 1.")

    def begin(self, w: WorkerView) -> None:
        w.ops.copy(w.multiplier, w.x)
        w.ops.subtract(w.multiplier, w.y)  # λ <- x - y: the contribution at the center stays true

    def step(self, w: WorkerView) -> None:
        g = w.grad()
        # λ <- λ - (x - c);  x <- [x - ηg + ηρ(λ + c)]/(1 + ηρ);  c <- c + (x - λ - y)/p;  y <- x - λ
        for b in w.turns():
            w.ops.admm(w.x[b], w.c[b], w.multiplier[b], w.y[b], g[b], w.lr, self.rho, w.workers)
