"""The stochastic gradient of a built-in model on a built-in data set, as a worker sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from easgd_local.computing import USUAL, Computing
from easgd_local.data import Dataset, Sampler
from easgd_local.flat import Flat
from easgd_local.loss_scale import scale_of, unscale
from easgd_local.memory import MainMemory, Memory
from easgd_local.minibatches import Minibatches
from easgd_local.randomness import seed_model


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
        self._called = computing.model(model.train())
        self._minibatch = Minibatches(dataset, sampler, rank=rank, computing=computing, device=self._device)
        self._weight_decay, self._computing = weight_decay, computing
        self._g = self._memory.vector(self.n)
        self.flat.bind_gradients(self._memory.tensor(self._g))
        self._bound: Any = None

    @property
    def layers(self) -> list[slice]:
        """The coordinates of each trainable parameter tensor, in the model's order."""
        return self.flat.layers

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
        self._minibatch.close()
