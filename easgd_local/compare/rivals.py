"""What our rules are compared with: PyTorch's own ways to train on several processes, by their hyperparameters.

Each is written as a rule so that a configuration can hold it, but torch makes the steps: see `rival`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from easgd_local.rules import RULES
from easgd_local.rules.base import Rule, check_momentum, check_period, hyperparameter


@dataclass(frozen=True, kw_only=True)
class Rival(Rule):
    """A run of torch's: SGD in p processes that meet over gloo. torch.optim.SGD with weight decay λ:

    v <- δv + g,  x <- x - η(g + δv)        Nesterov's form, where δ > 0

    Hyperparameters: lr (η), momentum (δ).
    """

    orders: ClassVar[tuple[str, ...]] = ("together",)

    lr: float = hyperparameter(0.1, "step size η")
    momentum: float = hyperparameter(0.9, "momentum coefficient δ of the rules with momentum")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_momentum(self.momentum)

    def meetings(self, steps: int) -> int:
        """How often in so many steps the processes average a vector of n floats."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class DDP(Rival):
    """torch.nn.parallel.DistributedDataParallel: in every step all processes take the mean of their gradients.

    Equal to one process with batches p times as large. Hyperparameters: lr (η), momentum (δ).
    """

    name: ClassVar[str] = "ddp"

    def meetings(self, steps: int) -> int:
        return steps


@dataclass(frozen=True, kw_only=True)
class PostLocalSGD(Rival):
    """torch's PostLocalSGDOptimizer (Lin et al. 2018, arXiv:1808.07217): the first `ddp_steps` steps as `ddp`, then
    local steps, after every τ of which, the first included, the processes take the mean of their parameters.

    Hyperparameters: lr (η), momentum (δ), tau (τ), ddp_steps.
    """

    name: ClassVar[str] = "post-local-sgd"

    tau: int = hyperparameter(10, "communication period τ, in steps of the worker's clock")
    ddp_steps: int = hyperparameter(100, "post-local-sgd: steps as ddp, before the local ones")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_period(self.tau)
        if self.ddp_steps < 0:
            raise ValueError(f"ddp_steps={self.ddp_steps}: must be at least 0; 0 makes local steps from the start.")

    def meetings(self, steps: int) -> int:
        return min(steps, self.ddp_steps) + -(-max(0, steps - self.ddp_steps) // self.tau)


RIVALS: dict[str, type[Rival]] = {"ddp": DDP, "post-local-sgd": PostLocalSGD}
ENTRANTS: dict[str, type[Rule]] = {**RULES, **RIVALS}
