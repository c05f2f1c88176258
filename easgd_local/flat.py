"""A model as one contiguous float32 vector: the only place that loops over parameters.

The vector holds, entry after entry, the trainable parameters, then everything that is exchanged but not moved by a
gradient: frozen parameters and floating-point buffers such as BatchNorm's running statistics. Entries start at
multiples of 16 floats (a 64-byte line); the floats between them are zero and stay zero.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

ALIGNMENT = 16  # floats


@dataclass(frozen=True)
class Entry:
    """One parameter or buffer: its name in the state dict and its coordinates in the flat vector."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    is_buffer: bool


class Flat:
    """The correspondence between a model and vectors of n floats.

    `bind(x)` makes the model compute with the memory of x; `g`, of n floats, receives the gradients, zeros where
    nothing is trained. `trainable` is the length of the part that gradients move, `parameters` the number of the
    model's own parameters. The model's own tensors stay the same objects.

    Raises `ValueError` for a model with parameters that are not float32.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
        buffers = [(name, b) for name, b in model.named_buffers() if b.is_floating_point()]
        self._tensors = [tensor for _, tensor in trained + frozen + buffers]
        self.entries: list[Entry] = []
        stop = 0
        for place, (name, tensor) in enumerate(trained + frozen + buffers):
            if tensor.dtype != torch.float32:
                raise ValueError(
                    f"{name} has dtype {tensor.dtype}: the exchange works on float32; call model.float() "
                    f"and choose another precision for the computation with precision=."
                )
            start = _aligned(stop)
            stop = start + tensor.numel()
            self.entries.append(Entry(name, tuple(tensor.shape), start, stop, place >= len(trained) + len(frozen)))
            if place < len(trained):
                self.trainable = stop
        if not trained:
            raise ValueError("the model has no trainable parameter: nothing to train; set requires_grad on some.")
        self.n = _aligned(stop)
        self.parameters = sum(tensor.numel() for _, tensor in trained + frozen)
        self.buffers = slice(_aligned(max(e.stop for e in self.entries if not e.is_buffer)), self.n)

    @property
    def trained(self) -> list[Entry]:
        """The trainable parameters, in the model's order."""
        return [entry for entry in self.entries if entry.start < self.trainable]

    def values(self) -> NDArray[np.float32]:
        """A copy of the model's present values as a vector of n floats."""
        x = np.zeros(self.n, np.float32)
        for entry, tensor in zip(self.entries, self._tensors, strict=True):
            x[entry.start : entry.stop] = tensor.detach().numpy().ravel()
        return x

    @torch.no_grad()
    def bind(self, x: NDArray[np.float32]) -> None:
        """The model computes with the memory of x from now on, with the values found there."""
        flat = torch.from_numpy(x)
        for entry, tensor in zip(self.entries, self._tensors, strict=True):
            tensor.data = flat[entry.start : entry.stop].view(entry.shape)

    def bind_gradients(self, g: NDArray[np.float32]) -> None:
        """Backward passes add to the memory of g from now on."""
        flat = torch.from_numpy(g)
        for entry, tensor in zip(self.entries, self._tensors, strict=True):
            if tensor.requires_grad:
                tensor.grad = flat[entry.start : entry.stop].view(entry.shape)

    @contextlib.contextmanager
    def training(self, only: slice | None) -> Iterator[None]:
        """Meanwhile only the trainable parameters within these coordinates require a gradient; None: all of them."""
        resting = [] if only is None else [
            tensor for entry, tensor in zip(self.entries, self._tensors, strict=True)
            if tensor.requires_grad and not only.start <= entry.start < only.stop
        ]  # fmt: skip
        for tensor in resting:
            tensor.requires_grad_(False)
        try:
            yield
        finally:
            for tensor in resting:
                tensor.requires_grad_(True)

    def state_dict(self, x: NDArray[np.float32]) -> dict[str, Tensor]:
        """The model's state dict with the values of x, as copies; integer buffers keep the model's own values."""
        flat = torch.from_numpy(x)
        state = {name: tensor.detach().clone().contiguous() for name, tensor in self.model.state_dict().items()}
        own = dict(self.model.named_parameters(remove_duplicate=False)) | dict(
            self.model.named_buffers(remove_duplicate=False)
        )
        place = {id(tensor): entry for entry, tensor in zip(self.entries, self._tensors, strict=True)}
        for name in state:
            entry = place.get(id(own.get(name)))
            if entry is not None:
                state[name] = flat[entry.start : entry.stop].view(entry.shape).clone()
        return state


def _aligned(length: int) -> int:
    return math.ceil(length / ALIGNMENT) * ALIGNMENT
