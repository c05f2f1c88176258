"""torch's own optimizers for the steps of a worker between two exchanges, on the flat vector.

An optimizer that works coordinate by coordinate does the same to one flat vector as to the parameters one by one. Its
state is kept in the worker's named vectors, under torch's names, so that checkpoints hold it like everything else.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from easgd_local.memory import Memory

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

    def __init__(self, name: str, x: Any, state: Mapping[str, Any], weight_decay: float, memory: Memory) -> None:
        import torch

        kind, self._memory = OPTIMIZERS[name], memory
        self._vectors = [x, *state.values()]
        self._parameter = torch.nn.Parameter(memory.tensor(x), requires_grad=True)
        cls, settings = getattr(torch.optim, kind.torch_name), {"weight_decay": weight_decay}
        if memory.device.type == "cuda" and "capturable" in inspect.signature(cls).parameters:
            settings["capturable"] = True  # the number of steps is read on the device, and nobody waits for it
        self._torch = cls([self._parameter], **settings)
        self._steps = memory.tensor(state[STEPS]).squeeze(0)
        # Where torch wants the number of steps on the CPU, what is kept for checkpoints is a copy of it.
        self._host_steps = torch.zeros(()) if memory.device.type == "cuda" and "capturable" not in settings else None
        own: dict[str, Any] = {one: memory.tensor(state[one]) for one in kind.state}
        own["step"] = self._steps if self._host_steps is None else self._host_steps
        self._torch.state[self._parameter] = own

    def step(self, g: Any, lr: float) -> None:
        """One step from x with the gradient g at step size η."""
        self._memory.touch([g], self._vectors)
        self._torch.param_groups[0]["lr"] = lr
        self._parameter.grad = self._memory.tensor(g)
        self._torch.step()
        if self._host_steps is not None:
            self._steps.fill_(self._host_steps)
        self._parameter.grad = None
