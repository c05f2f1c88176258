"""What the driver lends, each given back once: contexts, memory, streams, events, modules and their functions."""

from __future__ import annotations

import ctypes
from ctypes import c_void_p
from types import TracebackType
from typing import Any, TypeVar

from easgd_local.backend.driver import Device, Driver

Self = TypeVar("Self", bound="Resource")


class Resource:
    """What the driver lends: a context manager, and `close` gives it back, once."""

    def __init__(self, driver: Driver, handle: int, *give_back: Any) -> None:
        """`give_back`: the call that ends it and its arguments, or nothing for what belongs to someone else."""
        self.driver, self.handle, self._give_back = driver, handle, give_back

    def close(self) -> None:
        if "handle" in self.__dict__:
            del self.handle  # 0 would be the default stream
            if self._give_back:
                self.driver.call(*self._give_back)

    def __getattr__(self, name: str) -> Any:
        assert name != "handle", f"this {type(self).__name__} is closed"
        raise AttributeError(name)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Context(Resource):
    """The device's primary context, which torch and CuPy use too."""

    @classmethod
    def retain(cls, device: Device) -> Context:
        """Close it last: with its last user the driver drops all that was made in it."""
        handle = device.driver.get("cuDevicePrimaryCtxRetain", device.handle)
        return cls(device.driver, handle, "cuDevicePrimaryCtxRelease_v2", device.handle)

    def make_current(self) -> None:
        """On the calling thread."""
        self.driver.call("cuCtxSetCurrent", self.handle)


class HostMemory(Resource):
    """Host memory pinned where it lies, and mapped for the device; close before it is unmapped."""

    PORTABLE, DEVICEMAP = 1, 2

    @classmethod
    def register(cls, driver: Driver, address: int, size_bytes: int) -> HostMemory:
        """The range starts on a page, and belongs to the caller before and after."""
        driver.call("cuMemHostRegister_v2", address, size_bytes, cls.PORTABLE | cls.DEVICEMAP)
        return cls(driver, address, "cuMemHostUnregister", address)

    def device_address(self, offset_bytes: int = 0) -> int:
        """Where kernels, waits and writes find it; copies take the host's own address."""
        return self.driver.get("cuMemHostGetDevicePointer_v2", self.handle, 0) + offset_bytes


class DeviceMemory(Resource):
    """Memory of the device; `handle` is its address there."""

    @classmethod
    def allocate(cls, driver: Driver, size_bytes: int) -> DeviceMemory:
        """Not cleared."""
        handle = driver.get("cuMemAlloc_v2", size_bytes)
        return cls(driver, handle, "cuMemFree_v2", handle)


class Event(Resource):
    """A point in a stream, without its time."""

    DISABLE_TIMING = 2

    @classmethod
    def create(cls, driver: Driver) -> Event:
        handle = driver.get("cuEventCreate", cls.DISABLE_TIMING)
        return cls(driver, handle, "cuEventDestroy_v2", handle)

    def record(self, stream: Stream) -> None:
        """From here on it stands for what the stream holds now. One never recorded counts as done."""
        self.driver.call("cuEventRecord", self.handle, stream.handle)

    def is_done(self) -> bool:
        return self.driver.is_done("cuEventQuery", self.handle)


