"""Pictures that lie on the device: cut, flipped and scaled there, to the same bits as in main memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from easgd_local.data.augment import choose

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from easgd_local.data.dataset import Dataset, MemorySplit


class OnDevice:
    """A split in memory, copied to a device, and how its pictures enter the network."""

    def __init__(self, split: MemorySplit, how: Dataset, device: torch.device) -> None:
        import torch

        self._images, self._how = torch.from_numpy(split.images).to(device), how
        self._labels = torch.from_numpy(split.labels).to(device)

    def batch(self, indices: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """(inputs float32[b, C, h, w], labels int64[b]) at `indices` int64[b]: what `prepare` makes of `read`."""
        import torch

        stored, how = self._images, self._how
        height, width = stored.shape[2:]
        choice = choose(len(indices), (height, width), how, rng)
        rows, columns = np.arange(how.crop or height), np.arange(how.crop or width)
        rows = rows + (0 if choice.tops is None else choice.tops[:, None])
        if choice.flipped is not None:
            columns = np.where(choice.flipped[:, None], columns[::-1], columns)
        columns = columns + (0 if choice.lefts is None else choice.lefts[:, None])
        picked, down, across = (
            to_device(torch.from_numpy(np.ascontiguousarray(one)), stored.device)
            for one in (indices, np.atleast_2d(rows), np.atleast_2d(columns))
        )
        channels = torch.arange(stored.shape[1], device=stored.device)
        pictures = stored[
            picked[:, None, None, None], channels[:, None, None], down[:, None, :, None], across[:, None, None, :]
        ]
        return pictures.to(torch.float32) * np.float32(how.scale).item(), self._labels[picked]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, for which nobody waits."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
