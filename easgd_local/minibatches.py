"""The minibatches of one worker as they enter its network: a pure function of (seed, rank, t)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from easgd_local.computing import Computing
from easgd_local.data import Dataset, MemorySplit, OnDevice, Sampler, order, prepare, step_rng, to_device


class Minibatches:
    """The minibatch of each clock t, cut and flipped, on the device. Data that are streamed are read ahead as long as t
    goes up by one; `close` ends that."""

    def __init__(
        self, dataset: Dataset, sampler: Sampler, *, rank: int, computing: Computing, device: torch.device
    ) -> None:
        self._dataset, self._sampler, self._rank = dataset, sampler, rank
        self._computing, self._device = computing, device
        self._next_t = -1
        self._batches: Iterator[tuple[np.ndarray, np.ndarray]] = iter(())
        self._on_device: OnDevice | None = None
        if computing.pictures_on_device:
            assert isinstance(dataset.train, MemorySplit)
            self._on_device = OnDevice(dataset.train, dataset, device)

    def __call__(self, t: int) -> tuple[Tensor, Tensor, int]:
        """inputs [b, C, H, W], targets int64[b], and the seed of the model's own randomness in this step."""
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

    def close(self) -> None:
        """Ends the reading ahead of streamed data."""
        if hasattr(self._batches, "close"):
            self._batches.close()
