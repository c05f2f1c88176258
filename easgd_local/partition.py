"""A model divided among workers: contiguous runs of layers with about equally many parameters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np


def partition(sizes: Sequence[int], parts: int) -> list[range]:
    """Cuts a list of sizes into `parts` runs, none empty, as equal as runs of whole entries can be: the sum of the
    squares of their sizes is the least possible.

    Returns ranges of indices. Source: the layer-wise split of PASSM+ (Kungurtsev et al. 2021, arXiv:1905.11845), on
    prefix sums. Raises `ValueError` when there are fewer sizes than parts.

    >>> partition([8192, 128, 8192, 64, 640, 10], 2)
    [range(0, 2), range(2, 6)]
    """
    count = len(sizes)
    if parts < 1 or count < parts:
        raise ValueError(
            f"workers={parts}: the model has {count} parameter tensors to divide among the workers, and each needs at "
            f"least one; choose at most {count} workers, or a deeper model."
        )
    before = np.array([0.0, *accumulate(sizes)])
    cost = np.where(np.tri(count + 1, dtype=bool), np.inf, (before - before[:, None]) ** 2)  # of a run from i to j > i
    least, last = np.where(np.arange(count + 1) == 0, 0.0, np.inf), []  # of the first j sizes in the runs made so far
    for _ in range(parts):
        total = least[:, None] + cost
        last.append(total.argmin(axis=0))  # where the last of the runs begins, for each j
        least = total.min(axis=0)
    edges = [count]
    for begins in reversed(last):
        edges.append(int(begins[edges[-1]]))
    return [range(start, stop) for start, stop in zip(edges[:0:-1], edges[-2::-1], strict=True)]


def share_out(layers: Sequence[slice], workers: int) -> list[slice]:
    """The coordinates that each worker owns of a model with these layers; `ValueError` when there are fewer layers."""
    parts = partition([layer.stop - layer.start for layer in layers], workers)
    return [slice(layers[part[0]].start, layers[part[-1]].stop) for part in parts]


def overlap(one: slice, other: slice) -> slice:
    """The coordinates that lie in both; an empty slice if there are none."""
    start = max(one.start, other.start)
    return slice(start, max(start, min(one.stop, other.stop)))
