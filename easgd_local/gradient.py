"""The stochastic gradient of a built-in model on a built-in data set, as a worker sees it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from easgd_local.backend.cpu import CpuOps, Vector, vector
from easgd_local.data import Dataset, Sampler, order, prepare, step_rng
from easgd_local.flat import Flat

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Computing:
    """How a model computes: the precision of forward and backward (one of PRECISIONS), and the order of a picture's
    elements in memory: channel by channel (torch's default), or with the channels of each pixel together."""

    precision: str = "fp32"
    channels_last: bool = False

    def context(self) -> contextlib.AbstractContextManager[object]:
        """bfloat16 where torch holds that to be safe, or plain float32."""
        if self.precision == "bf16":
            return torch.autocast("cpu", torch.bfloat16)
        return contextlib.nullcontext()

    def inputs(self, pictures: np.ndarray) -> torch.Tensor:
        """float32[b, C, H, W], of the same values: all layers keep the order in memory that they are given."""
        made = torch.from_numpy(pictures)
        return made.contiguous(memory_format=torch.channels_last) if self.channels_last else made


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
    ) -> None:
        self.flat = Flat(model)
        self.n, self.buffers = self.flat.n, self.flat.buffers
        self.loss = float("nan")  # of the latest minibatch, without the weight decay term
        self.samples_per_step = sampler.batch_size
        self._model, self._dataset, self._sampler, self._rank = model.train(), dataset, sampler, rank
        self._weight_decay, self._computing = weight_decay, computing
        self._g = vector(self.n)
        self.flat.bind_gradients(self._g)
        self._bound: Vector | None = None
        self._next_t = -1
        self._batches: Iterator[tuple[np.ndarray, np.ndarray]] = iter(())

    @property
    def layers(self) -> list[slice]:
        """The coordinates of each trainable parameter tensor, in the model's order."""
        return [slice(entry.start, entry.stop) for entry in self.flat.trained]

    def __call__(self, ops: CpuOps, t: int, at: Vector, only: slice | None = None) -> Vector:
        """g at the point `at`, on the minibatch of clock t; also refreshes `loss` and the buffers in `at`.

        With `only`, the coordinates of some whole layers, zero elsewhere: the backward pass then computes no gradient
        of other parameters and ends below the first of these layers.
        """
        if at is not self._bound:
            self.flat.bind(at)
            self._bound = at
        inputs, targets, seed = self._minibatch(t)
        torch.manual_seed(seed)
        ops.fill(self._g, 0.0)
        with self.flat.training(only), self._computing.context():
            loss = F.cross_entropy(self._model(inputs), targets)
        loss.backward()
        self.loss = loss.item()
        trained = slice(0, self.flat.trainable) if only is None else only
        if self._weight_decay:
            ops.add_decay(self._g[trained], at[trained], self._weight_decay)  # g <- g + λx
        return self._g

    def zero(self, ops: CpuOps) -> Vector:
        """g = 0: the gradient of a worker that has just been reloaded from the center."""
        ops.fill(self._g, 0.0)
        return self._g

    def close(self) -> None:
        """Ends the reading ahead of streamed data."""
        if hasattr(self._batches, "close"):
            self._batches.close()

    def _minibatch(self, t: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        if t != self._next_t:
            self.close()
            self._batches = self._dataset.train.stream(order(self._sampler, t))
        self._next_t = t + 1
        images, labels = next(self._batches)
        rng = step_rng(self._sampler.seed, self._rank, t)
        pictures = prepare(images, self._dataset, rng)
        return self._computing.inputs(pictures), torch.from_numpy(labels), int(rng.integers(2**62))
