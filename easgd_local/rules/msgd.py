"""MSGD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from easgd_local.rules.base import Rule, WorkerView, check_momentum, hyperparameter


@dataclass(frozen=True, kw_only=True)
class MSGD(Rule):
    """SGD with Nesterov momentum, sequential (p = 1): the baseline MSGD of Zhang et al. 2015 (arXiv:1412.6651).

    v <- δv - η g(x + δv),  x <- x + v,  c <- x

    Hyperparameters: lr (η), momentum (δ).
    """

    name: ClassVar[str] = "msgd"
    local = ("v",)
    scratch = ("y",)
    sequential: ClassVar[bool] = True

    lr: float = hyperparameter(0.05, "step size η")
    momentum: float = hyperparameter(0.9, "momentum coefficient δ of the rules with momentum")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_momentum(self.momentum)

    def step(self, w: WorkerView) -> None:
        w.ops.lookahead(w.y, w.x, w.v, self.momentum)  # y <- x + δv
        g = w.grad(at=w.y)
        w.ops.nesterov(w.x, w.v, g, w.lr, self.momentum)  # v <- δv - ηg;  x <- x + v
        for b in w.turns():
            w.ops.copy(w.c[b], w.x[b])  # c <- x
