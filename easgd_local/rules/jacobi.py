"""Elastic averaging whose worker and center move by one difference, taken from the old values of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from easgd_local.rules.base import ExchangeView
from easgd_local.rules.elastic import Elastic

if TYPE_CHECKING:
    from easgd_local.backend.cpu import Vector

BOUNDS = {False: "(4 - 2ηh)/(4 - ηh)", True: "2(2 - ηh)/(2 + p(2 - ηh))"}  # of α, by whether differences are stale


@dataclass(frozen=True, kw_only=True)
class Jacobi(Elastic):
    """The exchange of Zhang et al. 2015 (arXiv:1412.6651), Algorithms 1 and 2, in turns; and where it is stable."""

    orders: ClassVar[tuple[str, ...]] = ("strict", "free", "none")

    def meet(self, w: ExchangeView) -> Vector | None:
        """Every τ steps: d <- α(x - c), c <- c + d."""
        if not self.due(w.t):
            return None
        alpha = self.moving_rate(w.workers)
        for b in w.turns():
            w.ops.pull(w.x[b], w.c[b], w.d[b], alpha)  # d <- α(x - c);  c <- c + d
        return w.d

    def alpha_limit(self, workers: int, curvature: float = 1.0, turns: str = "") -> float:
        """The largest α that is stable at every τ with p workers, curvatures up to h and this order of turns.

            exclusive turns:    (4 - 2ηh)/(4 - ηh)             Zhang et al. 2015, section 4
            stale differences:  2(2 - ηh)/(2 + p(2 - ηh))      in a rendezvous; without turns the worst that can be

        0 where ηh ≥ 2. Momentum is left out of account, as the paper does.
        """
        room = max(2 - self.lr * curvature, 0.0)  # 2 - ηh
        return 2 * room / (2 + (workers if self._stale(turns) else 1) * room)

    def _alpha_warnings(self, workers: int, h: float, turns: str, known: str) -> list[str]:
        alpha, limit = self.moving_rate(workers), self.alpha_limit(workers, h, turns)
        if alpha <= limit:
            return []
        bound = BOUNDS[self._stale(turns)]
        return [
            f"alpha={alpha:.4g} is beyond the stability bound {bound} = {limit:.4g} of {self.name} with "
            f"turns={turns or self.orders[0]} at lr={self.lr}, {workers} workers and curvature {known}: expect "
            f"oscillation; lower alpha or lr."
        ]

    def _stale(self, turns: str) -> bool:
        """Whether differences from one and the same center can be added to it."""
        return (turns or self.orders[0]) in ("together", "none")


@dataclass(frozen=True, kw_only=True)
class Synchronous(Jacobi):
    """Elastic averaging at a rendezvous: all differences are taken from the old center, and added in rank order."""

    orders: ClassVar[tuple[str, ...]] = ("together",)

    def meet(self, w: ExchangeView) -> Vector | None:
        """Every τ steps: d <- α(x - c) with the old c, c <- c + Σ d."""
        if not self.due(w.t):
            return None
        alpha = self.moving_rate(w.workers)
        for b in w.read():
            w.ops.difference(w.d[b], w.x[b], w.c[b], alpha)  # d <- α(x - c)
        for b in w.turns():
            w.ops.add(w.c[b], w.d[b])  # c <- c + d
        return w.d
