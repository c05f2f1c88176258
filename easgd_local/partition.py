"""A model divided among workers: contiguous runs of layers with about equally many parameters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def partition(sizes: Sequence[int], parts: int) -> list[range]:
    """Cuts a list of sizes into `parts` runs, none empty, each ending as near to its share of the total as it can.

    Returns ranges of indices. Source: the layer-wise split of PASSM+ (Kungurtsev et al. 2021, arXiv:1905.11845), by
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
    before = [0, *accumulate(sizes)]
    edges = [0]
    for part in range(1, parts):
        aim = before[-1] * part / parts
        allowed = range(edges[-1] + 1, count - (parts - part) + 1)
        edges.append(min(allowed, key=lambda edge: abs(before[edge] - aim)))
    return [range(start, stop) for start, stop in zip(edges, [*edges[1:], count], strict=True)]


def overlap(one: slice, other: slice) -> slice:
    """The coordinates that lie in both; an empty slice if there are none."""
    start = max(one.start, other.start)
    return slice(start, max(start, min(one.stop, other.stop)))
