"""The data sets that need no folder of pictures: digits (shipped), cifar10 (downloaded), synthetic (made)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from easgd_local.data.dataset import Dataset, MemorySplit

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

CIFAR10_DIR = "~/.cache/easgd_local/cifar10"


def load_digits() -> Dataset:
    """1797 handwritten digits of 8 x 8 pixels with values 0..16: 1437 to train, 360 to test, always the same ones.

    Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits (doi:10.24432/C50P49); see DIGITS.md.
    """
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        train = MemorySplit(file["train_images"], file["train_labels"])
        test = MemorySplit(file["test_images"], file["test_labels"])
    return Dataset("digits", train, test, tuple("0123456789"), scale=1 / 16, crop=None, flip=False)


def load_cifar10(data_dir: str | None) -> Dataset:
    """CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 pictures of 32 x 32, cropped to 28 as in arXiv:1412.6651.

    Downloaded through torchvision into `data_dir` when it is not there yet.
    """
    from torchvision.datasets import CIFAR10

    root = Path(data_dir or CIFAR10_DIR).expanduser()
    try:
        train, test = CIFAR10(str(root), train=True, download=True), CIFAR10(str(root), train=False)
    except (OSError, RuntimeError) as error:  # no route, no room, a broken archive
        raise ValueError(
            f"cifar10 could not be fetched into {root} ({error}); it is read from "
            f"{root}/{CIFAR10.base_folder}; download {CIFAR10.url} by hand into {root}, or train on your "
            f"own copy of the pictures with --data imagefolder."
        ) from error
    classes = tuple(train.classes)
    return Dataset("cifar10", _channels_first(train), _channels_first(test), classes, scale=1 / 255, crop=28, flip=True)


def _channels_first(part: CIFAR10) -> MemorySplit:
    return MemorySplit(np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)), np.array(part.targets))


def make_synthetic(
    seed: int,
    *,
    shape: tuple[int, int, int] = (3, 32, 32),
    classes: int = 10,
    train_samples: int = 4096,
    test_samples: int = 1024,
) -> Dataset:
    """Pictures that can be learnt: one coarse random prototype per class, and noise on every pixel.

    pixel = clip(128 + 32 z_class + 48 z)        z, z_class standard normal; z_class is constant on 4 x 4 pixels
    """
    rng = np.random.default_rng(seed)
    channels, height, width = shape
    coarse = rng.standard_normal((classes, channels, -(-height // 4), -(-width // 4)), np.float32)
    prototypes = 128 + 32 * coarse.repeat(4, axis=2).repeat(4, axis=3)[:, :, :height, :width]
    train, test = _around(prototypes, train_samples, rng), _around(prototypes, test_samples, rng)
    names = tuple(f"class{i}" for i in range(classes))
    return Dataset("synthetic", train, test, names, scale=1 / 255, crop=None, flip=False)


def _around(prototypes: np.ndarray, samples: int, rng: np.random.Generator) -> MemorySplit:
    labels = rng.permutation(np.arange(samples) % len(prototypes))
    pixels = rng.standard_normal((samples, *prototypes.shape[1:]), np.float32)
    pixels *= 48
    pixels += prototypes[labels]
    return MemorySplit(pixels.clip(0, 255).astype(np.uint8), labels)
