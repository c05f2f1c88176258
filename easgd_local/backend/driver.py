"""The CUDA driver by ctypes: the few calls that the exchange needs, each checked, each failure named.

Nothing is loaded when this module is imported: `Driver.open` does that. Beyond asking for devices, calls need a context
that is current on the calling thread (`Context.make_current`), and CUDA does not survive a fork. Copies, waits, writes
and launches are only enqueued: whose memory they touch keeps it until the stream is through, and what fails on the
device is reported by a later call. Addresses are plain integers.

None of this has run on a real GPU yet: names, types and constants are those of NVIDIA's cuda.h (CUDA 13.0), and the
tests run it against a driver that only pretends, tests/fakecuda.cpp.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from enum import IntEnum
from types import TracebackType
from typing import Any, TypeVar

# As cuDriverGetVersion counts, 1000 major + 10 minor. CUDA 11.7 brought the `_v2` stream memory operations, which need
# no option of the kernel module: PFN_cuStreamWaitValue64_v11070 in cudaTypedefs.h; NVIDIA's manual of 11.8, page MEMOP.
OLDEST = 11070

# What follows the name of a call: the types of its arguments. A call that makes or finds something stores it in its
# first. CUdeviceptr is c_uint64, CUdevice c_int, every other handle c_void_p.
SYMBOLS: dict[str, tuple[Any, ...]] = {
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuInit": (c_uint,),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetPCIBusId": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceCanAccessPeer": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostGetDevicePointer_v2": (POINTER(c_uint64), c_void_p, c_uint),
    "cuMemHostUnregister": (c_void_p,),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuStreamCreateWithPriority": (POINTER(c_void_p), c_uint, c_int),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamQuery": (c_void_p,),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuStreamWaitValue64_v2": (c_void_p, c_uint64, c_uint64, c_uint),
    "cuStreamWriteValue64_v2": (c_void_p, c_uint64, c_uint64, c_uint),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemcpyDtoDAsync_v2": (c_uint64, c_uint64, c_size_t, c_void_p),
    "cuMemsetD32Async": (c_uint64, c_uint, c_size_t, c_void_p),
    "cuEventCreate": (POINTER(c_void_p), c_uint),
    "cuEventDestroy_v2": (c_void_p,),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventQuery": (c_void_p,),
    "cuModuleLoadData": (POINTER(c_void_p), c_char_p),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuLaunchKernel": (c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
}
_NEEDED_FIRST = ("cuDriverGetVersion", "cuGetErrorName", "cuGetErrorString")

_NOT_READY = 600  # an answer of the two queries, not a failure
_REMEDIES = {
    2: "free some of that memory, or ask for less",
    3: "CUDA does not survive a fork, so start the process by spawn",
    34: "this is the stub that programs are linked with, so put the driver's own library before it",
    100: "see what nvidia-smi and CUDA_VISIBLE_DEVICES say, or train on the CPU",
    201: "make the device's context current on this thread first",
    209: "compile the kernels for this GPU",
    222: "update the driver, or load machine code instead of PTX",
    712: "memory is registered once, so close the earlier registration first",
    801: "choose a way of exchanging that does without it",
    803: "the driver was updated since the machine started, so restart it",
}


class DriverError(RuntimeError):
    """What the driver, or its absence, keeps us from; `code` is the CUresult, 0 where no call was made."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


class Driver:
    """libcuda, loaded and initialized, new enough and with a device."""

    @classmethod
    def open(cls) -> Driver:
        """The driver of this machine, or the library that EASGD_LIBCUDA names."""
        return cls(os.environ.get("EASGD_LIBCUDA", "libcuda.so.1"))

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            raise DriverError(
                f"NVIDIA's driver was not found ({error}); install it, give a container its GPUs, or use the CPU."
            ) from error
        self._calls = {name: self._symbol(name) for name in _NEEDED_FIRST}
        self.version = self.get("cuDriverGetVersion")
        if self.version < OLDEST:
            raise DriverError(
                f"{path} supports CUDA {_dotted(self.version)}: the exchange needs at least {_dotted(OLDEST)}; "
                f"update NVIDIA's driver, or train on the CPU."
            )
        self._calls = {name: self._symbol(name) for name in SYMBOLS}
        self.pretended = hasattr(self._library, "fake_cuda_live")  # the tests': torch knows nothing of its devices
        self.call("cuInit", 0)
        self.devices = self.get("cuDeviceGetCount")
        if self.devices == 0:
            raise DriverError(f"{path} finds 0 devices: at least 1 is needed; {_REMEDIES[100]}.")

    def _symbol(self, name: str) -> Any:
        try:
            function = getattr(self._library, name)
        except AttributeError as error:
            raise DriverError(
                f"{self.path} lacks {name}: NVIDIA's driver for CUDA {_dotted(OLDEST)} or newer has it; "
                f"install that, or train on the CPU."
            ) from error
        function.argtypes, function.restype = SYMBOLS[name], c_int
        return function

    def call(self, name: str, *arguments: Any) -> None:
        """Makes the call; `DriverError` if it fails."""
        code = self._calls[name](*arguments)
        if code != 0:
            raise self._failure(name, code)

    def get(self, name: str, *arguments: Any) -> int:
        """What the call stores in its first argument; the others are given."""
        result = SYMBOLS[name][0]._type_()
        self.call(name, ctypes.byref(result), *arguments)
        return result.value or 0  # ctypes makes None of a null pointer

    def free_bytes(self) -> int:
        """Free memory of the device whose context is current."""
        total = c_size_t()
        return self.get("cuMemGetInfo_v2", ctypes.byref(total))

    def text(self, name: str, *arguments: Any) -> str:
        """The text that the call writes into a buffer."""
        buffer = ctypes.create_string_buffer(256)
        self.call(name, buffer, len(buffer), *arguments)
        return buffer.value.decode()

    def is_done(self, name: str, handle: int) -> bool:
        """The answer of a query."""
        code = self._calls[name](handle)
        if code not in (0, _NOT_READY):
            raise self._failure(name, code)
        return code == 0

    def _failure(self, name: str, code: int) -> DriverError:
        remedy = f"; {_REMEDIES[code]}" if code in _REMEDIES else ""
        error, description = (self._said(which, code) for which in ("cuGetErrorName", "cuGetErrorString"))
        return DriverError(f"{name} failed with {error} ({code}): {description}{remedy}.", code)

    def _said(self, which: str, code: int) -> str:
        said = c_char_p()
        self._calls[which](code, ctypes.byref(said))  # an unknown code leaves it null
        return (said.value or b"an error unknown to this driver").decode()


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


