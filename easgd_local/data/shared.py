"""One copy of a data set for all workers: the launcher fills a memfd, every worker maps it read-only."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from easgd_local import hardware, linux
from easgd_local.data.dataset import Dataset, MemorySplit, Split
from easgd_local.data.folder import FolderSplit

ALIGNMENT = 128  # bytes: no two arrays on one cache line


@dataclass(frozen=True)
class Placed:
    """Where a MemorySplit lies in the memfd: images uint8[shape] and labels int64[shape[0]] at byte offsets."""

    shape: tuple[int, ...]
    images_at: int
    labels_at: int

    @property
    def end(self) -> int:
        return self.labels_at + 8 * self.shape[0]


def to_memfd(dataset: Dataset) -> tuple[int | None, dict[str, Any]]:
    """Copies every array of `dataset` into one sealed memfd; returns (descriptor, description) for from_memfd.

    The caller owns the descriptor: the memory is freed once it is closed and no mapping is left. The description
    pickles; a FolderSplit travels inside it, and where both splits are folders the descriptor is None. Raises
    MemoryError when there is no room.
    """
    train = _place(dataset.train, 0)
    test = _place(dataset.test, train.end if isinstance(train, Placed) else 0)
    size_bytes = max(part.end if isinstance(part, Placed) else 0 for part in (train, test))
    about = {field.name: getattr(dataset, field.name) for field in fields(dataset)}
    description = {"about": {**about, "train": train, "test": test}, "size_bytes": size_bytes}
    if size_bytes == 0:
        return None, description
    fd = _claim(dataset.name, size_bytes)
    try:
        for split, place in ((dataset.train, train), (dataset.test, test)):
            if isinstance(split, MemorySplit) and isinstance(place, Placed):
                _write(fd, split.images, place.images_at)
                _write(fd, split.labels, place.labels_at)
        linux.seal_size(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd, description


def from_memfd(fd: int | None, description: dict[str, Any], *, threads: int | None = None) -> Dataset:
    """The data set that to_memfd described, as read-only views of the shared memory, without a copy.

    The mapping keeps the memory alive, so `fd` may be closed afterwards. threads: decoding threads of a streamed split
    in this process; None: as it was.
    """
    memory = None if fd is None else mmap.mmap(fd, description["size_bytes"], access=mmap.ACCESS_READ)
    about = description["about"]
    parts = {name: _take(about[name], memory, threads) for name in ("train", "test")}
    return Dataset(**{**about, **parts})


def _place(split: Split, start: int) -> Placed | Split:
    if not isinstance(split, MemorySplit):
        return split
    images_at = _aligned(start)
    return Placed(split.images.shape, images_at, _aligned(images_at + split.images.size))


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _claim(name: str, size_bytes: int) -> int:
    """A memfd whose pages exist, so that lack of room is an error here and not a SIGBUS at first touch."""
    room = hardware.available_bytes()  # claiming more would not fail but wake the kernel's out-of-memory killer
    if size_bytes > room:
        raise _no_room(name, size_bytes, f"{room / 2**30:.1f} GiB are available")
    fd = linux.memfd_create(f"easgd_local-{name}")
    try:
        os.posix_fallocate(fd, 0, size_bytes)
    except OSError as error:
        os.close(fd)
        raise _no_room(name, size_bytes, error.strerror or str(error)) from error
    return fd


def _no_room(name: str, size_bytes: int, why: str) -> MemoryError:
    return MemoryError(
        f"data set {name} takes {size_bytes / 2**30:.1f} GiB of shared memory: it must fit once beside "
        f"the workers ({why}); free memory, or stream the pictures with --data imagefolder and a "
        f"smaller memory budget."
    )


def _write(fd: int, array: np.ndarray, offset: int) -> None:
    left = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    while left:  # one write moves at most 2 GiB
        written = os.pwrite(fd, left, offset)
        left, offset = left[written:], offset + written


def _take(part: Placed | Split, memory: mmap.mmap | None, threads: int | None) -> Split:
    if isinstance(part, Placed):
        assert memory is not None, "arrays were placed, but there is no descriptor to map"
        count = part.shape[0]
        images = np.frombuffer(memory, np.uint8, int(np.prod(part.shape)), part.images_at).reshape(part.shape)
        return MemorySplit(images, np.frombuffer(memory, np.int64, count, part.labels_at))
    return part.with_threads(threads) if isinstance(part, FolderSplit) and threads is not None else part
