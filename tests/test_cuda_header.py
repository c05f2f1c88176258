"""The driver as `backend.driver` describes it, against NVIDIA's own header, which comes with torch."""

from __future__ import annotations

import ctypes
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from easgd_local import devices
from easgd_local.backend import cuda, driver
from easgd_local.backend.driver import EXCLUSIVE, SYMBOLS, Attribute
from easgd_local.backend.resources import Event, HostMemory, Stream

HEADERS = ("nvidia/*/include/cuda.h", "triton/backends/nvidia/include/cuda.h")

CONSTANTS = {
    "CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT": Attribute.ASYNC_ENGINES,
    "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR": Attribute.COMPUTE_CAPABILITY_MAJOR,
    "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR": Attribute.COMPUTE_CAPABILITY_MINOR,
    "CU_DEVICE_ATTRIBUTE_COMPUTE_MODE": Attribute.COMPUTE_MODE,
    "CU_COMPUTEMODE_EXCLUSIVE_PROCESS": EXCLUSIVE,
    "CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED": Attribute.HOST_REGISTER,
    "CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES": Attribute.HOST_PAGE_TABLES,
    "CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS": Attribute.MEMOPS_64,
    "CU_MEMHOSTREGISTER_PORTABLE": HostMemory.PORTABLE,
    "CU_MEMHOSTREGISTER_DEVICEMAP": HostMemory.DEVICEMAP,
    "CU_EVENT_DISABLE_TIMING": Event.DISABLE_TIMING,
    "CU_STREAM_NON_BLOCKING": Stream.NON_BLOCKING,
    "CU_STREAM_LEGACY": devices.LEGACY,
    "CU_STREAM_WAIT_VALUE_GEQ": Stream.GREATER_OR_EQUAL,
    "CU_STREAM_WRITE_VALUE_DEFAULT": Stream.WITH_BARRIER,
    "CUDA_ERROR_NOT_FOUND": cuda.NOT_FOUND,
    "CUDA_ERROR_NOT_READY": driver._NOT_READY,
    "CUDA_ERROR_OUT_OF_MEMORY": 2,  # those below have a remedy of their own
    "CUDA_ERROR_NOT_INITIALIZED": 3,
    "CUDA_ERROR_STUB_LIBRARY": 34,
    "CUDA_ERROR_DEVICE_UNAVAILABLE": 46,
    "CUDA_ERROR_NO_DEVICE": 100,
    "CUDA_ERROR_INVALID_CONTEXT": 201,
    "CUDA_ERROR_NO_BINARY_FOR_GPU": 209,
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": 222,
    "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED": 712,
    "CUDA_ERROR_NOT_SUPPORTED": 801,
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": 803,
}

PROGRAM = """
#include <cstdio>
#include <cuda.h>
#include <type_traits>

template <class Result, class... Arguments>
void tell(const char* name, Result (*)(Arguments...))
{
    std::printf("%s %zu", name, sizeof(Result));
    (std::printf(" %s%zu", std::is_pointer<Arguments>::value ? "*" : "", sizeof(Arguments)), ...);
    std::printf("\\n");
}

#define CALL(name) tell(#name, static_cast<decltype(&name)>(nullptr));
#define CONSTANT(name) std::printf(#name " %lld\\n", (long long)(name));

int main()
{
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What the header says, by g++: the result and the arguments of each call, and the values of the constants."""
    packages = Path(sysconfig.get_paths()["purelib"])
    found = [path for pattern in HEADERS for path in sorted(packages.glob(pattern))]
    assert found, f"no cuda.h in {packages}: torch's packages bring one"
    folder = tmp_path_factory.mktemp("header")
    lines = [*(f"CALL({name})" for name in SYMBOLS), *(f"CONSTANT({name})" for name in CONSTANTS)]
    (folder / "tell.cpp").write_text(PROGRAM + "\n".join(lines) + "\n}\n")
    built = ["g++", "-std=c++17", "-I", str(found[0].parent), str(folder / "tell.cpp"), "-o", str(folder / "tell")]
    subprocess.run(built, check=True, timeout=50)
    out = subprocess.run([str(folder / "tell")], check=True, capture_output=True, text=True, timeout=50).stdout
    return {words[0]: words[1:] for words in map(str.split, out.splitlines())}


def sizes(types: tuple[Any, ...]) -> Iterator[str]:
    """As the program tells them: a star where it is an address."""
    for one in types:
        is_pointer = one in (ctypes.c_void_p, ctypes.c_char_p) or hasattr(one, "contents")
        yield f"{'*' if is_pointer else ''}{ctypes.sizeof(one)}"


@pytest.mark.parametrize("name", SYMBOLS)
def test_a_call_has_the_arguments_that_the_header_declares(name: str, told: dict[str, list[str]]) -> None:
    assert told[name] == [str(ctypes.sizeof(ctypes.c_int)), *sizes(SYMBOLS[name])]


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_is_that_of_the_header(name: str, told: dict[str, list[str]]) -> None:
    assert told[name] == [str(int(CONSTANTS[name]))]


def test_every_attribute_and_every_remedy_is_looked_up() -> None:
    known = {int(value) for name, value in CONSTANTS.items() if name.startswith("CUDA_ERROR")}
    assert set(driver._REMEDIES) <= known
    assert {value for value in CONSTANTS.values() if isinstance(value, Attribute)} == set(Attribute)
