"""Parameters in half precision: a model computes with x rounded, and what moves and is exchanged is x.

    p <- round(x)           to the nearest number of 8 bits (bfloat16) or 11 (float16), to even on a tie
    g <- g + float(p.grad)  after a backward pass

x stays float32, since a step of less than half a unit in the last place of p would be lost in it for ever (Micikevicius
et al. 2018, arXiv:1710.03740, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from easgd_local.flat import Entry

TYPES = (torch.bfloat16, torch.float16)


class Halves:
    """The tensors of a model that have one of TYPES, `kind` (float32 where there are none).

    From `bind` on they lie in a vector of n numbers of that type, at the coordinates that they have in x, and from
    `bind_gradients` on their gradients in another. Owns both vectors.

    Raises `ValueError` for two types in one model.
    """

    def __init__(self, tensors: Sequence[tuple[Entry, Tensor]], n: int) -> None:
        self._tensors, self._n = tensors, n
        self.kind = tensors[0][1].dtype if tensors else torch.float32
        # Of the parameters that are float32 now: the gradient, and that in float32 with its version when it was made.
        self._lifted: dict[int, tuple[Tensor | None, Tensor | None, int]] = {}
        for entry, tensor in tensors:
            if tensor.dtype != self.kind:
                raise ValueError(
                    f"{entry.name} has dtype {tensor.dtype} and {tensors[0][0].name} {self.kind}: beside float32 a "
                    f"model can have parameters of one half precision; choose one of them."
                )

    def __bool__(self) -> bool:
        return bool(self._tensors)

    def bind(self, x: Tensor) -> None:
        """The model computes with x (float32[n]), rounded, from now on."""
        if self:
            self._x, self._numbers = x, torch.empty(self._n, dtype=self.kind, device=x.device)
            self.round()
        for entry, tensor in self._tensors:
            tensor.data = entry.of(self._numbers)

    def bind_gradients(self, g: Tensor) -> None:
        """`collect` adds to g (float32[n]) from now on."""
        if self:
            self._g, self._gradients = g, torch.zeros(self._n, dtype=self.kind, device=g.device)
        for entry, tensor in self._tensors:
            if tensor.requires_grad:
                tensor.grad = entry.of(self._gradients)

    @torch.no_grad()
    def round(self) -> None:
        """p <- round(x): x has moved."""
        if self:
            self._numbers.copy_(self._x)

    @torch.no_grad()
    def adopt(self) -> None:
        """x <- p where p is no longer x rounded: somebody has written to the parameters."""
        if self:
            written = self._numbers.ne(self._x.to(self.kind)) & self._ours
            self._x.copy_(torch.where(written, self._numbers.float(), self._x))

    @cached_property
    def _ours(self) -> Tensor:
        """Which of the n coordinates are those of tensors in half precision."""
        ours = torch.zeros(self._n, dtype=torch.bool, device=self._x.device)
        for entry, _ in self._tensors:
            ours[entry.start : entry.stop] = True
        return ours

    @torch.no_grad()
    def collect(self) -> None:
        """g <- g + float(p.grad),  p.grad <- 0: a backward pass has been made."""
        if self:
            self._g.add_(self._gradients)
            self._gradients.zero_()

    def strayed(self) -> str | None:
        """The name of a tensor that no longer lies in `numbers`; None when all do."""
        for entry, tensor in self._tensors:
            place = self._numbers.data_ptr() + self._numbers.element_size() * entry.start
            if tensor.data_ptr() != place and entry.stop > entry.start:
                return entry.name
        return None

    def lift(self, chosen: Set[int]) -> None:
        """Until `lower` the parameters of these identities are float32 and lie in x, and their gradients are float32:
        for the step of an optimizer, which then moves x and keeps its state in float32."""
        for entry, tensor in self._tensors:
            if id(tensor) in chosen and id(tensor) not in self._lifted:
                grad = tensor.grad
                tensor.grad = None  # as it would be of another type than the parameter
                tensor.data = entry.of(self._x)
                tensor.grad = wide = None if grad is None else grad.float()
                self._lifted[id(tensor)] = grad, wide, 0 if wide is None else wide._version

    def lower(self, chosen: Set[int] | None = None) -> None:
        """These, or all, lie in `numbers` again, x rounded, with the gradients that they had, or what has become of
        these."""
        if not self._lifted:
            return
        self.round()
        for entry, tensor in self._tensors:
            if id(tensor) in self._lifted and (chosen is None or id(tensor) in chosen):
                (grad, wide, version), now = self._lifted.pop(id(tensor)), tensor.grad
                tensor.grad = None
                tensor.data = entry.of(self._numbers)
                if now is not None:
                    untouched = wide is not None and now is wide and wide._version == version
                    tensor.grad = grad if untouched else now.to(self.kind)


def narrow(model: nn.Module, kind: torch.dtype) -> nn.Module:
    """The model, its parameters now of this type, but for BatchNorm and its like: running statistics move by small
    steps, and torch wants the parameters beside them to be of their type."""
    for module in model.modules():
        if not isinstance(module, nn.modules.batchnorm._NormBase):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(kind)
    return model
