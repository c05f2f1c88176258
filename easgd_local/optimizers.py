"""torch's own optimizers for the steps of a worker between two exchanges, on the flat vector.

An optimizer that works coordinate by coordinate does the same to one flat vector as to the parameters one by one. Its
state is kept in the worker's named vectors, under torch's names, so that checkpoints hold it like everything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from easgd_local.backend.cpu import Vector

STEPS = "optimizer_steps"  # a vector of one float: how many steps the state has seen, which bias correction needs


@dataclass(frozen=True)
class Kind:
    """One of torch's optimizers: its class and the vectors of its state."""

    torch_name: str
    state: tuple[str, ...]


OPTIMIZERS = {
    "adam": Kind("Adam", ("exp_avg", "exp_avg_sq")),
    "adamw": Kind("AdamW", ("exp_avg", "exp_avg_sq")),
    "rmsprop": Kind("RMSprop", ("square_avg",)),
    "adagrad": Kind("Adagrad", ("sum",)),
}


class Optimizer:
    """The optimizer `name` on x: n floats, moved in place. `state[name]` has n floats for each vector of its state, and
    `state[STEPS]` one float. `weight_decay` is λ for adamw, which has a decay of its own; 0 for the others."""

    def __init__(self, name: str, x: Vector, state: Mapping[str, Vector], weight_decay: float) -> None:
        import torch

        kind = OPTIMIZERS[name]
        self._parameter = torch.nn.Parameter(torch.from_numpy(x), requires_grad=True)
        self._torch = getattr(torch.optim, kind.torch_name)([self._parameter], weight_decay=weight_decay)
        own: dict[str, Any] = {one: torch.from_numpy(state[one]) for one in kind.state}
        self._torch.state[self._parameter] = own | {"step": torch.from_numpy(state[STEPS]).squeeze(0)}

    def step(self, g: Vector, lr: float) -> None:
        """One step from x with the gradient g at step size η."""
        import torch

        self._torch.param_groups[0]["lr"] = lr
        self._parameter.grad = torch.from_numpy(g)
        self._torch.step()
        self._parameter.grad = None
