"""The CUDA kernels without a GPU: built by g++ they equal CpuOps to the bit, and NVRTC compiles them for every GPU."""

import ctypes
import inspect
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from easgd_local import kernels
from easgd_local.backend.cpu import CpuOps
from easgd_local.backend.operations import OPERATIONS

FOLDER = Path(kernels.__file__).parent
WORDS = "turns"  # the file of kernels that wait for words and write them, and are no operations on vectors
ALL_FILES = sorted(file.stem for file in FOLDER.glob("*.cu"))
FILES = [file for file in ALL_FILES if file != WORDS]
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)

SIZES = (0, 1, 3, 31, 1023, 65_537)
ALIGNED, *UNALIGNED = ((offset,) * 6 for offset in range(4))  # floats past a 16-byte boundary, for each vector
OFFSETS = (ALIGNED, *UNALIGNED, (0, 0, 1, 0, 0, 0), (0, 3, 0, 0, 0, 2), (2, 0, 0, 1, 3, 0))
GRIDS = ((1, 1), (3, 7), (4, 128))  # blocks, threads a block
GUARD = np.float32(-7.5)  # what surrounds a vector, and must still do so afterwards

# 1 - a, 1 - beta1, 1 - beta2, lr rho and 1 + lr rho in float32 differ from the same in Python's numbers, then rounded.
TAME = {
    "alpha": 0.225, "lr": 0.037, "momentum": 0.9, "weight_decay": 5e-4, "a": 0.285, "rho": 0.712, "workers": 3,
    "beta1": 0.257, "beta2": 0.33, "epsilon": 1e-3, "value": -0.625,
}  # fmt: skip
# What is finite becomes infinite on the way, and 0 is divided by 0.
WILD = {**TAME, "alpha": 1.5, "lr": 2.5, "momentum": -1.1, "a": 1.7, "epsilon": 0.0}
WILD_VALUES = [np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1.9e38, -1.9e38, 3e30, -3e30, 1e-42, -1e-42, 0.0, -0.0]


# The kernels, as their sources declare them


class Kernel(NamedTuple):
    """One kernel: its body, and the types of its parameters by name."""

    body: str
    parameters: dict[str, str]

    def vectors(self) -> list[str]:
        return [name for name, kind in self.parameters.items() if kind.endswith("float*")]

    def scalars(self) -> list[str]:
        return [name for name, kind in self.parameters.items() if kind == "const float"]

    def is_guarded(self) -> bool:
        return "nonfinite" in self.parameters

    def vectors_that_are(self, *uses: str) -> int:
        """How many vectors the kernel goes through as Read, Updated and so on."""
        return len(re.findall(rf"\b(?:{'|'.join(uses)})\{{", self.body))


def declared_in(file: str) -> dict[str, Kernel]:
    """The kernels of one file by name."""
    found = re.findall(r"__global__ void (\w+)\(([^)]*)\)\n(\{\n.*?\n\}\n)", kernels.source(file), re.DOTALL)
    return {name: Kernel(body, dict(map(name_and_type, text.split(",")))) for name, text, body in found}


def name_and_type(parameter: str) -> tuple[str, str]:
    kind, name = parameter.strip().rsplit(maxsplit=1)
    return name, kind


KERNELS = {name: kernel for file in FILES for name, kernel in declared_in(file).items()}
GUARDED = [name for name, kernel in KERNELS.items() if kernel.is_guarded()]