class Stream(Resource):
    """A queue of the device: what is enqueued runs in order. Words are device addresses (`HostMemory.device_address`).

    CUDA does not see the order that waits for values make: streams of one process that wait for each other also need
    events between them, or the driver may run them in an order that never ends.
    """

    NON_BLOCKING = 1
    GREATER_OR_EQUAL = 0  # and no FLUSH, which is for writes of others into the device's memory; ours are in the host's
    WITH_BARRIER = 0  # the default; the interface `_v2` does not offer to leave the barrier out

    @classmethod
    def create(cls, driver: Driver, *, priority: int = 0) -> Stream:
        """One that the default stream does not hold up. Lower is more urgent; the driver clamps it to what it has."""
        handle = driver.get("cuStreamCreateWithPriority", cls.NON_BLOCKING, priority)
        return cls(driver, handle, "cuStreamDestroy_v2", handle)

    @classmethod
    def borrow(cls, driver: Driver, handle: int) -> Stream:
        """Someone else's, such as `torch.cuda.current_stream().cuda_stream`; closing leaves it as it is."""
        return cls(driver, handle)

    def synchronize(self) -> None:
        """Waits, without the interpreter's lock, until all is done."""
        self.driver.call("cuStreamSynchronize", self.handle)

    def is_done(self) -> bool:
        return self.driver.is_done("cuStreamQuery", self.handle)

    def wait_event(self, event: Event) -> None:
        """Nothing enqueued later starts before what the event stands for now is done."""
        self.driver.call("cuStreamWaitEvent", self.handle, event.handle, 0)

    def wait_value(self, word: int, value: int) -> None:
        """Nothing enqueued later starts before word >= value, compared cyclically: int64(word - value) >= 0."""
        self.driver.call("cuStreamWaitValue64_v2", self.handle, word, _checked(word, value), self.GREATER_OR_EQUAL)

    def write_value(self, word: int, value: int) -> None:
        """word <- value, and who sees it, on any processor, sees all that this stream wrote before."""
        self.driver.call("cuStreamWriteValue64_v2", self.handle, word, _checked(word, value), self.WITH_BARRIER)

    def copy_to_device(self, to: int, source: int, size_bytes: int) -> None:
        """From registered host memory, by its host address; other host memory would make the call wait."""
        self.driver.call("cuMemcpyHtoDAsync_v2", to, source, size_bytes, self.handle)

    def copy_to_host(self, to: int, source: int, size_bytes: int) -> None:
        """To registered host memory, by its host address."""
        self.driver.call("cuMemcpyDtoHAsync_v2", to, source, size_bytes, self.handle)

    def copy_on_device(self, to: int, source: int, size_bytes: int) -> None:
        """Between two places on the device."""
        self.driver.call("cuMemcpyDtoDAsync_v2", to, source, size_bytes, self.handle)

    def fill(self, to: int, bits: int, count: int) -> None:
        """Stores the 32 bits `count` times."""
        self.driver.call("cuMemsetD32Async", to, bits, count, self.handle)


class Function:
    """A kernel of a loaded module."""

    def __init__(self, module: Module, name: str) -> None:
        self.module, self.name = module, name
        self._handle = module.driver.get("cuModuleGetFunction", module.handle, name.encode())

    def prepare(self, blocks: int, threads: int, *arguments: Any) -> Launch:
        """Arguments are ctypes values of exactly the kernel's types."""
        assert self.module.handle, self.name
        return Launch(self.module.driver, (self._handle, blocks, 1, 1, threads, 1, 1, 0), arguments)

    def launch(self, stream: Stream, blocks: int, threads: int, *arguments: Any) -> None:
        """The same, enqueued at once."""
        self.prepare(blocks, threads, *arguments).enqueue(stream)


class Launch:
    """A kernel with its grid and its arguments, to be enqueued as often as wanted: the driver copies the arguments each
    time, so their values may be changed in between."""

    def __init__(self, driver: Driver, shape: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        """`shape`: the kernel, its grid, and the bytes of dynamic shared memory, which is none."""
        self.arguments = arguments
        self._driver, self._shape = driver, shape
        self._addresses = (c_void_p * len(arguments))(*map(ctypes.addressof, arguments))

    def enqueue(self, stream: Stream) -> None:
        """What is given is what the arguments are now."""
        self._driver.call("cuLaunchKernel", *self._shape, stream.handle, self._addresses, None)


class Module(Resource):
    """Kernels, loaded from machine code or PTX."""

    @classmethod
    def load(cls, driver: Driver, image: bytes) -> Module:
        handle = driver.get("cuModuleLoadData", image)
        return cls(driver, handle, "cuModuleUnload", handle)

    def function(self, name: str) -> Function:
        return Function(self, name)


def _checked(word: int, value: int) -> int:
    """ctypes would cut off what does not fit; 2^63 and more would turn the cyclic comparison around."""
    assert word % 8 == 0 and 0 <= value < 2**63, (word, value)
    return value
