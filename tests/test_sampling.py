"""The order of samples: a pure function of (seed, rank, t)."""

import numpy as np
import pytest

from easgd_local.data import Sampler, in_sequence, independent, order, shard, step_rng

WORKERS, BATCH, SAMPLES = 3, 7, 101         # nothing divides anything


def stream(samplers: list[Sampler], steps: int) -> np.ndarray:
    return np.concatenate([sampler.indices(t) for t in range(steps) for sampler in samplers])


def dealt(seed: int = 5) -> list[Sampler]:
    return [shard(seed, rank, WORKERS, BATCH, SAMPLES) for rank in range(WORKERS)]


def test_three_workers_together_see_every_sample_exactly_once_per_epoch():
    seen = stream(dealt(), steps=25)
    epochs = seen[:len(seen) // SAMPLES * SAMPLES].reshape(-1, SAMPLES)
    assert len(epochs) == 5
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(SAMPLES))
    assert not np.array_equal(epochs[0], epochs[1])


def test_an_independent_worker_sees_every_sample_exactly_once_per_its_own_epoch():
    for rank in range(WORKERS):
        seen = stream([independent(5, rank, WORKERS, BATCH, SAMPLES)], steps=40)
        for epoch in seen[:2 * SAMPLES].reshape(2, SAMPLES):
            assert np.array_equal(np.sort(epoch), np.arange(SAMPLES))


def test_independent_workers_have_different_orders():
    first, second = (independent(5, rank, WORKERS, BATCH, SAMPLES) for rank in (0, 1))
    assert not np.array_equal(first.indices(0), second.indices(0))


@pytest.mark.parametrize("make", [shard, independent])
def test_indices_do_not_depend_on_what_was_asked_before(make):
    walked = make(5, 1, WORKERS, BATCH, SAMPLES)
    forward = [walked.indices(t) for t in range(60)]
    for t in (59, 0, 31, 13, 14, 59):
        fresh = make(5, 1, WORKERS, BATCH, SAMPLES)
        assert np.array_equal(fresh.indices(t), forward[t])
        assert np.array_equal(walked.indices(t), forward[t])


@pytest.mark.parametrize("make", [shard, independent])
def test_writing_into_a_batch_does_not_change_the_stream(make):
    sampler = make(5, 1, WORKERS, BATCH, SAMPLES)
    for t in range(16):             # t = 14 straddles two epochs for `independent`, others for `shard`
        before = sampler.indices(t).copy()
        sampler.indices(t)[:] = -1
        assert np.array_equal(sampler.indices(t), before)


@pytest.mark.parametrize("make", [shard, independent])
def test_the_seed_changes_the_order(make):
    first, other = (make(seed, 0, WORKERS, BATCH, SAMPLES).indices(0) for seed in (5, 6))
    assert not np.array_equal(first, other)


def test_every_batch_is_full_and_int64():
    for t in range(20):
        for sampler in dealt():
            assert sampler.indices(t).shape == (BATCH,) and sampler.indices(t).dtype == np.int64


def test_one_step_may_use_all_samples():
    seen = stream([shard(0, rank, 3, 5, 15) for rank in range(3)], steps=2)
    assert np.array_equal(np.sort(seen[:15]), np.arange(15)) and np.array_equal(np.sort(seen[15:]), np.arange(15))


def test_order_starts_at_the_step_asked_for():
    sampler = dealt()[2]
    batches = order(sampler, 17)
    for t in (17, 18, 19):
        assert np.array_equal(next(batches), sampler.indices(t))


def test_a_test_set_is_read_in_sequence_with_a_shorter_last_batch():
    assert [list(batch) for batch in in_sequence(7, 3)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_step_generators_are_distinct_for_every_seed_rank_and_step():
    draws = {tuple(step_rng(seed, rank, t).integers(0, 2**63, size=4))
             for seed in (0, 1, 2) for rank in (0, 1, 2) for t in (0, 1, 2, 2**33)}
    assert len(draws) == 3 * 3 * 4


def test_a_step_generator_is_the_same_each_time():
    assert np.array_equal(step_rng(3, 1, 9).integers(0, 100, 50), step_rng(3, 1, 9).integers(0, 100, 50))


@pytest.mark.parametrize("make, arguments, sentence", [
    (shard, (0, 0, 3, 34, 101), "batch_size=34 x workers=3 = 102 samples a step, but there are 101.*at most 33"),
    (independent, (0, 0, 3, 102, 101), "batch_size=102, but there are 101 samples.*at most 101"),
    (shard, (0, 3, 3, 7, 101), "rank=3 of workers=3"),
    (shard, (-1, 0, 3, 7, 101), "seed=-1.*2\\^64"),
    (independent, (0, -1, 3, 7, 101), "rank=-1"),
    (independent, (0, 0, 3, 0, 101), "batch_size=0.*at least one"),
])
def test_an_impossible_order_is_refused_with_the_remedy(make, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(*arguments)
