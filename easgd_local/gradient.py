"""The stochastic gradient of a built-in model on a built-in data set, as a worker sees it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from easgd_local.data import Dataset, MemorySplit, OnDevice, Sampler, order, prepare, step_rng, to_device
from easgd_local.flat import Flat
from easgd_local.halves import narrow
from easgd_local.loss_scale import scale_of, unscale
from easgd_local.memory import MainMemory, Memory
from easgd_local.randomness import seed_model

PRECISIONS = {  # the type of torch's autocast, and that of the parameters
    "fp32": (None, torch.float32),
    "bf16": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float32),
    "bf16-true": (None, torch.bfloat16),
    "fp16-true": (None, torch.float16),
}


@dataclass(frozen=True)
class Computing:
    """How a model computes: on the processor or a GPU (torch's name for it), the precision of forward and backward (one
    of PRECISIONS), and the order of a picture's elements in memory: channel by channel (torch's default), or with the
    channels of each pixel together. `compiled` by torch.compile; on a GPU `deterministic` algorithms only, `tf32` in
    matrix products and convolutions of float32, and the training pictures there."""

    precision: str = "fp32"
    channels_last: bool = False
    device: str = "cpu"
    compiled: bool = False
    deterministic: bool = True
    tf32: bool = False
    pictures_on_device: bool = False

    def context(self) -> contextlib.AbstractContextManager[object]:
        """bfloat16 or float16 where torch holds that to be safe, or the types of inputs and parameters."""
        kind, _ = PRECISIONS[self.precision]
        return contextlib.nullcontext() if kind is None else torch.autocast(self.device, kind)

    def inputs(self, pictures: np.ndarray | Tensor) -> Tensor:
        """[b, C, H, W] on the device, of the same values in the parameters' type: all layers keep the order in memory
        that they are given."""
        made = torch.from_numpy(pictures) if isinstance(pictures, np.ndarray) else pictures
        made = made.contiguous(memory_format=torch.channels_last) if self.channels_last else made
        made = made if made.device.type == self.device else to_device(made, torch.device(self.device))
        return made.to(self.parameter_type)

    def set_up(self) -> None:
        """Makes torch compute so in this process; before it starts CUDA."""
        if self.device == "cpu":
            return
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = self.tf32
        torch.backends.cudnn.benchmark = not self.deterministic
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may choose as it likes
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # which only helps to find mistakes

    @property
    def parameter_type(self) -> torch.dtype:
        """What the model's parameters are: x itself in float32, or x rounded."""
        return PRECISIONS[self.precision][1]

    @property
    def scales_loss(self) -> bool:
        """Whether the gradients of layers are float16, which has no small numbers."""
        return torch.float16 in PRECISIONS[self.precision]

    def narrowed(self, model: nn.Module) -> nn.Module:
        """The model itself, its parameters now of their type."""
        return model if self.parameter_type == torch.float32 else narrow(model, self.parameter_type)

    def model(self, model: nn.Module) -> nn.Module:
        """The model as it is called."""
        return torch.compile(model) if self.compiled else model  # type: ignore[return-value]


USUAL = Computing()


