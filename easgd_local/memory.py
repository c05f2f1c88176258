"""Where a process keeps its vectors, and how torch sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from easgd_local.backend.cpu import Vector, vector

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Memory(Protocol):
    """Vectors of float32 and torch's view of them."""

    device: torch.device  # where torch computes with them

    def vector(self, n: int) -> Any:
        """n zeros."""

    def tensor(self, x: Any) -> Tensor:
        """The same memory as a tensor of n elements."""

    def touch(self, reads: Sequence[Any], writes: Sequence[Any]) -> None:
        """Called before torch reads and writes these vectors: what of them is still under way comes first."""


class MainMemory:
    """NumPy vectors."""

    def __init__(self) -> None:
        import torch

        self.device = torch.device("cpu")

    def vector(self, n: int) -> Vector:
        return vector(n)

    def tensor(self, x: Vector) -> Tensor:
        import torch

        return torch.from_numpy(x)

    def touch(self, reads: Sequence[Vector], writes: Sequence[Vector]) -> None: ...
