"""A model as one contiguous float32 vector: the only place that loops over parameters.

The vector holds, entry after entry, the trainable parameters, then everything that is exchanged but not moved by a
gradient: frozen parameters and buffers such as BatchNorm's running statistics. Entries start at multiples of 16 floats
(a 64-byte line); the floats between them are zero and stay zero. Within an entry the order is that of the tensor's
memory, so channels-last weights stay channels-last.

Buffers that are no state to average stay each worker's own: integers, other types than float32, those that are not
saved (`persistent=False`) or not finite (a mask of -inf). Parameters of half precision are the vector rounded.
"""

from __future__ import annotations

import contextlib
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from easgd_local import halves

ALIGNMENT = 16  # floats


@dataclass(frozen=True)
class Entry:
    """One parameter or buffer: its name in the state dict, its coordinates in the flat vector, its strides there."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    is_buffer: bool
    stride: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """The view of this entry's coordinates in a vector."""
        return flat[self.start : self.stop].as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Naming:
    """A model's state dict without the model: where in the vector each name lies, and the other tensors."""

    places: dict[str, Entry | None]  # in the order of the state dict
    own: dict[str, Any]  # tensors, and what get_extra_state gave

    def state_dict(self, x: NDArray[np.float32]) -> dict[str, Any]:
        """The state dict with the values of x, as contiguous copies."""
        flat = torch.from_numpy(x)
        state = {name: self.own[name] if entry is None else entry.of(flat) for name, entry in self.places.items()}
        return {
            name: value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
            for name, value in state.items()
        }

    def __reduce__(self) -> tuple[Any, ...]:
        # Through a pipe of multiprocessing torch would send tensors as shared memory: here their bytes go.
        return _naming_from, (pickle.dumps((self.places, self.own)),)


def _naming_from(pickled: bytes) -> Naming:
    return Naming(*pickle.loads(pickled))


