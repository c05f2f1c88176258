"""Pictures that stay in their files: decoded by threads, ahead of the training."""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from easgd_local import hardware
from easgd_local.data.dataset import Batch, Split

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES_PER_TASK = 8  # amortizes the cost of a task, and still spreads a batch over the threads
TINY = 64  # below this side decoding is mostly Python: a second thread only slows the first


@contextmanager
def _opened(path: Path | str) -> Iterator[Image]:
    """The picture in `path`, its header read and its pixels not yet; a broken file is named."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            yield picture
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path}: not a readable picture ({error}); every file with a picture's ending must decode; "
            f"replace or remove it."
        ) from error


def picture_size(path: Path | str) -> tuple[int, int]:
    """(width, height) of the picture in `path`, from its header alone."""
    with _opened(path) as picture:
        return picture.size


def decode(path: Path | str, size: int) -> np.ndarray:
    """The picture in `path` as uint8[3, size, size]: shorter side resized to `size`, then the central square."""
    with _opened(path) as picture:
        picture.draft("RGB", (size, size))  # a large JPEG is decoded at 1/2, 1/4 or 1/8, never below `size`
        rgb = picture.convert("RGB")
        if rgb.size != (size, size):
            rgb = _central_square(rgb, size)
        return np.asarray(rgb).transpose(2, 0, 1)


def _central_square(picture: Image, size: int) -> Image:
    from PIL.Image import Resampling

    width, height = picture.size
    ratio = size / min(width, height)
    width, height = max(size, round(width * ratio)), max(size, round(height * ratio))
    left, top = (width - size) // 2, (height - size) // 2
    resized = picture.resize((width, height), Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


class FolderSplit(Split):
    """A split whose pictures are decoded from files when they are read; picklable, as it holds only names and labels.

    root, paths: the files, relative to root.  size: side of a decoded picture.
    threads: decoding threads while reading; None: one per usable core, or a single one for tiny pictures.
    ahead: batches decoded before they are asked for, which bounds the memory to (ahead + 1) batches.
    """

    def __init__(
        self,
        root: str,
        paths: Iterable[str],
        labels: np.ndarray,
        *,
        size: int,
        threads: int | None = None,
        ahead: int = 2,
    ) -> None:
        self.root = root
        self.paths = tuple(paths)
        self.labels = labels.astype(np.int64, copy=False)
        self.shape = (3, size, size)
        self.threads = (1 if size < TINY else hardware.cores()) if threads is None else threads
        self.ahead = ahead
        if self.threads < 1:
            raise ValueError(f"threads={threads}: at least one thread must decode the pictures; use threads=1.")

    def with_threads(self, threads: int) -> FolderSplit:
        """The same split, decoding with `threads` threads: p workers share the cores."""
        return FolderSplit(self.root, self.paths, self.labels, size=self.shape[1], threads=threads, ahead=self.ahead)

    def read(self, indices: np.ndarray) -> Batch:
        [batch] = self.stream([indices])
        return batch

    def stream(self, order: Iterable[np.ndarray]) -> Iterator[Batch]:
        """As Split.stream, decoding up to `ahead` batches beyond the one handed out; closing it ends the threads."""
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
        pending: deque[tuple[Batch, list[Future]]] = deque()
        try:
            for indices in order:
                pending.append(self._begin(pool, np.asarray(indices)))
                if len(pending) > self.ahead:
                    yield _finish(pending.popleft())
            while pending:
                yield _finish(pending.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self, pool: ThreadPoolExecutor, indices: np.ndarray) -> tuple[Batch, list[Future]]:
        images = np.empty((len(indices), *self.shape), np.uint8)
        cuts = [slice(i, i + PICTURES_PER_TASK) for i in range(0, len(indices), PICTURES_PER_TASK)]
        tasks = [pool.submit(self._decode_into, images[cut], indices[cut]) for cut in cuts]
        return (images, self.labels[indices]), tasks

    def _decode_into(self, images: np.ndarray, indices: np.ndarray) -> None:
        for image, index in zip(images, indices, strict=True):
            image[...] = decode(os.path.join(self.root, self.paths[index]), self.shape[1])


def _finish(begun: tuple[Batch, list[Future]]) -> Batch:
    batch, tasks = begun
    for task in tasks:
        task.result()  # raises here what the thread raised
    return batch