class Attribute(IntEnum):
    """What can be asked of a device: CUdevice_attribute."""

    INTEGRATED = 18  # shares the host's memory
    ASYNC_ENGINES = 40  # how many copies can run beside a kernel
    UNIFIED_ADDRESSING = 41
    COMPUTE_CAPABILITY_MAJOR = 75
    COMPUTE_CAPABILITY_MINOR = 76
    HOST_NATIVE_ATOMICS = 86  # the link to the host carries atomic operations
    PAGEABLE_MEMORY_ACCESS = 88  # reads and writes host memory that is not registered, coherently
    CAN_FLUSH_REMOTE_WRITES = 98
    HOST_REGISTER = 99  # host memory can be registered
    HOST_PAGE_TABLES = 100  # and that by the host's own page tables: a coherent link such as NVLink-C2C
    MEMOPS_64 = 122  # the `_v2` waits for and writes of 64 bits; 93 is the same of the old interface


class Device:
    """One GPU, by its number among those that this process sees."""

    def __init__(self, driver: Driver, number: int = 0) -> None:
        if not 0 <= number < driver.devices:
            raise ValueError(
                f"device={number}: this process sees {driver.devices}, counted from 0; choose one of them, or let "
                f"CUDA_VISIBLE_DEVICES show more."
            )
        self.driver, self.number = driver, number
        self.handle = driver.get("cuDeviceGet", number)
        self.name = driver.text("cuDeviceGetName", self.handle)
        self.pci_bus_id = driver.text("cuDeviceGetPCIBusId", self.handle)

    def attribute(self, which: Attribute) -> int:
        return self.driver.get("cuDeviceGetAttribute", which, self.handle)

    @property
    def compute_capability(self) -> tuple[int, int]:
        major, minor = Attribute.COMPUTE_CAPABILITY_MAJOR, Attribute.COMPUTE_CAPABILITY_MINOR
        return self.attribute(major), self.attribute(minor)

    def reaches(self, other: Device) -> bool:
        """Whether it can reach the memory of the other one without the host."""
        return self.driver.get("cuDeviceCanAccessPeer", self.handle, other.handle) == 1

    @property
    def memops_64(self) -> bool:
        """Whether `Stream.wait_value` and `write_value` work."""
        return self.attribute(Attribute.MEMOPS_64) == 1


Self = TypeVar("Self", bound="Resource")


class Resource:
    """What the driver lends: a context manager, and `close` gives it back, once."""

    def __init__(self, driver: Driver, handle: int, *give_back: Any) -> None:
        """`give_back`: the call that ends it and its arguments, or nothing for what belongs to someone else."""
        self.driver, self._handle, self._give_back = driver, handle, give_back
        self._closed = False

    @property
    def handle(self) -> int:
        assert not self._closed, f"{type(self).__name__} {self._handle:#x} is closed"  # 0 would be the default stream
        return self._handle

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._give_back:
                self.driver.call(*self._give_back)

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

    def launch(self, stream: Stream, blocks: int, threads: int, *arguments: Any) -> None:
        """Arguments are ctypes values of exactly the kernel's types; the call copies them."""
        assert self.module.handle, self.name
        addresses = (c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        shape = (blocks, 1, 1, threads, 1, 1, 0)  # no dynamic shared memory
        self.module.driver.call("cuLaunchKernel", self._handle, *shape, stream.handle, addresses, None)


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