def test_every_operation_has_a_kernel():
    operations = {name for name, _ in inspect.getmembers(CpuOps, inspect.isfunction) if not name.startswith("_")}
    assert set(KERNELS) == operations


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_takes_vectors_then_scalars_then_n_in_the_order_of_the_operation(name):
    _, *parameters = inspect.signature(getattr(CpuOps, name)).parameters.values()
    vectors = [parameter for parameter in parameters if parameter.annotation.startswith("Vector")]
    vectors.sort(key=lambda parameter: parameter.default is None)  # those that may be absent come last
    scalars = [parameter for parameter in parameters if parameter not in vectors]
    assert KERNELS[name].vectors() == [parameter.name for parameter in vectors]
    assert KERNELS[name].scalars() == [parameter.name for parameter in scalars]
    assert list(KERNELS[name].parameters) == [
        *KERNELS[name].vectors(), *KERNELS[name].scalars(), "n", *["nonfinite"] * KERNELS[name].is_guarded()
    ]  # fmt: skip
    assert KERNELS[name].is_guarded() == ("Guarded:" in getattr(CpuOps, name).__doc__)


@pytest.mark.parametrize("name", KERNELS)
def test_the_list_of_operations_says_what_a_kernel_does_with_its_arguments(name):
    """By the uses in its source, which the compiler holds it to."""
    letters = {"Read": "r", "Written": "w", "Updated": "u", "Seldom": "s"}
    kernel, listed = KERNELS[name], OPERATIONS[name]
    uses = dict(reversed(use) for use in re.findall(r"\b([A-Z][a-z]+)\{(\w+)\}", kernel.body))
    assert listed.optional == ("Optional" in uses.values())
    required = [vector for vector in kernel.vectors() if uses[vector] != "Optional"]
    assert listed.roles == "".join(letters[uses[vector]] for vector in required)
    assert (listed.scalars, listed.guarded) == (len(kernel.scalars()), kernel.is_guarded())


@pytest.mark.parametrize("name", GUARDED)
def test_a_kernel_adds_to_the_counter_once_for_a_thread_and_only_if_it_refused_any(name):
    """Read in the source: a launch of many threads must not queue at one address."""
    body = KERNELS[name].body
    assert body.count("nonfinite") == 1 and body.endswith("\n    add_refused(nonfinite, refused);\n}\n")
    assert all(kernels.source(file).count("atomicAdd") == 1 for file in FILES)
    assert "{\n    if (refused != 0)\n        atomicAdd(nonfinite, refused);\n}\n" in kernels.source(FILES[0])


# The same source on the CPU


class Shim:
    """The kernels as g++ built them."""

    def __init__(self, library: Path) -> None:
        self.shim = ctypes.CDLL(str(library))

    def launch(self, name: str, launch: tuple[int, int], *arguments) -> None:
        boxes = [box(argument) for argument in arguments]
        addresses = (ctypes.c_void_p * len(boxes))(*(ctypes.addressof(value) for value in boxes))
        getattr(self.shim, f"launch_{name}")(*map(ctypes.c_uint, launch), addresses)


def box(argument):
    """The argument as C passes it: an address, a count or a float."""
    if argument is None or isinstance(argument, np.ndarray):
        return ctypes.c_void_p(None if argument is None else argument.ctypes.data)
    if isinstance(argument, np.float32):
        return ctypes.c_float(argument)
    return ctypes.c_ulonglong(argument)


