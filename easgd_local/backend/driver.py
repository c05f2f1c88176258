"""The CUDA driver by ctypes: the few calls that the exchange needs, each checked, each failure named.

Nothing is loaded when this module is imported: `Driver.open` does that. Beyond asking for devices, calls need a context
that is current on the calling thread (`Context.make_current`), and CUDA does not survive a fork. Copies, waits, writes
and launches are only enqueued: whose memory they touch keeps it until the stream is through, and what fails on the
device is reported by a later call. Addresses are plain integers.

Names, types and constants are those of NVIDIA's cuda.h; tests/test_cuda_header.py compares them.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from enum import IntEnum
from typing import Any

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
    46: "another process has the GPU for itself, or it takes none, so choose another, or run nvidia-smi -c 0",
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
                f"{path} supports CUDA {dotted(self.version)}: the exchange needs at least {dotted(OLDEST)}; "
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
                f"{self.path} lacks {name}: NVIDIA's driver for CUDA {dotted(OLDEST)} or newer has it; "
                f"install that, or train on the CPU."
            ) from error
        function.argtypes, function.restype = SYMBOLS[name], c_int
        return function

    def call(self, name: str, *arguments: Any) -> None:
        """Makes the call; `DriverError` if it fails."""
        if code := self._calls[name](*arguments):
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


def dotted(version: int) -> str:
    """13.0 for 13000, as the driver counts versions of CUDA."""
    return f"{version // 1000}.{version % 1000 // 10}"


EXCLUSIVE = 3  # CU_COMPUTEMODE_EXCLUSIVE_PROCESS


class Attribute(IntEnum):
    """What can be asked of a device: CUdevice_attribute."""

    COMPUTE_MODE = 20  # how many processes may use it
    ASYNC_ENGINES = 40  # how many copies can run beside a kernel
    COMPUTE_CAPABILITY_MAJOR = 75
    COMPUTE_CAPABILITY_MINOR = 76
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
    def exclusive(self) -> bool:
        """Whether only one process at a time may use it."""
        return self.attribute(Attribute.COMPUTE_MODE) == EXCLUSIVE

    @property
    def memops_64(self) -> bool:
        """Whether `Stream.wait_value` and `write_value` work."""
        return self.attribute(Attribute.MEMOPS_64) == 1
