"""What the rules share whose workers run an optimizer of their own between rendezvous."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from easgd_local.optimizers import OPTIMIZERS
from easgd_local.rules.base import WorkerView, check_momentum, hyperparameter
from easgd_local.rules.periodic import Periodic

MOMENTUM = 0.9
OURS = {"sgd": (), "msgd": ("v",)}
INNER = (*OURS, *OPTIMIZERS)
# Default step sizes: an optimizer that divides by the gradient's size wants another one than SGD.
RATES = {"sgd": 0.2, "msgd": 0.05, "adam": 0.0005, "adamw": 0.0005, "rmsprop": 0.0005, "adagrad": 0.01}
INNER_HELP = (
    f"local optimizer of localsgd, sma and diloco: {', '.join(INNER)}; unless given, lr is then "
    f"{', '.join(f'{RATES[name]} for {name}' for name in INNER)}"
)


@dataclass(frozen=True, kw_only=True)
class Local(Periodic):
    """A local optimizer, and a rendezvous every τ steps."""

    orders: ClassVar[tuple[str, ...]] = ("together",)
    over_scratch: ClassVar[tuple[str, ...]] = ("d",)

    lr: float = hyperparameter(None, "step size η")
    inner: str = hyperparameter("sgd", INNER_HELP)
    momentum: float = hyperparameter(MOMENTUM, "momentum coefficient δ of the rules with momentum")

    def __post_init__(self) -> None:
        if self.inner not in INNER:
            raise ValueError(f"inner={self.inner}: the local optimizers are {', '.join(INNER)}; choose one of them.")
        if self.lr is None:
            object.__setattr__(self, "lr", RATES[self.inner])
        super().__post_init__()
        check_momentum(self.momentum)
        if self.inner != "msgd" and self.momentum != MOMENTUM:
            raise ValueError(
                f"momentum={self.momentum}: belongs to inner=msgd, and inner={self.inner} has none; leave it out, or "
                f"use inner=msgd."
            )

    @property
    def local(self) -> tuple[str, ...]:
        return OURS[self.inner] if self.inner in OURS else OPTIMIZERS[self.inner].state

    @property
    def scratch(self) -> tuple[str, ...]:
        return ("d", "y") if self.inner == "msgd" else ("d",)

    @property
    def optimizer(self) -> str:
        return self.inner if self.inner in OPTIMIZERS else ""

    @property
    def decoupled(self) -> bool:
        return self.inner == "adamw"

    def move(self, w: WorkerView) -> None:
        """One step of the local optimizer."""
        if self.inner == "sgd":
            w.ops.descend(w.x, w.grad(), w.lr)  # x <- x - ηg
        elif self.inner == "msgd":
            w.ops.lookahead(w.y, w.x, w.v, self.momentum)  # y <- x + δv
            w.ops.nesterov(w.x, w.v, w.grad(at=w.y), w.lr, self.momentum)  # v <- δv - ηg;  x <- x + v
        else:
            w.optimize(w.grad())
