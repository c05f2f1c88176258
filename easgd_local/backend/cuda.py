"""The operations of the rules on the device: kernels of `kernels/*.cu`, enqueued on a stream, waited for by nobody.

`backend/cpu.py` is their definition; these agree with it to the bit. Vectors are addresses on the device. Operations go
to the training stream, or, during an exchange, to the stream of the exchange; what the two must not do at the same time
is put in order by events, and only where an operation really touches what the exchange still has in hand.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from ctypes import c_float, c_uint64
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from easgd_local import kernels
from easgd_local.backend.driver import Device, Driver, DriverError
from easgd_local.backend.operations import OPERATIONS, Operation
from easgd_local.backend.resources import Context, DeviceMemory, Event, Function, HostMemory, Launch, Module, Stream

THREADS = 256
MOST_BLOCKS = 1 << 16  # of a launch: beyond what a thread does once, its loop is grid-stride. Not measured yet
LINK_BLOCKS = 64  # of a launch that the link bounds, and that must not fill the device: a guess, not measured
PAGE = 4096
FERRY_BYTES = 4 << 20  # of the pinned memory through which numpy's vectors reach the device
COUNTS = 8  # how many fetched values of the counter are kept apart
NOT_FOUND = 500  # CUDA_ERROR_NOT_FOUND
_address = attrgetter("address")


class DeviceVector:
    """n float32 at an address of the device; slices look into the same memory. `whole` is the address of all of it, and
    `mapped` says that it is the host's, which the device reaches through the link.

    Slices are kept: exchanges ask for the same ones again and again.
    """

    __slots__ = ("_slices", "address", "mapped", "n", "whole")

    def __init__(self, address: int, n: int, whole: int, mapped: bool = False) -> None:
        self.address, self.n, self.whole, self.mapped = address, n, whole, mapped
        self._slices: dict[tuple[Any, Any, Any], DeviceVector] = {}

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, b: slice) -> DeviceVector:
        key = (b.start, b.stop, b.step)
        known = self._slices.get(key)
        if known is None:
            start, stop, step = b.indices(self.n)
            assert step == 1, b
            known = DeviceVector(self.address + 4 * start, max(0, stop - start), self.whole, self.mapped)
            self._slices[key] = known
        return known

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """By which torch and CuPy look into the same memory."""
        return {"shape": (self.n,), "typestr": "<f4", "data": (self.address, False), "version": 3, "strides": None}


def compiled(name: str, capability: tuple[int, int]) -> bytes:
    """The machine code of one file of kernels for GPUs of that compute capability, by NVRTC; needs no GPU."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(kernels.source(name), f"{name}.cu", [], [])
    try:
        nvrtc.compileProgram(program, [f"-arch=sm_{capability[0]}{capability[1]}", "-std=c++17"])
        return bytes(nvrtc.getCUBIN(program)) + b"\0"  # which CuPy takes off, as if this were a text
    finally:
        nvrtc.destroyProgram(program)


