"""What the rules share whose workers meet every τ steps."""

from __future__ import annotations

from dataclasses import dataclass

from easgd_local.rules.base import Rule, check_period, hyperparameter


@dataclass(frozen=True, kw_only=True)
class Periodic(Rule):
    """An exchange at t = 0, τ, 2τ, ...: all that the rule adds to the steps of an optimizer."""

    tau: int = hyperparameter(10, "communication period τ, in steps of the worker's clock")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_period(self.tau)

    @property
    def period(self) -> int:
        return self.tau

    @property
    def attachable(self) -> bool:
        return True

    def due(self, t: int) -> bool:
        """Whether τ divides t."""
        return t % self.tau == 0
