"""From stored bytes to network inputs: crop, flip, scale."""

from __future__ import annotations

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
    """uint8[b, C, H, W] -> uint8[b, C, h, w], contiguous: the crop and flip of `prepare`, still in bytes.

    Offsets are drawn before flips, so switching flips off leaves the crops as they were.
    """
    if rng is None:
        return np.ascontiguousarray(images if how.crop is None else _central(images, how.crop))
    if how.crop is not None:
        images = _random_crops(images, how.crop, rng)
    if how.flip:
        images = _random_flips(images, rng)
    return np.ascontiguousarray(images)


def _central(images: np.ndarray, side: int) -> np.ndarray:
    top, left = (images.shape[2] - side) // 2, (images.shape[3] - side) // 2
    return images[:, :, top : top + side, left : left + side]


def _random_crops(images: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    count, _, height, width = images.shape
    tops, lefts = rng.integers(0, (height - side + 1, width - side + 1), size=(count, 2)).T
    windows = np.lib.stride_tricks.sliding_window_view(images, (side, side), axis=(2, 3))
    return windows[np.arange(count), :, tops, lefts]  # [b, C, top, left, h, w] at one (top, left) per picture


def _random_flips(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    flipped = rng.integers(0, 2, size=len(images), dtype=np.uint8).astype(bool)
    return np.where(flipped[:, None, None, None], images[..., ::-1], images)