@pytest.fixture(scope="session")
def shim(tmp_path_factory) -> Shim:
    compiler = shutil.which("g++")
    assert compiler, "g++ is not on the PATH: these tests build the kernels with it, so install a C++ compiler."
    folder = tmp_path_factory.mktemp("shim")
    for file in ALL_FILES:
        exports = "".join(f"SHIM_EXPORT({name})\n" for name in declared_in(file))
        (folder / f"{file}.cu").write_text(kernels.source(file))
        (folder / f"{file}.cpp").write_text(f'#include "{file}.cu"\n{exports}')
    flags = "-std=c++17 -O2 -ffp-contract=off -fno-strict-aliasing -Wall -Wextra -Werror -shared -fPIC".split()
    header = Path(__file__).with_name("cuda_shim.h")
    command = [compiler, *flags, "-include", header, *sorted(folder.glob("*.cpp")), "-o", folder / "kernels.so"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Shim(folder / "kernels.so")


Vectors = dict[str, np.ndarray | None]


def tame_values(n: int, random: np.random.Generator) -> np.ndarray:
    """n numbers over many orders of magnitude, zeros of both signs among them."""
    values = random.standard_normal(n) * np.exp(3 * random.standard_normal(n))
    values[5::17], values[11::17] = 0.0, -0.0
    return values.astype(np.float32)


def wild_values(n: int, random: np.random.Generator) -> np.ndarray:
    """The same, two in five of them not finite, nearly so, below the smallest normal number or 0."""
    values = random.choice(np.array(WILD_VALUES, np.float32), n)
    return np.where(random.random(n) < 0.4, values, tame_values(n, random))


def vectors_of(name: str, absent: str | None, n: int, values) -> Vectors:
    random = np.random.default_rng([n, *name.encode()])
    vectors: Vectors = {vector: None if vector == absent else values(n, random) for vector in KERNELS[name].vectors()}
    if name == "amsgrad":  # second moments: a root is taken, and np.maximum may choose either of 0 and -0
        vectors["v"], vectors["vhat"] = abs(vectors["v"]), abs(vectors["vhat"])
    return vectors


def by_the_operation(name: str, vectors: Vectors, scalars: dict[str, float]) -> tuple[Vectors, int]:
    """What CpuOps makes of the vectors, and how many elements it refuses."""
    ops = CpuOps()
    after = {vector: None if values is None else values.copy() for vector, values in vectors.items()}
    with np.errstate(all="ignore"):
        getattr(ops, name)(**after, **{scalar: scalars[scalar] for scalar in KERNELS[name].scalars()})
    return after, ops.nonfinite


class Guarded:
    """A copy of a vector between guards, `offset` floats past a 16-byte boundary."""

    def __init__(self, values: np.ndarray, offset: int) -> None:
        self.buffer = np.full(len(values) + 16, GUARD, np.float32)
        start = 4 + (-self.buffer.ctypes.data // 4) % 4 + offset
        self.outside = np.r_[:start, start + len(values) : len(self.buffer)]
        self.vector = self.buffer[start : start + len(values)]
        self.vector[:] = values

    def check(self, expected: np.ndarray) -> None:
        assert_same_bits(self.vector, expected)
        assert (self.buffer[self.outside] == GUARD).all()


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal, zeros with their signs; one NaN is as good as another, for a GPU knows only one."""
    assert actual.dtype == expected.dtype == np.float32
    actual, expected = (np.where(np.isnan(x), np.float32(np.nan), x).view(np.uint32) for x in (actual, expected))
    np.testing.assert_array_equal(actual, expected)


def check_launches(shim: Shim, name: str, before: Vectors, after: Vectors, refused: int, scalars: dict[str, float]):
    """At each grid, with all vectors aligned, all equally unaligned, and unequally so."""
    n = len(next(iter(before.values())))
    floats = [np.float32(scalars[scalar]) for scalar in KERNELS[name].scalars()]
    for offsets in OFFSETS:
        for grid in GRIDS:
            guarded = {
                vector: Guarded(values, offset)
                for (vector, values), offset in zip(before.items(), offsets, strict=False)
                if values is not None
            }
            addresses = [guarded[vector].vector if vector in guarded else None for vector in before]
            nonfinite = np.array([1000], np.uint64)
            shim.launch(name, grid, *addresses, *floats, n, *[nonfinite] * KERNELS[name].is_guarded())
            for vector, copy in guarded.items():
                copy.check(after[vector])
            assert nonfinite[0] == 1000 + refused, (offsets, grid)


def every_operation(test):
    """Each kernel at each size, with every vector, and without the one that may be absent."""
    cases = [(name, None) for name in KERNELS]
    cases += [(name, "d") for name, kernel in KERNELS.items() if kernel.vectors_that_are("Optional")]
    ids = [name + (f" without {absent}" if absent else "") for name, absent in cases]
    test = pytest.mark.parametrize("n", SIZES)(test)
    return pytest.mark.parametrize(("name", "absent"), cases, ids=ids)(test)


@every_operation
def test_a_kernel_equals_the_operation_to_the_bit(shim, name, absent, n):
    before = vectors_of(name, absent, n, tame_values)
    after, refused = by_the_operation(name, before, TAME)
    assert refused == 0
    check_launches(shim, name, before, after, 0, TAME)


@every_operation
def test_a_kernel_refuses_what_the_operation_refuses_and_counts_it(shim, name, absent, n):
    before = vectors_of(name, absent, n, wild_values)
    after, refused = by_the_operation(name, before, WILD)
    if n > 1000:
        assert bool(refused) == KERNELS[name].is_guarded()
    check_launches(shim, name, before, after, refused, WILD)


@pytest.mark.parametrize("name", KERNELS)
def test_what_a_kernel_cannot_write_the_operation_leaves_alone(name):
    before = vectors_of(name, None, 1023, wild_values)
    after, _ = by_the_operation(name, before, WILD)
    for vector in before:
        if KERNELS[name].parameters[vector] == "const float*":
            assert_same_bits(after[vector], before[vector])


# The same source for the GPU


@cache
def compile_for(file: str, architecture: int) -> tuple[bytes, str]:
    """The machine code and the PTX of one kernel file, by NVRTC; needs no GPU."""
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except Exception as error:
        pytest.fail(f"CuPy finds no NVRTC ({error}): install this project's extra `test`, which brings both.")
    program = nvrtc.createProgram(kernels.source(file), f"{file}.cu", [], [])
    try:
        try:
            nvrtc.compileProgram(program, [f"-arch=sm_{architecture}", "-std=c++17"])
        except nvrtc.NVRTCError as error:
            pytest.fail(f"{file}.cu, sm_{architecture}: {error}\n{nvrtc.getProgramLog(program)}")
        return bytes(nvrtc.getCUBIN(program)), text(nvrtc.getPTX(program))
    finally:
        nvrtc.destroyProgram(program)


def text(ptx: str | bytes) -> str:
    return ptx.decode() if isinstance(ptx, bytes) else ptx


def entries(ptx: str) -> dict[str, str]:
    """Each kernel of a PTX text with its body."""
    _, *parts = re.split(r"\.entry\s+(\w+)", ptx)
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", ALL_FILES)
def test_nvrtc_compiles_every_file_and_fuses_nothing(file, architecture):
    cubin, ptx = compile_for(file, architecture)
    assert cubin[:4] == b"\x7fELF"
    assert sorted(entries(ptx)) == sorted(declared_in(file)) != []
    # An operation without .rn may still be fused with the next when PTX becomes machine code.
    operations = set(re.findall(r"\b(?:add|sub|mul|mad|fma|div|rcp|sqrt|rsqrt)\.[\w.]*f32\w*", ptx))
    rounding_once = {op for op in operations if re.fullmatch(r"(add|sub|mul|div|sqrt)\.rn\.f32(x2)?", op)}
    assert operations == rounding_once, "an operation of this file does not round as the CPU does"
    assert operations or file == WORDS


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_every_kernel_moves_every_vector_sixteen_bytes_an_access(file, architecture):
    sixteen_bytes = r"(?:v4\.[fbu]32|v2\.[fbu]64)"
    for name, body in entries(compile_for(file, architecture)[1]).items():
        loads = len(re.findall(rf"\bld\.global(?:\.nc)?\.{sixteen_bytes}\b", body))
        stores = len(re.findall(rf"\bst\.global\.{sixteen_bytes}\b", body))
        kernel = KERNELS[name]
        read, written = (kernel.vectors_that_are(one, "Updated", "Seldom") for one in ("Read|Optional", "Written"))
        assert loads >= read and stores >= written and read + written > 0, f"{name} moves a vector one by one"


def test_an_unknown_source_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'plastic'.*holds .*elastic"):
        kernels.source("plastic")
