"""The center's memory: its layout, its claims, what it refuses, and that nothing of it is left."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise

import numpy as np
import pytest

from easgd_local import hardware, linux
from easgd_local.center import BLOCK_BYTES, PAGE, Center, Layout
from easgd_local.words import LINE_BYTES
from tests.conftest import descriptors

SIZES = (1, 31, 1023, 1_000_003)
WORKERS = (1, 2, 3, 4, 5)
SMALL = Layout(3, 1023, ("c", "second"), block_bytes=512)


@pytest.fixture
def center() -> Iterator[Center]:
    with Center.create(SMALL) as one:
        yield one


def layouts(n: int) -> list[Layout]:
    """Layouts of n floats with up to a few thousand blocks."""
    sizes_bytes = [size for size in (64, 4096, 100_000, BLOCK_BYTES) if 4 * n < 3000 * size]
    return [Layout(p, n, block_bytes=size) for p in WORKERS for size in sizes_bytes]


def all_blocks(layout: Layout) -> list[slice]:
    return [layout.block(b) for b in range(layout.blocks)]


def mappings() -> int:
    """How many mappings of a center this process has."""
    with open("/proc/self/maps") as maps:
        return sum("memfd:easgd_center" in line for line in maps)


# Where everything is


@pytest.mark.parametrize("n", SIZES)
def test_the_blocks_tile_the_vector(n):
    for layout in layouts(n):
        blocks = all_blocks(layout)
        assert blocks[0].start == 0 and blocks[-1].stop == n
        assert all(before.stop == after.start for before, after in pairwise(blocks)), layout
        assert all(block.start <= block.stop and block.step is None for block in blocks), layout


@pytest.mark.parametrize("n", SIZES)
def test_blocks_start_on_a_64_byte_line(n):
    for layout in layouts(n):
        assert all(block.start % 16 == 0 or block.start == n for block in all_blocks(layout)), layout


@pytest.mark.parametrize("n", SIZES)
def test_blocks_are_as_large_as_asked_for_and_about_equal(n):
    for layout in layouts(n):
        sizes_bytes = [4 * (block.stop - block.start) for block in all_blocks(layout)]
        # Bounds are those of an even division, rounded down to 64-byte lines, and the last is cut by up to 15 floats.
        assert max(sizes_bytes) <= layout.block_bytes + 64, layout
        assert max(sizes_bytes) - min(sizes_bytes) <= 64 + 60, layout


@pytest.mark.parametrize("n", SIZES)
def test_there_are_as_few_blocks_as_will_do_in_one_group_for_each_worker(n):
    for layout in layouts(n):
        groups, rest = divmod(layout.blocks, layout.workers)
        assert rest == 0 and groups > 0, layout
        assert groups == 1 or (groups - 1) * layout.workers * layout.block_bytes < 4 * n, layout


def test_a_model_of_four_mebibytes_a_worker_has_one_block_for_each():
    assert Layout(3, 3 << 20).blocks == 3
    assert Layout(3, (3 << 20) + 1).blocks == 6
    assert Layout(3, 1).blocks == 3


def offsets_bytes(center: Center, name: str) -> list[int]:
    """Where the words of a row lie in the memory: found by writing to each."""
    row, found = getattr(center, name), []
    for index in range(len(row)):
        before = center.memory[:]
        row[index] = row[index] ^ (2**64 - 1)
        after = center.memory[:]
        (first, *rest) = np.flatnonzero(np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8))
        assert len(rest) == 7
        row[index] = row[index] ^ (2**64 - 1)
        found.append(int(first))
    return found


def test_every_control_word_has_a_line_of_its_own():
    with Center.create(Layout(2, 31)) as center:
        places = [place for name in center.layout.word_counts for place in offsets_bytes(center, name)]
        assert len(places) == sum(center.layout.word_counts.values()) == 5 * 2 + 6 + 4 + 6 * 2 + 4 + 2
        assert LINE_BYTES == 128 and all(place % LINE_BYTES == 0 for place in places)
        assert len(set(places)) == len(places)
        assert min(places) == PAGE and max(places) < center.layout.vectors_offset_bytes  # header before, vectors after


def test_vectors_start_on_pages_and_do_not_overlap(center):
    vectors = [*center.vectors.values(), *center.snapshot.values()]
    assert [len(vector) for vector in vectors] == [1023] * 4
    addresses = [vector.ctypes.data for vector in vectors]
    assert all(address % PAGE == 0 for address in addresses)
    for mark, vector in enumerate(vectors, start=1):
        vector[:] = mark
    assert all(set(vector) == {mark} for mark, vector in enumerate(vectors, start=1))
    assert all(set(getattr(center, name)) == {0} for name in center.layout.word_counts)


@pytest.mark.parametrize("n", SIZES)
def test_a_new_center_is_zero(n):
    with Center.create(Layout(3, n, ("c", "second"))) as center:
        for vector in (*center.vectors.values(), *center.snapshot.values()):
            assert vector.dtype == np.float32 and vector.shape == (n,) and not vector.any()
        assert all(set(getattr(center, name)) == {0} for name in center.layout.word_counts)


# Claimed, sealed, shared


def test_all_of_the_memory_is_claimed_at_the_start():
    layout = Layout(3, 1_000_003)
    with Center.create(layout) as center:
        claimed = os.fstat(center.fd)
        assert claimed.st_size == layout.size_bytes
        assert 512 * claimed.st_blocks >= layout.size_bytes


@pytest.mark.parametrize("size_bytes", [0, SMALL.size_bytes - PAGE, SMALL.size_bytes + PAGE])
def test_the_memory_can_neither_shrink_nor_grow(center, size_bytes):
    with pytest.raises(PermissionError):
        os.ftruncate(center.fd, size_bytes)
    assert os.fstat(center.fd).st_size == SMALL.size_bytes


def test_who_attaches_sees_the_same_memory(center):
    with Center.attach(SMALL, os.dup(center.fd)) as other:
        for k, name in enumerate(SMALL.word_counts):
            getattr(center, name)[len(getattr(center, name)) - 1] = 2**63 + k
            assert getattr(other, name)[len(getattr(other, name)) - 1] == 2**63 + k
        for name in SMALL.shared:
            center.vectors[name][1022] = 1.5
            other.vectors[name][0] = 2.5
            assert other.vectors[name][1022] == 1.5 and center.vectors[name][0] == 2.5
            other.snapshot[name][7] = 3.5
            assert center.snapshot[name][7] == 3.5


@pytest.mark.parametrize("p, n, block_bytes", [(1, 1023, 512), (3, 1022, 512), (3, 1023, 1024)])
def test_another_center_than_described_is_refused(center, p, n, block_bytes):
    other = Layout(p, n, ("c", "second"), block_bytes)
    assert other.size_bytes <= SMALL.size_bytes  # refused for its header, not for its size
    with pytest.raises(ValueError, match=r"center header \[\d+, 3, 3, 9, 1023\]: expected"):
        Center.attach(other, center.fd)


def test_memory_that_is_no_center_is_refused():
    fd = linux.memfd_create("no_center")
    try:
        os.posix_fallocate(fd, 0, SMALL.size_bytes)
        with pytest.raises(ValueError, match=r"center header \[0, 0, 0, 0, 0\]: expected"):
            Center.attach(SMALL, fd)
    finally:
        os.close(fd)


# Too little memory


def no_space(fd: int, offset: int, length: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def less_than_needed() -> int:
    return SMALL.size_bytes - 1


@pytest.mark.parametrize(
    "owner, name, value", [(hardware, "available_bytes", less_than_needed), (os, "posix_fallocate", no_space)]
)
def test_too_little_memory_is_a_sentence_and_leaves_no_descriptor(monkeypatch, owner, name, value):
    before = descriptors(), mappings()
    monkeypatch.setattr(owner, name, value)
    with pytest.raises(MemoryError) as refusal:
        Center.create(SMALL)
    monkeypatch.undo()
    sentence = str(refusal.value)
    assert f"{SMALL.size_bytes:,} bytes" in sentence and "1,023 floats × 2 shared vectors" in sentence
    assert "available" in sentence and sentence.endswith("choose a smaller model or free some memory.")
    assert (descriptors(), mappings()) == before


def test_exactly_the_available_memory_is_enough(monkeypatch):
    monkeypatch.setattr(hardware, "available_bytes", lambda: SMALL.size_bytes)
    with Center.create(SMALL) as center:
        assert center.layout is SMALL


# Nothing left


def test_close_gives_everything_back():
    before = descriptors(), mappings()
    center = Center.create(SMALL)
    attached = Center.attach(SMALL, os.dup(center.fd))
    assert mappings() == before[1] + 2
    attached.close()
    assert mappings() == before[1] + 1
    center.vectors["c"][:] = 1
    center.close()
    assert (descriptors(), mappings()) == before
    center.close()  # once more does no harm


def test_a_vector_in_use_outlives_the_center():
    with Center.create(SMALL) as center:
        c = center.vectors["c"]
        c[1022] = 7
    assert c[1022] == 7


def test_leaving_the_context_closes_also_after_an_error():
    before = descriptors(), mappings()
    with pytest.raises(KeyError), ExitStack() as stack:
        stack.enter_context(Center.create(SMALL))
        raise KeyError
    assert (descriptors(), mappings()) == before


# Snapshots and the digest


UPDATES_OF_BLOCKS = [7, 8, 9, 6, 11, 8, 5, 10, 7]


def fill(center: Center) -> None:
    center.vectors["c"][:] = np.arange(1023)
    center.vectors["second"][:] = -np.arange(1023)
    for b, count in enumerate(UPDATES_OF_BLOCKS):
        center.updates[b] = count


def whole(center: Center) -> None:
    center.take_whole_snapshot()


def block_by_block(center: Center) -> None:
    for b in range(SMALL.blocks):
        center.take_snapshot(b)


@pytest.mark.parametrize("take", [whole, block_by_block])
def test_a_snapshot_copies_every_shared_vector(center, take):
    fill(center)
    take(center)
    center.vectors["c"][:] = center.vectors["second"][:] = 0
    assert np.array_equal(center.snapshot["c"], np.arange(1023))
    assert np.array_equal(center.snapshot["second"], -np.arange(1023))


def test_a_snapshot_of_one_block_leaves_the_others_alone(center):
    fill(center)
    block = center.layout.block(4)
    center.take_snapshot(4)
    for name in SMALL.shared:
        expected = np.zeros(1023)
        expected[block] = center.vectors[name][block]
        assert np.array_equal(center.snapshot[name], expected)
    assert list(center.updates_snapshot) == [0, 0, 0, 0, 11, 0, 0, 0, 0]


def test_a_state_is_what_the_snapshot_holds_whatever_happens_afterwards(center):
    fill(center)
    center.take_whole_snapshot()
    state = center.state()
    for vector in (*center.vectors.values(), *center.snapshot.values()):
        vector[:] = 5
    for b in range(9):
        center.updates[b] = center.updates_snapshot[b] = 5
    assert state.keys() == {"c", "second", "updates"}
    assert np.array_equal(state["c"], np.arange(1023)) and np.array_equal(state["second"], -np.arange(1023))
    assert state["updates"].tolist() == UPDATES_OF_BLOCKS
    assert {name: value.dtype for name, value in state.items()} == {"c": "f4", "second": "f4", "updates": "i8"}


def test_a_restored_center_is_the_one_that_gave_its_state(center):
    fill(center)
    center.take_whole_snapshot()
    with Center.create(SMALL) as other:
        other.restore(center.state())
        for name in SMALL.shared:
            assert np.array_equal(other.vectors[name], center.vectors[name])
        assert list(other.updates) == UPDATES_OF_BLOCKS
        other.take_whole_snapshot()
        assert {name: value.tolist() for name, value in other.state().items()} == {
            name: value.tolist() for name, value in center.state().items()
        }


@pytest.mark.parametrize("workers, block_bytes", [(3, 1024), (2, 512), (3, 64)])
def test_a_center_cut_into_other_blocks_goes_on_from_the_smallest_count(center, workers, block_bytes):
    fill(center)
    center.take_whole_snapshot()
    with Center.create(Layout(workers, 1023, ("c", "second"), block_bytes)) as other:
        assert other.layout.blocks != SMALL.blocks
        other.restore(center.state())
        assert np.array_equal(other.vectors["c"], np.arange(1023))
        assert np.array_equal(other.vectors["second"], -np.arange(1023))
        assert set(other.updates) == {min(UPDATES_OF_BLOCKS)}


def test_a_vector_that_the_state_does_not_name_is_left_alone(center):
    fill(center)
    center.restore({"c": np.ones(1023, np.float32), "updates": np.zeros(9, np.int64)})
    assert set(center.vectors["c"]) == {1} and np.array_equal(center.vectors["second"], -np.arange(1023))


def test_the_digest_is_over_the_bytes_of_c(center):
    zeros = center.sha256()
    center.vectors["second"][:] = center.snapshot["c"][:] = 1
    center.turn[0] = 1
    assert center.sha256() == zeros
    center.vectors["c"][1022] = -0.0  # equal to zero, but not to the bit
    assert center.sha256() != zeros
