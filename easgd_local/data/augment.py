"""From stored bytes to network inputs: crop, flip, scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Preparation(Protocol):
    """What `prepare` reads of a data set; a Dataset has all three."""

    @property
    def scale(self) -> float: ...
    @property
    def crop(self) -> int | None: ...
    @property
    def flip(self) -> bool: ...


def prepare(images: np.ndarray, how: Preparation, rng: np.random.Generator | None = None) -> np.ndarray:
    """uint8[b, C, H, W] -> float32[b, C, h, w], contiguous: scale * cut(images).

    With `rng` each picture gets its own random crop and flip (training); without, the central crop (test).
    """
    return np.multiply(cut(images, how, rng), np.float32(how.scale), dtype=np.float32)


def cut(images: np.ndarray, how: Preparation, rng: np.random.Generator | None = None) -> np.ndarray:
    """uint8[b, C, H, W] -> uint8[b, C, h, w], contiguous: the crop and flip of `prepare`, still in bytes."""
    if rng is None:
        return np.ascontiguousarray(images if how.crop is None else _central(images, how.crop))
    choice = choose(len(images), images.shape[2:], how, rng)
    if choice.tops is not None and choice.lefts is not None:
        assert how.crop is not None
        windows = np.lib.stride_tricks.sliding_window_view(images, (how.crop, how.crop), axis=(2, 3))
        # [b, C, top, left, h, w] at one (top, left) per picture
        images = windows[np.arange(len(images)), :, choice.tops, choice.lefts]
    if choice.flipped is not None:
        images = np.where(choice.flipped[:, None, None, None], images[..., ::-1], images)
    return np.ascontiguousarray(images)


@dataclass(frozen=True)
class Choice:
    """What chance decides for each of b pictures: the corner of its crop, int64[b] each, and whether it is flipped,
    bool[b]; None where there is nothing to decide."""

    tops: np.ndarray | None
    lefts: np.ndarray | None
    flipped: np.ndarray | None


def choose(count: int, size: tuple[int, ...], how: Preparation, rng: np.random.Generator) -> Choice:
    """For `count` pictures of `size` (height, width). Offsets are drawn first, so that switching flips off leaves the
    crops as they were."""
    tops = lefts = flipped = None
    if how.crop is not None:
        height, width = size
        tops, lefts = rng.integers(0, (height - how.crop + 1, width - how.crop + 1), size=(count, 2)).T
    if how.flip:
        flipped = rng.integers(0, 2, size=count, dtype=np.uint8).astype(bool)
    return Choice(tops, lefts, flipped)


def _central(images: np.ndarray, side: int) -> np.ndarray:
    top, left = (images.shape[2] - side) // 2, (images.shape[3] - side) // 2
    return images[:, :, top : top + side, left : left + side]