class Gradient:
    """g(x) = ∇[mean loss of one minibatch + (λ/2)‖x‖²], a pure function of (seed, rank, t, x).

    The minibatch, its crops and flips and the model's own randomness (dropout) are drawn afresh from (seed, rank, t),
    so nothing random has to be saved for a run to go on where it stopped. Weight decay applies to trainable parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        sampler: Sampler,
        *,
        rank: int,
        weight_decay: float,
        computing: Computing = USUAL,
        memory: Memory | None = None,
    ) -> None:
        self._memory = MainMemory() if memory is None else memory
        self._device = self._memory.device
        self.flat = Flat(computing.narrowed(model.to(self._device)))
        self.n, self.buffers = self.flat.n, self.flat.buffers
        self.loss: float | Tensor = float("nan")  # of the latest minibatch, without the weight decay term
        self.loss_scale: Any = None  # for fp16: a vector of this memory that holds the state of `loss_scale`
        self.samples_per_step = sampler.batch_size
        self._model, self._dataset, self._sampler, self._rank = model.train(), dataset, sampler, rank
        self._called = computing.model(model)
        self._weight_decay, self._computing = weight_decay, computing
        self._g = self._memory.vector(self.n)
        self.flat.bind_gradients(self._memory.tensor(self._g))
        self._bound: Any = None
        self._next_t = -1
        self._batches: Iterator[tuple[np.ndarray, np.ndarray]] = iter(())
        self._on_device: OnDevice | None = None
        if computing.pictures_on_device:
            assert isinstance(dataset.train, MemorySplit)
            self._on_device = OnDevice(dataset.train, dataset, self._device)

    @property
    def layers(self) -> list[slice]:
        """The coordinates of each trainable parameter tensor, in the model's order."""
        return [slice(entry.start, entry.stop) for entry in self.flat.trained]

    def __call__(self, ops: Any, t: int, at: Any, only: slice | None = None) -> Any:
        """g at the point `at`, on the minibatch of clock t; also refreshes `loss` and the buffers in `at`.

        With `only`, the coordinates of some whole layers, zero elsewhere: the backward pass then computes no gradient
        of other parameters and ends below the first of these layers.
        """
        if at is not self._bound:
            self.flat.bind(self._memory.tensor(at))
            self._bound = at
        inputs, targets, seed = self._minibatch(t)
        seed_model(seed, self._device)
        ops.fill(self._g, 0.0)
        self._memory.touch([at], [self._g])  # and the buffers in `at`, of which an exchange has a copy
        self.flat.halves.round()
        with self.flat.training(only), self._computing.context():
            loss = F.cross_entropy(self._called(inputs).float(), targets)
        if self.loss_scale is None:
            loss.backward()
            self.flat.halves.collect()
        else:
            tensor = self._memory.tensor
            self._memory.touch([], [self.loss_scale])
            state = tensor(self.loss_scale)
            scale = scale_of(state)
            (loss * scale).backward()
            self.flat.halves.collect()
            unscale(tensor(self._g), scale, state)
        self.loss = loss.item() if self._device.type == "cpu" else loss.detach()
        trained = slice(0, self.flat.trainable) if only is None else only
        if self._weight_decay:
            ops.add_decay(self._g[trained], at[trained], self._weight_decay)  # g <- g + λx
        return self._g

    def warm_up(self, ops: Any, t: int, at: Any) -> None:
        """A gradient of which nothing stays but what is in `at`: so that what is slow the first time is done."""
        others = [one for one in self.flat.model.buffers() if one.dtype != torch.float32]
        before = [one.clone() for one in others]
        self(ops, t, at)
        with torch.no_grad():
            for one, value in zip(others, before, strict=True):
                one.copy_(value)
        if self.loss_scale is not None:
            ops.fill(self.loss_scale, 0.0)

    def zero(self, ops: Any) -> Any:
        """g = 0: the gradient of a worker that has just been reloaded from the center."""
        ops.fill(self._g, 0.0)
        return self._g

    def close(self) -> None:
        """Ends the reading ahead of streamed data."""
        if hasattr(self._batches, "close"):
            self._batches.close()

    def _minibatch(self, t: int) -> tuple[Tensor, Tensor, int]:
        rng = step_rng(self._sampler.seed, self._rank, t)
        if self._on_device is not None:
            pictures, targets = self._on_device.batch(self._sampler.indices(t), rng)
            return self._computing.inputs(pictures), targets, int(rng.integers(2**62))
        if t != self._next_t:
            self.close()
            self._batches = self._dataset.train.stream(order(self._sampler, t))
        self._next_t = t + 1
        images, labels = next(self._batches)
        inputs = self._computing.inputs(prepare(images, self._dataset, rng))
        return inputs, to_device(torch.from_numpy(labels), self._device), int(rng.integers(2**62))