class Gpu:
    """One worker's hold on its device: streams, memory, kernels. A context manager that gives all of it back.

    `training` is the raw handle of the stream on which the model computes, 0 for one of its own.
    """

    def __init__(self, images: Mapping[str, bytes], device: int = 0, training: int = 0) -> None:
        self._stack = ExitStack()
        self.driver = Driver.open()
        self.device = Device(self.driver, device)
        with ExitStack() as undo:
            self._stack = undo
            self.own(Context.retain(self.device)).make_current()
            self.training = Stream.borrow(self.driver, training) if training else self.own(Stream.create(self.driver))
            self.functions: dict[str, Function] = {}
            for image in images.values():
                self._add(self.own(Module.load(self.driver, image)))
            self._counts = mmap.mmap(-1, PAGE)
            self._host = self.register(self._counts, PAGE)
            self.counter = self.allocate(2)  # as 64 bits: how many non-finite elements guarded kernels have refused
            self.training.fill(self.counter.address, 0, 2)
            self._load_kernels()
            self._stack = undo.pop_all()

    def _load_kernels(self) -> None:
        """Launches every kernel once, on nothing: a first launch may wait for all that is enqueued, so it is made
        before there is anything that waits for others."""
        nothing, word = c_uint64(0), c_uint64(self.counter.address)
        for name, kind in OPERATIONS.items():
            pointers = [nothing] * (len(kind.roles) + kind.optional)
            counter = [word] if kind.guarded else []
            self.launch(self.training, name, *pointers, *[c_float(0)] * kind.scalars, nothing, *counter)
        self.launch(self.training, "await_word", word, nothing)
        self.launch(self.training, "store_word", word, nothing)
        self.launch(self.training, "count_visit", word, nothing, nothing)
        self.launch(self.training, "fill_unless", nothing, c_float(0), word, nothing, nothing)
        self.training.synchronize()

    def own(self, resource: Any) -> Any:
        """Closed with this object, the latest first."""
        return self._stack.enter_context(resource)

    def allocate(self, n: int) -> DeviceVector:
        """n floats of the device, not cleared."""
        address = self.own(DeviceMemory.allocate(self.driver, max(4 * n, 16))).handle
        return DeviceVector(address, n, address)

    def register(self, memory: mmap.mmap, size_bytes: int) -> HostMemory:
        """Pins memory of the host where it lies."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        return self.own(HostMemory.register(self.driver, address, size_bytes))  # type: ignore[no-any-return]

    def fetch_counter(self, stream: Stream, place: int) -> None:
        """Enqueues the fetching of the counter to place 0 to COUNTS - 1."""
        stream.copy_to_host(self._host.handle + 8 * place, self.counter.address, 8)

    def fetched(self, place: int) -> int:
        """The counter as it was fetched to that place."""
        return int(struct.unpack_from("=Q", self._counts, 8 * place)[0])

    def prepare(self, name: str, *arguments: Any, n: int = 1, most: int = MOST_BLOCKS) -> Launch:
        """A kernel over n elements, four to a thread, in at most so many blocks; one thread where there is one."""
        threads = THREADS if n > 1 else 1
        return self.functions[name].prepare(min(most, -(-n // (4 * threads))), threads, *arguments)

    def launch(self, stream: Stream, name: str, *arguments: Any, n: int = 1, most: int = MOST_BLOCKS) -> None:
        """The same, enqueued at once."""
        self.prepare(name, *arguments, n=n, most=most).enqueue(stream)

    def abandon(self) -> None:
        """Gives nothing back: for a process that is about to exit, and must not wait for what it has enqueued."""
        self._stack.pop_all()

    def _add(self, module: Module) -> None:
        for name in (*OPERATIONS, *WORD_KERNELS):
            try:
                self.functions.setdefault(name, module.function(name))
            except DriverError as error:
                if error.code != NOT_FOUND:  # which only means that it is in another file
                    raise

    def __enter__(self) -> Gpu:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()


WORD_KERNELS = ("await_word", "store_word", "count_visit", "fill_unless")  # of kernels/turns.cu


class CudaOps:
    """The operations of `backend.cpu.CpuOps` by the same names and arguments, enqueued."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu, self.stream, self.training = gpu, gpu.training, gpu.training
        self._prepared: dict[tuple[Any, ...], tuple[Launch, tuple[c_float, ...]]] = {}  # and their scalars
        self._in_hand: dict[int, str] = {}  # vectors that the exchange under way uses: their address -> "r" or "w"
        self._exchange_done: Event | None = None
        self.refused, self._known = 0, 0  # what guarded kernels have refused, as far as the host was told
        self.settle: Callable[[], None] = lambda: None  # waits until the host has been told everything

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name not in OPERATIONS:
            raise AttributeError(f"{name}: there is no such operation")
        operation = partial(self._launch, name, OPERATIONS[name])
        setattr(self, name, operation)  # found at once from now on
        return operation

    @property
    def nonfinite(self) -> int:
        """Non-finite elements kept from the center since this was last set to 0, as far as the host was told."""
        return self.refused - self._known

    @nonfinite.setter
    def nonfinite(self, value: int) -> None:
        assert value == 0
        self.settle()  # what is still under way brings no further news of the same
        self._known = self.refused

    def on(self, stream: Stream) -> Elsewhere:
        """Meanwhile operations belong to an exchange, and go to its stream."""
        return Elsewhere(self, stream)

    def exchange_ends(self, done: Event) -> None:
        """The exchange is enqueued up to `done`: who touches what it has in hand waits for that."""
        self._exchange_done = done

    def hold(self, vector: Any) -> None:
        """The exchange under way writes the vector, whatever else it does with it."""
        self._in_hand[vector.whole] = "w"

    def order(self, reads: list[DeviceVector], writes: list[DeviceVector]) -> None:
        """Puts the training stream behind the exchange where it would read what that writes, or write what it uses."""
        if self.stream is not self._gpu.training:
            for role, vectors in (("r", reads), ("w", writes)):
                for vector in vectors:
                    if self._in_hand.get(vector.whole) != "w":
                        self._in_hand[vector.whole] = role
        elif self._exchange_done is not None and (
            any(self._in_hand.get(vector.whole) == "w" for vector in reads)
            or any(vector.whole in self._in_hand for vector in writes)
        ):
            self.wait_for_exchange()

    def wait_for_exchange(self) -> None:
        """Nothing enqueued for training from here on starts before the exchange is over."""
        if self._exchange_done is not None:
            self._gpu.training.wait_event(self._exchange_done)
            self._exchange_done = None
            self._in_hand.clear()

    def _launch(self, name: str, kind: Operation, *arguments: Any) -> None:
        count, n = kind.vectors, arguments[0].n
        if n == 0:
            return
        vectors, extra = arguments[:count], arguments[kind.required :]
        if None in extra:
            extra = ()
        self.order([*[vectors[place] for place in kind.reads], *extra], [vectors[place] for place in kind.writes])
        key = (name, n, *map(_address, vectors), *map(_address, extra))
        prepared = self._prepared.get(key)
        if prepared is None:
            prepared = self._prepared[key] = self._prepare(name, kind, vectors, extra)
        launch, scalars = prepared
        for scalar, value in zip(scalars, arguments[count:]):  # noqa: B905 (the rest are vectors)
            scalar.value = value
        launch.enqueue(self.stream)

    def _prepare(
        self, name: str, kind: Operation, vectors: tuple[DeviceVector, ...], extra: tuple[DeviceVector, ...]
    ) -> tuple[Launch, tuple[c_float, ...]]:
        pointers = [c_uint64(vector.address) for vector in vectors]
        if kind.optional:
            pointers.append(c_uint64(extra[0].address if extra else 0))
        scalars = tuple(c_float() for _ in range(kind.scalars))
        counter = [c_uint64(self._gpu.counter.address)] if kind.guarded else []
        n = vectors[0].n
        most = LINK_BLOCKS if any(vector.mapped for vector in (*vectors, *extra)) else MOST_BLOCKS
        return self._gpu.prepare(name, *pointers, *scalars, c_uint64(n), *counter, n=n, most=most), scalars


