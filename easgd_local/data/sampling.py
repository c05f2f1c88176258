"""Which samples a worker sees at its step t: a pure function of (seed, rank, t), so nothing is stored to resume."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import numpy as np

SHARED, OWN = 0, 1  # first entry of a stream's key: one stream for all workers, or one per worker


@dataclass(frozen=True)
class Sampler:
    """Batches cut from an endless stream: a fresh permutation of all samples per epoch, one after the other.

        indices(t) = stream[first + t stride, ..., first + t stride + batch_size - 1]

    key: what, beside seed and epoch, distinguishes this stream's permutations. Build one with `shard` or `independent`.
    """

    seed: int
    key: tuple[int, ...]
    samples: int
    batch_size: int
    first: int
    stride: int
    _recent: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def indices(self, t: int) -> np.ndarray:
        """The samples of step t >= 0, int64[batch_size], the caller's own; a batch may straddle two epochs."""
        assert t >= 0, t
        epoch, offset = divmod(self.first + t * self.stride, self.samples)
        head = self._permutation(epoch)[offset : offset + self.batch_size]
        if len(head) == self.batch_size:
            return head.copy()
        return np.concatenate([head, self._permutation(epoch + 1)[: self.batch_size - len(head)]])

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._recent:
            while len(self._recent) >= 2:  # a straddling batch needs two
                del self._recent[next(iter(self._recent))]
            sequence = np.random.SeedSequence(self.seed, spawn_key=(*self.key, epoch))
            self._recent[epoch] = np.random.Generator(np.random.PCG64(sequence)).permutation(self.samples)
        return self._recent[epoch]


def shard(seed: int, rank: int, workers: int, batch_size: int, samples: int) -> Sampler:
    """One stream dealt out to all workers: worker i of p takes positions [(t p + i) B, (t p + i + 1) B) at step t.

    Hence the workers together use every sample exactly once per epoch, and every batch is full.
    """
    _check(seed, rank, batch_size)
    if rank >= workers:
        raise ValueError(f"rank={rank} of workers={workers}: ranks count from 0 to workers - 1; use a smaller rank.")
    if batch_size * workers > samples:
        raise ValueError(
            f"batch_size={batch_size} x workers={workers} = {batch_size * workers} samples a step, but "
            f"there are {samples}: one step takes at most one pass over them; use batch_size at most "
            f"{samples // workers}, or fewer workers."
        )
    return Sampler(seed, (SHARED,), samples, batch_size, first=rank * batch_size, stride=workers * batch_size)


def independent(seed: int, rank: int, workers: int, batch_size: int, samples: int) -> Sampler:
    """A stream of its own for every worker, over all samples: positions [t B, (t + 1) B) at step t.

    So did Zhang et al. 2015 (arXiv:1412.6651): every worker samples the whole data set.
    """
    _check(seed, rank, batch_size)
    if batch_size > samples:
        raise ValueError(
            f"batch_size={batch_size}, but there are {samples} samples: a batch is at most one pass "
            f"over them; use batch_size at most {samples}."
        )
    return Sampler(seed, (OWN, rank), samples, batch_size, first=0, stride=batch_size)


SAMPLINGS = {"shard": shard, "independent": independent}


def order(sampler: Sampler, start_t: int = 0) -> Iterator[np.ndarray]:
    """sampler.indices(t) for t = start_t, start_t + 1, ... without end."""
    return map(sampler.indices, count(start_t))


def in_sequence(samples: int, batch_size: int) -> Iterator[np.ndarray]:
    """0 .. samples - 1 in batches, the last one perhaps shorter: the order of an evaluation."""
    return (np.arange(i, min(i + batch_size, samples)) for i in range(0, samples, batch_size))


def step_rng(seed: int, rank: int, t: int) -> np.random.Generator:
    """The random numbers of worker `rank` at step t, for augmentation.

    Philox in counter mode, key = (seed, rank), counter = (0, 0, 0, t): the streams of two steps do not meet before
    2^192 blocks are drawn.
    """
    return np.random.Generator(
        np.random.Philox(key=np.array([seed, rank], np.uint64), counter=np.array([0, 0, 0, t], np.uint64))
    )


def _check(seed: int, rank: int, batch_size: int) -> None:
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed}: a seed is an integer from 0 to 2^64 - 1; use for instance seed=0.")
    if rank < 0:
        raise ValueError(f"rank={rank}: ranks count from 0 to workers - 1; use rank=0 for the first worker.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: a step needs at least one sample; use batch_size=1 or more.")
