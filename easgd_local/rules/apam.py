"""APAM."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from easgd_local.rules.base import Rule, WorkerView, hyperparameter

if TYPE_CHECKING:
    from easgd_local.backend.cpu import Vector


MOST_DELAY = 10_000


@dataclass(frozen=True, kw_only=True)
class APAM(Rule):
    """Asynchronous parallel AMSGrad: Xu et al. 2020 (arXiv:2002.09095).

        m <- β₁m + (1 - β₁)g,  v <- β₂v + (1 - β₂)g²,  v̂ <- max(v̂, v)
        c <- c - η_k m/(√v̂ + ε),  η_k = η√(1 - β₂^k)/(1 - β₁^k)        every step; then x <- c

    One step on the center for each arriving gradient, nothing averaged over the workers; k counts arrivals. m, v and v̂
    live at the center. ε = 1e-8 and the bias correction are those of the authors' code; the paper's projection onto a
    convex set is left out (the set is the whole space).

    With delay = D a gradient is taken at the center as the worker read it D of its own steps before, for studying
    staleness: p workers in strict turns are then (D + 1)p - 1 arrivals behind. It costs a worker D more vectors.

    Hyperparameters: lr (η), beta1 (β₁), beta2 (β₂), epsilon (ε), delay (D).
    """

    name: ClassVar[str] = "apam"
    shared: ClassVar[tuple[str, ...]] = ("m", "v", "vhat")
    counts: ClassVar[bool] = True

    lr: float = hyperparameter(0.0005, "step size η")
    beta1: float = hyperparameter(0.9, "β₁, decay of AMSGrad's first moment")
    beta2: float = hyperparameter(0.999, "β₂, decay of AMSGrad's second moment")
    epsilon: float = hyperparameter(1e-8, "ε in AMSGrad's denominator")
    delay: int = hyperparameter(0, "apam: take gradients at the center as read so many of the worker's steps before")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value}: the decay of a moment must be at least 0 and below 1; try 0.9.")
        if not 1e-37 < self.epsilon < 1e37:
            raise ValueError(f"epsilon={self.epsilon}: must be positive and finite in float32; the usual is 1e-8.")
        if not 0 <= self.delay <= MOST_DELAY:
            raise ValueError(
                f"delay={self.delay}: gradients come from the past, and each step of it costs a worker a vector, so it "
                f"must be at least 0 and at most {MOST_DELAY}; 0 is none."
            )

    @property
    def local(self) -> tuple[str, ...]:
        """The centers that the worker has read last."""
        return tuple(f"x{place}" for place in range(self.delay))

    def begin(self, w: WorkerView) -> None:
        for name in self.local:
            w.ops.copy(getattr(w, name), w.x)

    def step(self, w: WorkerView) -> None:
        g = w.grad(at=self._past(w) if self.delay else None)
        if self.delay:
            w.ops.copy(self._past(w), w.x)  # until it is D steps old
        for b in w.turns():
            w.ops.amsgrad(
                w.c[b], w.m[b], w.v[b], w.vhat[b], w.x[b], g[b],
                self.rate(w.lr, w.update), self.beta1, self.beta2, self.epsilon,
            )  # m, v, v̂ as above;  c <- c - η_k m/(√v̂ + ε);  x <- c  # fmt: skip

    def rate(self, lr: float, k: int) -> float:
        """η_k = η√(1 - β₂^k)/(1 - β₁^k)."""
        return lr * math.sqrt(1 - self.beta2**k) / (1 - self.beta1**k)

    def _past(self, w: WorkerView) -> Vector:
        """The x of D steps before."""
        return getattr(w, f"x{w.t % self.delay}")
