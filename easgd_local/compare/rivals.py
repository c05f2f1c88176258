"""What our rules are compared with: PyTorch's own ways to train on several processes, by their hyperparameters.

Each is written as a rule so that a configuration can hold it, but torch makes the steps: see `rival`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from easgd_local.rules import RULES
from easgd_local.rules.base import Rule, check_momentum, check_period, hyperparameter

MOMENTUM = 0.9
OPTIMIZERS = {"sgd": 0.1, "adam": 0.0005, "adamw": 0.0005, "amsgrad": 0.0005}  # with default step sizes


@dataclass(frozen=True, kw_only=True)
class Rival(Rule):
    """A run of torch's: p processes that meet over gloo, on GPUs over NCCL, each with an optimizer of torch's and its
    weight decay λ."""

    orders: ClassVar[tuple[str, ...]] = ("together",)

    lr: float = hyperparameter(None, "step size η")

    def meetings(self, steps: int) -> int:
        """How often in so many steps the processes average a vector of n floats."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class DDP(Rival):
    """torch.nn.parallel.DistributedDataParallel: in every step all processes take the mean of their gradients.

    Equal to one process with batches p times as large. Optimizers:

        sgd        v <- δv + g,  x <- x - η(g + δv)        torch.optim.SGD, Nesterov's form where δ > 0
        adam, adamw, amsgrad                               torch.optim.Adam, AdamW, Adam(amsgrad=True)

    Hyperparameters: lr (η; by default 0.1 for sgd, 0.0005 for the others), optimizer, momentum (δ, of sgd).
    """

    name: ClassVar[str] = "ddp"

    optimizer: str = hyperparameter("sgd", "ddp: optimizer of each process: sgd, adam, adamw, amsgrad")
    momentum: float = hyperparameter(MOMENTUM, "momentum coefficient δ of the rules with momentum")

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={self.optimizer}: ddp has {', '.join(OPTIMIZERS)}; choose one of them.")
        if self.lr is None:
            object.__setattr__(self, "lr", OPTIMIZERS[self.optimizer])
        super().__post_init__()
        check_momentum(self.momentum)
        if self.optimizer != "sgd" and self.momentum != MOMENTUM:
            raise ValueError(
                f"momentum={self.momentum}: belongs to optimizer=sgd, and {self.optimizer} has its own; leave it out, "
                f"or use optimizer=sgd."
            )

    def meetings(self, steps: int) -> int:
        return steps


@dataclass(frozen=True, kw_only=True)
class PostLocalSGD(Rival):
    """torch's PostLocalSGDOptimizer (Lin et al. 2018, arXiv:1808.07217): the first `ddp_steps` steps as `ddp`, then
    local steps of SGD with momentum, after every τ of which, the first included, the processes take the mean of their
    parameters.

    Hyperparameters: lr (η), momentum (δ), tau (τ), ddp_steps.
    """

    name: ClassVar[str] = "post-local-sgd"

    lr: float = hyperparameter(OPTIMIZERS["sgd"], "step size η")
    momentum: float = hyperparameter(MOMENTUM, "momentum coefficient δ of the rules with momentum")
    tau: int = hyperparameter(10, "communication period τ, in steps of the worker's clock")
    ddp_steps: int = hyperparameter(100, "post-local-sgd: steps as ddp, before the local ones")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_momentum(self.momentum)
        check_period(self.tau)
        if self.ddp_steps < 0:
            raise ValueError(f"ddp_steps={self.ddp_steps}: must be at least 0; 0 makes local steps from the start.")

    @property
    def period(self) -> int:
        return self.tau

    def meetings(self, steps: int) -> int:
        return min(steps, self.ddp_steps) + -(-max(0, steps - self.ddp_steps) // self.tau)


RIVALS: dict[str, type[Rival]] = {"ddp": DDP, "post-local-sgd": PostLocalSGD}
ENTRANTS: dict[str, type[Rule]] = {**RULES, **RIVALS}