class Flat:
    """The correspondence between a model and vectors of n floats.

    `bind(x)` makes the model compute with the memory of x; `g`, of n floats, receives the gradients, zeros where
    nothing is trained. `trainable` is the length of the part that gradients move, `parameters` the number of the
    model's own parameters. The model's own tensors stay the same objects. Those of half precision (`halves`) are x
    rounded: `halves.round` after x has moved, `halves.collect` after a backward pass.

    Raises `ValueError` for a model with parameters that are neither float32 nor of one half precision.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
        saved = model.state_dict(keep_vars=True)
        buffers = [(name, b) for name, b in model.named_buffers() if name in saved and _is_averageable(b)]
        self._tensors = [tensor for _, tensor in trained + frozen + buffers]
        self.entries: list[Entry] = []
        stop = 0
        for place, (name, tensor) in enumerate(trained + frozen + buffers):
            if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
                raise ValueError(f"{name} has no shape yet (a lazy module): run one batch through the model first.")
            if tensor.dtype not in (torch.float32, *halves.TYPES):
                raise ValueError(
                    f"{name} has dtype {tensor.dtype}: the exchange works on float32, and parameters are that, "
                    f"bfloat16 or float16; call model.float()."
                )
            start = _aligned(stop)
            stop = start + tensor.numel()
            is_buffer = place >= len(trained) + len(frozen)
            self.entries.append(Entry(name, tuple(tensor.shape), start, stop, is_buffer, _dense_stride(tensor)))
            if place < len(trained):
                self.trainable = stop
        _check_memory(self.entries, self._tensors)
        _check_statistics(model)
        entry_of = {id(tensor): entry for entry, tensor in zip(self.entries, self._tensors, strict=True)}
        self._places = {name: entry_of.get(id(tensor)) for name, tensor in saved.items()}
        if not trained:
            raise ValueError("the model has no trainable parameter: nothing to train; set requires_grad on some.")
        self.n = _aligned(stop)
        self.parameters = sum(tensor.numel() for _, tensor in trained + frozen)
        self.buffers = slice(_aligned(max(e.stop for e in self.entries if not e.is_buffer)), self.n)
        self.dtypes = tuple(str(tensor.dtype).removeprefix("torch.") for tensor in self._tensors)
        self._find_halves()

    def _find_halves(self) -> None:
        pairs = list(zip(self.entries, self._tensors, strict=True))
        self._full = [(entry, tensor) for entry, tensor in pairs if tensor.dtype == torch.float32]
        self.halves = halves.Halves([one for one in pairs if one[1].dtype in halves.TYPES], self.n)

    def of(self, copy: nn.Module) -> Flat:
        """The same correspondence for a copy of the model."""
        own = dict(copy.named_parameters()) | dict(copy.named_buffers())
        twin = object.__new__(Flat)
        vars(twin).update(vars(self) | {"model": copy, "_tensors": [own[entry.name] for entry in self.entries]})
        vars(twin).pop("_held_buffers", None)
        twin._find_halves()
        return twin

    @cached_property
    def _held_buffers(self) -> list[tuple[Entry, Tensor, dict[str, Tensor | None], str]]:
        """Each buffer of the vector, and where its module holds it under which name."""
        found = []
        for entry, tensor in zip(self.entries, self._tensors, strict=True):
            if entry.is_buffer:
                owner, _, name = entry.name.rpartition(".")
                found.append((entry, tensor, self.model.get_submodule(owner)._buffers, name))
        return found

    @property
    def layers(self) -> list[slice]:
        """The coordinates of each trainable parameter tensor, in the model's order."""
        return [slice(entry.start, entry.stop) for entry in self.entries if entry.start < self.trainable]

    def values(self) -> NDArray[np.float32]:
        """A copy of the model's present values as a vector of n floats."""
        x = np.zeros(self.n, np.float32)
        flat = torch.from_numpy(x)
        for entry, tensor in zip(self.entries, self._tensors, strict=True):
            entry.of(flat).copy_(tensor.detach())
        return x

    @torch.no_grad()
    def bind(self, x: NDArray[np.float32] | Tensor) -> None:
        """The model computes with the memory of x from now on, with the values found there."""
        flat = _tensor(x)
        for entry, tensor in self._full:
            tensor.data = entry.of(flat)
        self.halves.bind(flat)

    def strayed(self, x: NDArray[np.float32] | Tensor) -> str | None:
        """The name of a parameter or buffer that no longer lies in the memory of x; None when all do."""
        base = _tensor(x).data_ptr()
        for entry, tensor in self._full:
            if tensor.data_ptr() != base + 4 * entry.start and entry.stop > entry.start:
                return entry.name
        return self.halves.strayed()

    def bind_gradients(self, g: NDArray[np.float32] | Tensor) -> None:
        """Backward passes add to the memory of g from now on."""
        flat = _tensor(g)
        for entry, tensor in self._full:
            if tensor.requires_grad:
                tensor.grad = entry.of(flat)
        self.halves.bind_gradients(flat)

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
        """The model's state dict with the values of x, as copies; what is not in x keeps the model's own values."""
        return self.naming().state_dict(x)

    def naming(self) -> Naming:
        """The model's state dict as places in x, and copies of the tensors that are not in x."""
        now = self.model.state_dict()
        own = {name: now[name] for name, entry in self._places.items() if entry is None}
        copies = {name: one.cpu().clone() if isinstance(one, Tensor) else one for name, one in own.items()}
        return Naming(self._places, copies)

    @torch.no_grad()
    def gather_buffers(self) -> None:
        """Takes back buffers that the model has assigned anew, as in `self.mean = 0.9 * self.mean + ...`.

        Raises `ValueError` for one of another shape or type.
        """
        for entry, ours, held, name in self._held_buffers:
            assigned = held.get(name)
            if assigned is ours:
                continue
            if assigned is None or assigned.shape != ours.shape or assigned.dtype != ours.dtype:
                raise ValueError(
                    f"{entry.name}: a float32 buffer of shape {tuple(ours.shape)} at attach, and now another one; "
                    f"register it with persistent=False if it is no state to be averaged."
                )
            ours.copy_(assigned)
            held[name] = ours


def _tensor(x: NDArray[np.float32] | Tensor) -> Tensor:
    return x if isinstance(x, Tensor) else torch.from_numpy(x)


def _check_memory(entries: list[Entry], tensors: list[Tensor]) -> None:
    """`ValueError` for two parameters in the same memory: as one vector they would be two."""
    seen: dict[int, str] = {}
    for entry, tensor in zip(entries, tensors, strict=True):
        other = seen.setdefault(tensor.data_ptr(), entry.name)
        if other != entry.name and tensor.numel() and tensor.device.type != "meta":
            raise ValueError(
                f"{entry.name} and {other} lie in the same memory but are two parameters; tie them by using one "
                f"Parameter twice, self.a.weight = self.b.weight."
            )


def _check_statistics(model: nn.Module) -> None:
    for name, module in model.named_modules():
        mean = module.running_mean if isinstance(module, nn.modules.batchnorm._NormBase) else None
        if mean is not None and mean.dtype in halves.TYPES:
            place = f"{name}." if name else ""
            raise ValueError(
                f"{place}running_mean has dtype {mean.dtype}, in which running statistics lose their small steps; keep "
                f"the {type(module).__name__} in float32: call .float() on it."
            )


def _is_averageable(buffer: Tensor) -> bool:
    return buffer.dtype == torch.float32 and bool(torch.isfinite(buffer).all())


def _dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's strides if its elements fill their memory without gaps, in whatever order; else contiguous ones."""
    size = 1
    for stride, length in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != size:
            return torch.empty(tensor.shape, device="meta").stride()
        size *= length
    return tuple(tensor.stride())


def _aligned(length: int) -> int:
    return math.ceil(length / ALIGNMENT) * ALIGNMENT
