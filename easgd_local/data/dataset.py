"""What a data set is: two splits of uint8 pictures with labels, and how a picture enters the network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

Batch = tuple[np.ndarray, np.ndarray]
"""(images uint8[b, C, H, W], labels int64[b])."""


class Split(ABC):
    """Pictures of one shape with their labels, read by index.

    labels: int64[N], read-only by convention.  shape: (channels, height, width) of a stored picture.
    """

    labels: np.ndarray
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, indices: np.ndarray) -> Batch:
        """The pictures uint8[b, C, H, W] and labels int64[b] at `indices` int64[b]; both belong to the caller."""

    def stream(self, order: Iterable[np.ndarray]) -> Iterator[Batch]:
        """One batch per index array of `order`, in that order; `order` may be endless."""
        for indices in order:
            yield self.read(indices)


class MemorySplit(Split):
    """A split held in memory: images uint8[N, C, H, W] and labels int64[N], kept without a copy."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(
                f"images are {images.dtype}{list(images.shape)}: a split in memory holds "
                f"uint8[N, C, H, W]; add the channel axis and convert with astype('uint8')."
            )
        if labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels have shape {list(labels.shape)} for {len(images)} images: every image needs "
                f"exactly one label; pass labels of shape [{len(images)}]."
            )
        self.images = images
        self.labels = labels.astype(np.int64, copy=False)
        self.shape = images.shape[1:]

    def read(self, indices: np.ndarray) -> Batch:
        return self.images.take(indices, axis=0), self.labels.take(indices)


@dataclass(frozen=True)
class Dataset:
    """A training and a test split, and how a stored picture enters the network.

        input = scale * uint8        float32; 1/255 maps bytes to [0, 1], as in Zhang et al. 2015 (arXiv:1412.6651)

    crop: side of the random training crop and of the central test crop; None: the whole picture.
    flip: whether training flips pictures left to right at random.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    scale: float
    crop: int | None
    flip: bool

    def __post_init__(self) -> None:
        if self.train.shape != self.test.shape:
            raise ValueError(
                f"{self.name}: training pictures are {self.train.shape}, test pictures {self.test.shape}: "
                f"one network sees both, so store them with one shape."
            )
        if self.crop is not None and not 0 < self.crop <= min(self.train.shape[1:]):
            raise ValueError(
                f"{self.name}: crop={self.crop} of pictures of {self.train.shape[1:]}: a crop lies inside "
                f"the picture; use crop=None for the whole one."
            )

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) as it reaches the network, after the crop."""
        channels, height, width = self.train.shape
        return (channels, height, width) if self.crop is None else (channels, self.crop, self.crop)
