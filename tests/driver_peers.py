"""One of everything that the driver has, and processes that exchange blocks by it in stream order.

Little is imported here, because every such process waits for it.
"""

from __future__ import annotations

import ctypes
import mmap
from contextlib import ExitStack
from ctypes import c_uint64
from typing import Any

import numpy as np

from easgd_local.backend.driver import Device, Driver
from easgd_local.backend.resources import Context, DeviceMemory, Event, HostMemory, Module, Stream
from easgd_local.words import LINE_BYTES, words

PAGE = 4096


class Shared:
    """Memory that can be registered: an array of bytes, its address, and its control words."""

    def __init__(self, size_bytes: int, fd: int = -1) -> None:
        self.memory = mmap.mmap(fd, size_bytes)
        self.size_bytes = size_bytes
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.words = words(self.memory, 0, PAGE // LINE_BYTES)

    def floats(self, count: int, offset_bytes: int = PAGE) -> np.ndarray:
        return np.frombuffer(self.memory, np.float32, count, offset_bytes)


class Rig:
    """One of everything, on device 0."""

    def __init__(self, stack: ExitStack, shared: Shared) -> None:
        self.shared = shared
        self.driver = Driver.open()
        self.device = Device(self.driver)
        self.context = stack.enter_context(Context.retain(self.device))
        self.context.make_current()
        self.host = stack.enter_context(HostMemory.register(self.driver, shared.address, shared.size_bytes))
        self.memory = stack.enter_context(DeviceMemory.allocate(self.driver, 64 * 1024))
        self.stream = stack.enter_context(Stream.create(self.driver))
        self.event = stack.enter_context(Event.create(self.driver))
        self.module = stack.enter_context(Module.load(self.driver, b"any"))

    def word(self, index: int) -> int:
        return self.host.device_address(index * LINE_BYTES)

    def add(self, stream: Stream, *arguments: Any) -> None:
        self.module.function("add").launch(stream, 1, 32, *arguments)


# Processes that exchange blocks through shared memory

FLOATS = 256  # in a block
SLOTS = 3
LOG = PAGE + SLOTS * FLOATS * 4  # where the consumer notes what it got; before it the words and the slots
FULL, TAKEN = 0, SLOTS  # rows of words: how many blocks were put into the slot, and taken out of it


def store(fd: int, index: int, value: int) -> None:
    """Writes one word."""
    Shared(PAGE, fd).words[index] = value


def produce(fd: int, count: int, waits: bool) -> None:
    """Block k, all k + 1, goes into slot k mod SLOTS once that is empty; all in stream order."""
    with ExitStack() as stack:
        rig = Rig(stack, Shared(size_bytes(count), fd))
        y, x, bytes_ = rig.memory.handle, rig.memory.handle + FLOATS * 4, FLOATS * 4
        zeros = rig.host.handle + LOG + count * bytes_
        rig.shared.floats(FLOATS, LOG + (count + 1) * bytes_)[:] = 1
        rig.stream.copy_to_device(y, zeros, bytes_)
        rig.stream.copy_to_device(x, zeros + bytes_, bytes_)
        for k in range(count):
            visit, slot = divmod(k, SLOTS)
            rig.add(rig.stream, c_uint64(y), c_uint64(x), c_uint64(FLOATS))
            if waits:
                rig.stream.wait_value(rig.word(TAKEN + slot), visit)
            rig.stream.copy_to_host(rig.host.handle + PAGE + slot * bytes_, y, bytes_)
            rig.stream.write_value(rig.word(FULL + slot), visit + 1)
        rig.stream.synchronize()


def consume(fd: int, count: int, waits: bool) -> None:
    """Takes the blocks in order and notes each in the log."""
    with ExitStack() as stack:
        rig = Rig(stack, Shared(size_bytes(count), fd))
        at, bytes_ = rig.memory.handle, FLOATS * 4
        for k in range(count):
            visit, slot = divmod(k, SLOTS)
            if waits:
                rig.stream.wait_value(rig.word(FULL + slot), visit + 1)
            rig.stream.copy_to_device(at, rig.host.handle + PAGE + slot * bytes_, bytes_)
            rig.stream.write_value(rig.word(TAKEN + slot), visit + 1)
            rig.stream.copy_to_host(rig.host.handle + LOG + k * bytes_, at, bytes_)
        rig.stream.synchronize()


def size_bytes(count: int) -> int:
    """Bytes of the shared memory: words, slots, log, a block of zeros and one of ones."""
    return -(-(LOG + (count + 2) * FLOATS * 4) // PAGE) * PAGE


def wrong_blocks(fd: int, count: int) -> int:
    """How many blocks in the log are not wholly of their number."""
    log = Shared(size_bytes(count), fd).floats(count * FLOATS, LOG).reshape(count, FLOATS)
    return int((log != np.arange(1, count + 1)[:, None]).any(axis=1).sum())
