"""A folder of pictures, one subfolder per class: data_dir/train/<class>/*.jpg and data_dir/test/<class>/*.jpg."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from easgd_local.data.dataset import Dataset, MemorySplit
from easgd_local.data.folder import FolderSplit, picture_size

MIXED_SIZE = 256  # stored side of pictures that come in several sizes
CROP_RATIO = 0.875  # 28 of 32, 224 of 256


def load_imagefolder(data_dir: str | None, *, size: int | None, memory_budget_bytes: int) -> Dataset:
    """The pictures under `data_dir`, in memory if they fit in `memory_budget_bytes`, else streamed from the files.

    What is a class and what is a picture follows torchvision.datasets.ImageFolder; `val` may stand for `test`.
    size: side of a stored picture.  None: the pictures' own where the first one of every class is a square of one side,
    else 256.  A larger picture is resized by its shorter side and cut to the central square.
    """
    root = _existing(data_dir)
    train_dir, test_dir = _split_dir(root, "train"), _split_dir(root, "test", "val")
    classes, test_classes = _classes(train_dir), _classes(test_dir)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise ValueError(
            f"{train_dir.name}/ and {test_dir.name}/ in {root} differ in {', '.join(odd[:5])}: both need "
            f"the same class folders, since a label is a class's place among them; add or remove folders."
        )
    train_files, test_files = _files(train_dir, classes), _files(test_dir, classes)
    side = _own_side(train_files) if size is None else size
    if side < 8:
        raise ValueError(f"image_size={side}: a stored picture needs at least 8 x 8 pixels; use a larger size.")
    train, test = _split(train_dir, train_files, side), _split(test_dir, test_files, side)
    crop = round(side * CROP_RATIO) // 2 * 2
    if (len(train) + len(test)) * 3 * side * side <= memory_budget_bytes:
        return Dataset("imagefolder", _in_memory(train), _in_memory(test), classes, scale=1 / 255, crop=crop, flip=True)
    return Dataset("imagefolder", train, test, classes, scale=1 / 255, crop=crop, flip=True)


def _existing(data_dir: str | None) -> Path:
    if data_dir is None:
        raise ValueError(
            "data_dir=None: an image folder has no default place; give the folder that holds train/ and test/, with "
            "--data-dir."
        )
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise ValueError(f"data_dir={data_dir}: there is no such folder; give the folder that holds train/ and test/.")
    return root


def _split_dir(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise ValueError(
        f"data_dir={root}: it has no folder {' or '.join(f'{name}/' for name in names)}; pictures belong "
        f"in train/<class>/ and test/<class>/, so create it."
    )


def _classes(directory: Path) -> tuple[str, ...]:
    classes = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())
    if not classes:
        raise ValueError(
            f"{directory}: it holds no class folder; pictures belong in {directory.name}/<class>/, one "
            f"folder per class, so sort them into folders."
        )
    return tuple(classes)


def _files(directory: Path, classes: tuple[str, ...]) -> list[tuple[str, int]]:
    """Every picture with its label, classes in order, names sorted."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    try:
        return make_dataset(str(directory), {name: i for i, name in enumerate(classes)}, IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise ValueError(
            f"{directory}: {str(error).rstrip('.')}; every class needs at least one picture, so add some "
            f"or remove the folder from train/ and test/."
        ) from error


def _split(directory: Path, files: list[tuple[str, int]], side: int) -> FolderSplit:
    paths, labels = zip(*files, strict=True)
    relative = (path.removeprefix(f"{directory}/") for path in paths)
    return FolderSplit(str(directory), relative, np.array(labels), size=side)


def _own_side(files: list[tuple[str, int]]) -> int:
    """The common side of the first picture of every class, if they are squares of one size, else MIXED_SIZE."""
    firsts = {label: path for path, label in reversed(files)}
    sizes = {picture_size(path) for path in firsts.values()}
    width, height = sizes.pop()
    return width if not sizes and width == height else MIXED_SIZE


def _in_memory(split: FolderSplit) -> MemorySplit:
    return MemorySplit(*split.read(np.arange(len(split))))
