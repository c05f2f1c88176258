"""The steps of the user's optimizers, as torch's hooks tell of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from easgd_local.child import Refusal
from easgd_local.halves import TYPES, Halves


class Steps:
    """Calls `begins` before the first of the optimizers makes its part of a step, the gradient taken and nothing moved
    yet, and `made` when each has made it. A step that a GradScaler skips is none.

    While an optimizer steps, its parameters in half precision are float32 and lie in x (`Halves.lift`); before that
    `adopt` is called, which takes what the loop has written to them.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], halves: Halves, *,
        adopt: Callable[[], None], begins: Callable[[], None], made: Callable[[], None],
    ) -> None:  # fmt: skip
        self._optimizers, self._halves = optimizers, halves
        self._adopt, self._begins, self._made = adopt, begins, made
        self._hooks: list[Any] = []
        self._done: set[int] = set()  # the optimizers that have made their part of the step under way
        self._running: dict[int, FrameType] = {}  # those that are in their step: the call that torch's hooks surround

    def watch(self) -> None:
        """From here on the optimizers tell of their steps."""
        for optimizer in self._optimizers:
            if self._halves:
                _keep_in_float32(optimizer)
                self._hooks += [
                    optimizer.register_load_state_dict_pre_hook(lambda one, state: self._lift(one)),
                    optimizer.register_load_state_dict_post_hook(self._lower),
                ]
            self._hooks += [
                optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after),
            ]  # fmt: skip

    def leave(self) -> None:
        """They tell of them no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def load(self, states: Iterable[Any]) -> None:
        """The optimizers take over what their `state_dict` gave; parameters in half precision lie in x already."""
        for optimizer, state in zip(self._optimizers, states, strict=True):
            self._lift(optimizer)  # or what is loaded would be rounded
            optimizer.load_state_dict(state)
            self._lower(optimizer)

    def lower(self) -> None:
        """Parameters are in half precision again: the last step may have ended by an exception."""
        self._halves.lower()

    def _lift(self, optimizer: Optimizer) -> None:
        if self._halves:
            self._halves.lift(owned([optimizer]))

    def _lower(self, optimizer: Optimizer) -> None:
        if self._halves:
            self._halves.lower(owned([optimizer]))

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._is_within_step(optimizer):
            return
        self._running[id(optimizer)] = sys._getframe(1)
        self.lower()
        self._adopt()
        if self._halves and (args[1:2] or (kwargs.get("closure"),))[0] is not None:  # args[0] is the optimizer
            raise Refusal(
                "step(closure): parameters in half precision are float32 while the optimizer steps, so that no forward "
                "pass can be made meanwhile; call model.float(), or compute the loss before step()."
            )
        if not _is_skipped(optimizer) and not self._done:
            self._begins()
        self._lift(optimizer)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._running.get(id(optimizer)) is not sys._getframe(1):
            return
        del self._running[id(optimizer)]
        self._lower(optimizer)
        if _is_skipped(optimizer):
            return
        self._done.add(id(optimizer))
        if len(self._done) == len(self._optimizers):
            self._done.clear()
            self._made()

    def _is_within_step(self, optimizer: Optimizer) -> bool:
        """Whether this is the step of a base class, which a step of the same optimizer has called: torch calls the
        hooks for both. One that ended by an exception is no longer among the callers."""
        outer = self._running.get(id(optimizer))
        frame = None if outer is None else sys._getframe(2)
        while frame is not None and frame is not outer:
            frame = frame.f_back
        return frame is not None


def owned(optimizers: Sequence[Optimizer]) -> set[int]:
    """The identities of the parameters that the optimizers move."""
    return {id(one) for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]}


def _is_skipped(optimizer: Optimizer) -> bool:
    """Whether a GradScaler has found infinities and an optimizer that unscales by itself is about to do nothing."""
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return found is not None and float(found) > 0


def _keep_in_float32(optimizer: Optimizer) -> None:
    """The state of steps before the attach, as that of the steps to come."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dtype in TYPES:
                state[name] = value.float()
