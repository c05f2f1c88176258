"""Which samples a worker's DataLoader takes, batch by batch: dealt out to the workers, and resumable in mid-epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from easgd_local.data.sampling import Sampler


class Batches(torch.utils.data.Sampler[list[int]]):
    """A batch sampler for a DataLoader, `DataLoader(dataset, batch_sampler=...)`: int lists of `batch_size` indices.

    Each pass goes over what is left of the present epoch, `epoch` counts them from 0, and `len` is that of a whole
    epoch. Every batch is full: samples that do not fill one in this epoch come first in the next.

    >>> from easgd_local.data.sampling import shard
    >>> ranks = [Batches(shard(seed=0, rank=i, workers=2, batch_size=3, samples=12), lambda: None) for i in range(2)]
    >>> [len(one) for one in ranks], sorted(index for one in ranks for batch in one for index in batch)
    ([2, 2], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    """

    def __init__(self, order: Sampler, next_batch: Callable[[], None]) -> None:
        self.batch_size = order.batch_size
        self.position = 0  # how many batches have been handed out
        self._order, self._next_batch = order, next_batch
        self._per_epoch = order.samples // order.stride
        self._counted_by_loader = False

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to, from 0."""
        return self.position // self._per_epoch

    def __len__(self) -> int:
        return self._per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        return self._rest(range(self.position, self.end))  # as they are now, not when the first is asked for

    def _rest(self, numbers: range) -> Iterator[list[int]]:
        for number in numbers:
            if not self._counted_by_loader:
                self.hand_out()
            yield self._order.indices(number).tolist()

    @property
    def end(self) -> int:
        """The position at the end of the present epoch."""
        return (self.epoch + 1) * self._per_epoch

    def hand_out(self) -> None:
        """The loop asks for its next batch."""
        self._next_batch()
        self.position += 1


class Positions:
    """How far a worker's batch samplers have come, in the order in which they were made."""

    def __init__(self) -> None:
        self._made: list[Batches] = []
        self._saved: list[int] = []
        self._first = 0

    def add(self, batches: Batches) -> None:
        """One more; it goes on where its predecessor in a resumed run was."""
        known = len(self._made) < len(self._saved)
        batches.position = self._saved[len(self._made)] if known else self._first
        self._made.append(batches)

    def now(self) -> list[int]:
        """The position of each."""
        return [one.position for one in self._made]

    def restore(self, saved: list[int]) -> None:
        """Undoes `now`, for those made already and those still to be made."""
        self._saved = saved
        for one, position in zip(self._made, saved, strict=False):
            one.position = position

    def begin_at(self, t: int) -> None:
        """For a worker that joins at clock t in another's place: as if it had drawn one batch a step so far."""
        self._first = t
        for one in self._made:
            one.position = t

    @property
    def batch_size(self) -> int | None:
        """Of the first; None when there is none."""
        return self._made[0].batch_size if self._made else None


class Loader(DataLoader[Any]):
    """A DataLoader that counts the batches it has handed out, so that a run resumes at the right one even when worker
    processes read ahead. Its own randomness comes from the seed and the epoch, not from the loop's generators: random
    numbers drawn in its worker processes begin anew when a run is resumed in mid-epoch."""

    def __init__(self, dataset: Any, batches: Batches, **options: Any) -> None:
        batches._counted_by_loader = True
        super().__init__(dataset, batch_sampler=batches, **options)
        self.batches = batches
        self._seed = self.generator.initial_seed()

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to, from 0."""
        return self.batches.epoch

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        assert self.generator is not None
        self.generator.manual_seed((self._seed + self.batches.epoch) % 2**63)
        ahead = super().__iter__()
        for _ in range(self.batches.position, self.batches.end):
            self.batches.hand_out()
            yield next(ahead)
