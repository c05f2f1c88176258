"""The batch sampler of a worker: shards, epochs, and positions that survive a resume and a loader that reads ahead."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from easgd_local.batches import Batches, Loader, Positions
from easgd_local.data.sampling import independent, shard

SAMPLES, BATCH, WORKERS = 103, 8, 3
DATASET = TensorDataset(torch.arange(SAMPLES))


def batches(rank: int = 0, position: int = 0, told: list[int] | None = None) -> Batches:
    one = Batches(shard(0, rank, WORKERS, BATCH, SAMPLES), lambda: None if told is None else told.append(one.position))
    one.position = position
    return one


def test_in_an_epoch_no_two_workers_see_the_same_sample():
    seen = [index for rank in range(WORKERS) for indices in batches(rank) for index in indices]
    assert len(seen) == len(set(seen)) == SAMPLES // (BATCH * WORKERS) * BATCH * WORKERS


def test_samples_that_fill_no_batch_come_in_the_next_epoch():
    ranks = [batches(rank) for rank in range(WORKERS)]
    first = {index for one in ranks for indices in one for index in indices}
    assert [one.epoch for one in ranks] == [1, 1, 1]
    second = [index for one in ranks for indices in one for index in indices]
    assert set(range(SAMPLES)) - first <= set(second)


def test_the_length_is_that_of_an_epoch_and_a_pass_goes_on_in_its_middle():
    one = batches(position=2)
    assert len(one) == 4 and one.epoch == 0
    assert list(one) == list(batches())[2:]
    assert one.position == 4 and one.epoch == 1


def test_independent_workers_draw_from_everything():
    one = Batches(independent(0, 1, WORKERS, BATCH, SAMPLES), lambda: None)
    assert len(one) == SAMPLES // BATCH
    assert len({index for indices in one for index in indices}) == SAMPLES // BATCH * BATCH


def test_a_plain_loader_tells_the_worker_before_each_batch():
    told: list[int] = []
    one = batches(told=told)
    for number, _ in enumerate(DataLoader(DATASET, batch_sampler=one)):
        assert told == list(range(number + 1)) and one.position == number + 1


@pytest.mark.parametrize("processes", [0, 2])
def test_a_loader_counts_what_the_loop_has_got_also_when_it_reads_ahead(processes):
    told: list[int] = []
    one = batches(told=told)
    loader = Loader(DATASET, one, num_workers=processes, generator=torch.Generator().manual_seed(1))
    whole = [batch[0].tolist() for batch in batches_of(DATASET, batches())]
    got = []
    for number, (batch,) in enumerate(loader):
        got.append(batch.tolist())
        assert told == list(range(number + 1)) and one.position == number + 1
        if number == 1:
            break
    got += [batch.tolist() for (batch,) in loader]  # what is left of the epoch
    assert got == whole and loader.epoch == 1


def batches_of(dataset: TensorDataset, one: Batches) -> DataLoader[list[torch.Tensor]]:
    return DataLoader(dataset, batch_sampler=one)


def test_a_loader_leaves_the_loops_own_random_numbers_alone():
    loader = Loader(DATASET, batches(), shuffle=False, generator=torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    assert len(list(loader)) == 4
    assert torch.equal(torch.get_rng_state(), before)


def test_positions_are_restored_to_samplers_made_before_and_after():
    made = Positions()
    early = batches()
    made.add(early)
    made.restore([3, 2])
    late = batches()
    made.add(late)
    assert (early.position, late.position, made.now(), made.batch_size) == (3, 2, [3, 2], BATCH)


class Noisy(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(1)


def test_a_loaders_processes_draw_other_noise_in_every_epoch():
    loader = Loader(Noisy(), batches(), num_workers=1, generator=torch.Generator().manual_seed(1))
    first, second = (torch.cat(list(loader)) for _ in range(2))
    assert not torch.equal(first, second)
