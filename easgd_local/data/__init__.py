"""Data sets as uint8 pictures: loaded once, shared by all workers, sampled by a pure function of (seed, rank, t).

dataset = load("digits")
fd, description = to_memfd(dataset)                       # in the launcher
dataset = from_memfd(fd, description)                     # in every worker
sampler = shard(seed, rank, workers, batch_size, len(dataset.train))
for images, labels in dataset.train.stream(order(sampler, t)):
    inputs = prepare(images, dataset, step_rng(seed, rank, t))
"""

from __future__ import annotations

from difflib import get_close_matches

from easgd_local import hardware
from easgd_local.data.augment import cut, prepare
from easgd_local.data.dataset import Dataset, MemorySplit, Split
from easgd_local.data.folder import FolderSplit
from easgd_local.data.imagefolder import load_imagefolder
from easgd_local.data.ondevice import OnDevice, to_device
from easgd_local.data.sampling import SAMPLINGS, Sampler, in_sequence, independent, order, shard, step_rng
from easgd_local.data.shared import from_memfd, to_memfd
from easgd_local.data.sources import load_cifar10, load_digits, make_synthetic

__all__ = [
    "NAMES",
    "SAMPLINGS",
    "Dataset",
    "FolderSplit",
    "MemorySplit",
    "OnDevice",
    "Sampler",
    "Split",
    "cut",
    "from_memfd",
    "in_sequence",
    "independent",
    "load",
    "make_synthetic",
    "order",
    "prepare",
    "shard",
    "step_rng",
    "to_device",
    "to_memfd",
]

NAMES = ("digits", "cifar10", "imagefolder", "synthetic")


def load(
    name: str,
    data_dir: str | None = None,
    *,
    memory_budget_bytes: int | None = None,
    size: int | None = None,
    seed: int = 0,
) -> Dataset:
    """The data set `name`, one of NAMES.

    data_dir: where cifar10 is kept (default ~/.cache/easgd_local/cifar10), or the image folder.
    memory_budget_bytes: an image folder larger than this is streamed from its files; None: a quarter of what is free.
    size: side of a stored picture of an image folder; None: see load_imagefolder.  seed: of the synthetic pictures.
    """
    if name not in NAMES:
        near = get_close_matches(name, NAMES, n=1)
        raise ValueError(
            f"data {name!r} is not known{f', did you mean {near[0]!r}' if near else ''}: it must be one of "
            f"{', '.join(NAMES)}; for your own pictures use imagefolder."
        )
    if size is not None and name != "imagefolder":
        raise ValueError(
            f"image_size={size}: the pictures of {name} have a fixed size; give a size only with imagefolder."
        )
    if memory_budget_bytes is not None and name != "imagefolder":
        raise ValueError(
            f"memory_budget={memory_budget_bytes / 2**30:g} (GiB): {name} is always held in memory; give a budget only "
            f"with imagefolder."
        )
    if data_dir is not None and name in ("digits", "synthetic"):
        raise ValueError(f"data_dir={data_dir}: {name} is read from no folder; leave data_dir out, or use imagefolder.")
    if name == "digits":
        return load_digits()
    if name == "cifar10":
        return load_cifar10(data_dir)
    if name == "synthetic":
        return make_synthetic(seed)
    budget = hardware.available_bytes() // 4 if memory_budget_bytes is None else memory_budget_bytes
    return load_imagefolder(data_dir, size=size, memory_budget_bytes=budget)
