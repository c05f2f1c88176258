"""Control words: both kinds behave alike, and who sees a word sees what was stored before it."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from easgd_local import linux
from easgd_local import words as module
from easgd_local.words import LINE_BYTES, AtomicWords, PlainWords, words

LINE = LINE_BYTES // 8
COUNT, OFFSET = 5, 3 * LINE_BYTES


def has_libatomic() -> bool:
    try:
        ctypes.CDLL("libatomic.so.1")
    except OSError:
        return False
    return True


needs_libatomic = pytest.mark.skipif(not has_libatomic(), reason="libatomic.so.1 is not installed")
BOTH = pytest.mark.parametrize("kind", [PlainWords, pytest.param(AtomicWords, marks=needs_libatomic)])


@pytest.fixture
def memory() -> Iterator[mmap.mmap]:
    yield mmap.mmap(-1, mmap.PAGESIZE)


@BOTH
def test_words_lie_one_to_a_line_and_nothing_else_is_touched(kind, memory):
    row = kind(memory, OFFSET, COUNT)
    expected = np.zeros(mmap.PAGESIZE // 8, np.uint64)
    for index, value in enumerate((1, 2**62, 2**64 - 1, 0, 77)):
        row[index] = value
        expected[OFFSET // 8 + index * LINE] = value
    assert np.array_equal(np.frombuffer(memory, np.uint64), expected)


@BOTH
def test_words_read_what_the_memory_holds(kind, memory):
    row = kind(memory, OFFSET, COUNT)
    np.frombuffer(memory, np.uint64)[OFFSET // 8 :: LINE][:COUNT] = (5, 2**63, 0, 2**64 - 1, 4)
    assert [row[index] for index in range(COUNT)] == [5, 2**63, 0, 2**64 - 1, 4]
    assert list(row) == [5, 2**63, 0, 2**64 - 1, 4] and len(row) == COUNT
    assert all(type(word) is int for word in row)


@BOTH
def test_a_negative_index_counts_from_the_end(kind, memory):
    row = kind(memory, OFFSET, COUNT)
    row[-1], row[-COUNT] = 9, 8
    assert list(row) == [8, 0, 0, 0, 9] and (row[-1], row[-COUNT]) == (9, 8)


@BOTH
@pytest.mark.parametrize("index", [COUNT, COUNT + 1, -COUNT - 1, 2**40])
def test_a_word_that_is_not_there_is_an_index_error(kind, memory, index):
    row = kind(memory, OFFSET, COUNT)
    with pytest.raises(IndexError):
        row[index]
    with pytest.raises(IndexError):
        row[index] = 1
    assert not any(memory[:])


@BOTH
@pytest.mark.parametrize("value", [-1, 2**64])
def test_a_value_that_does_not_fit_is_refused(kind, memory, value):
    row = kind(memory, OFFSET, COUNT)
    with pytest.raises(ValueError):
        row[1] = value
    assert not any(memory[:])


@BOTH
def test_the_row_keeps_the_mapping_alive(kind):
    row = kind(mmap.mmap(-1, mmap.PAGESIZE), OFFSET, COUNT)
    row[4] = 6
    assert row[4] == 6


@pytest.mark.parametrize(
    "machine, kind", [("x86_64", PlainWords), ("AMD64", PlainWords), ("aarch64", AtomicWords), ("riscv64", AtomicWords)]
)
def test_only_x86_64_does_without_acquire_and_release(monkeypatch, memory, machine, kind):
    monkeypatch.setattr(module.platform, "machine", lambda: machine)
    monkeypatch.setattr(ctypes, "CDLL", AnyLibrary)
    assert type(words(memory, OFFSET, COUNT)) is kind


class AnyLibrary:
    """Stands for libatomic where only the choice matters."""

    def __init__(self, name: str) -> None:
        assert name == "libatomic.so.1"

    def __getattr__(self, name: str) -> Any:
        return lambda: None


def test_a_missing_libatomic_is_told_with_its_remedy(monkeypatch, memory):
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(OSError, match=r"^libatomic\.so\.1 is missing, .*; install libatomic1 \(Debian, Ubuntu\)"):
        AtomicWords(memory, OFFSET, COUNT)


# Order, between two processes

ROUNDS = 2000

WRITER = f"""
import mmap, sys, time
import numpy as np
from easgd_local.words import AtomicWords, PlainWords
memory = mmap.mmap(int(sys.argv[2]), 2 * mmap.PAGESIZE)
sent, seen = (globals()[sys.argv[1]](memory, offset, 1) for offset in (0, 128))
data = np.frombuffer(memory, np.float32, 301, mmap.PAGESIZE)
for number in range(1, {ROUNDS} + 1):
    data[:] = number
    sent[0] = number
    while number % 8 == 0 and seen[0] < number:
        time.sleep(0)
"""


@BOTH
def test_who_sees_a_word_sees_the_data_stored_before_it(kind):
    # 1. data <- 1, 2. word <- 1, 3. the reader sees the word: then it must see the data, or something newer.
    fd = linux.memfd_create("litmus")
    os.ftruncate(fd, 2 * mmap.PAGESIZE)
    memory = mmap.mmap(fd, 2 * mmap.PAGESIZE)
    sent, seen = (kind(memory, offset, 1) for offset in (0, 128))
    data = np.frombuffer(memory, np.float32, 301, mmap.PAGESIZE)
    writer = subprocess.Popen([sys.executable, "-c", WRITER, kind.__name__, str(fd)], pass_fds=[fd])
    try:
        number = early = 0
        while number < ROUNDS:
            number = sent[0]
            early += int(data.min() < number)
            seen[0] = number
            assert writer.poll() in (None, 0)
    finally:
        writer.kill()
        writer.wait()
        os.close(fd)
    assert early == 0
