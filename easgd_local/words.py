"""64-bit control words in shared memory, each on its own 128-byte line, by plain loads and stores only.

Every word has one writer at a time, so nothing here needs a read-modify-write. What a reader relies on is order: who
sees a word's new value must also see all that its writer stored before. x86-64 keeps stores in order and loads in
order; elsewhere (ARM64) loads acquire and stores release through libatomic.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
from typing import Protocol

LINE_BYTES = 128


class Words(Protocol):
    """A row of control words."""

    def __getitem__(self, index: int) -> int: ...
    def __setitem__(self, index: int, value: int) -> None: ...
    def __len__(self) -> int: ...


class PlainWords:
    """Words by aligned 8-byte loads and stores of the processor (right on x86-64)."""

    def __init__(self, memory: mmap.mmap, offset_bytes: int, count: int) -> None:
        line = LINE_BYTES // 8
        self._words = memoryview(memory).cast("Q")[offset_bytes // 8 :][: count * line : line]

    def __getitem__(self, index: int) -> int:
        return self._words[index]

    def __setitem__(self, index: int, value: int) -> None:
        self._words[index] = value

    def __len__(self) -> int:
        return len(self._words)


class AtomicWords:
    """Words whose loads acquire and whose stores release, by libatomic."""

    ACQUIRE, RELEASE = 2, 3

    def __init__(self, memory: mmap.mmap, offset_bytes: int, count: int) -> None:
        try:
            library = ctypes.CDLL("libatomic.so.1")
        except OSError as error:
            raise OSError(
                f"libatomic.so.1 is missing, and this processor ({platform.machine()}) needs it to keep the order of "
                f"loads and stores; install libatomic1 (Debian, Ubuntu) or libatomic (Fedora)."
            ) from error
        self._load, self._store = library.__getattr__("__atomic_load_8"), library.__getattr__("__atomic_store_8")
        self._load.restype = ctypes.c_uint64
        self._load.argtypes = (ctypes.c_void_p, ctypes.c_int)
        self._store.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int)
        self._memory = (ctypes.c_char * len(memory)).from_buffer(memory)  # keeps the mapping alive
        self._base = ctypes.addressof(self._memory) + offset_bytes
        self._count = count

    def __getitem__(self, index: int) -> int:
        return int(self._load(self._address(index), self.ACQUIRE))

    def __setitem__(self, index: int, value: int) -> None:
        if not 0 <= value < 2**64:
            raise ValueError(f"{value} does not fit into a word of 64 bits")
        self._store(self._address(index), value, self.RELEASE)

    def __len__(self) -> int:
        return self._count

    def _address(self, index: int) -> int:
        return self._base + range(self._count)[index] * LINE_BYTES


def words(memory: mmap.mmap, offset_bytes: int, count: int) -> Words:
    """The row of `count` words that starts at `offset_bytes`, with the loads and stores that this processor needs."""
    kind = PlainWords if platform.machine() in ("x86_64", "AMD64") else AtomicWords
    return kind(memory, offset_bytes, count)