class Elsewhere:
    """A context manager: operations go to another stream than the one for training."""

    __slots__ = ("_ops", "_stream")

    def __init__(self, ops: CudaOps, stream: Stream) -> None:
        self._ops, self._stream = ops, stream

    def __enter__(self) -> None:
        self._ops.stream = self._stream

    def __exit__(self, *exc: object) -> None:
        self._ops.stream = self._ops.training


class Transfer:
    """Between numpy vectors and the device, through pinned memory: for starts, checkpoints and tests."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._memory = mmap.mmap(-1, FERRY_BYTES)
        self._host = gpu.register(self._memory, FERRY_BYTES)

    def load(self, y: DeviceVector, values: NDArray[np.float32]) -> None:
        """y <- values; returns when they are there."""
        ferry = np.frombuffer(self._memory, np.float32)
        for start in range(0, len(y), len(ferry)):
            piece = values[start : start + len(ferry)]
            ferry[: len(piece)] = piece
            self._gpu.training.copy_to_device(y.address + 4 * start, self._host.handle, 4 * len(piece))
            self._gpu.training.synchronize()

    def host(self, x: DeviceVector) -> NDArray[np.float32]:
        """A copy of x, when all that is enqueued for training is done."""
        ferry, values = np.frombuffer(self._memory, np.float32), np.empty(len(x), np.float32)
        for start in range(0, len(x), len(ferry)):
            piece = values[start : start + len(ferry)]
            self._gpu.training.copy_to_host(self._host.handle, x.address + 4 * start, 4 * len(piece))
            self._gpu.training.synchronize()
            piece[:] = ferry[: len(piece)]
        return values
