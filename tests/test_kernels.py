"""The CUDA kernels without a GPU: built by g++ they equal NumPy to the bit, and NVRTC compiles them for every GPU."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from easgd_local import kernels

FOLDER = Path(kernels.__file__).parent
NAMES = sorted(file.stem for file in FOLDER.glob("*.cu"))
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
ELASTIC = ("pull", "descend", "nesterov", "lookahead", "add_decay")

SIZES = (0, 1, 3, 31, 1023, 65_537)
OFFSETS = (0, 1, 2, 3)  # floats past a 16-byte boundary
GRIDS = ((1, 1), (3, 7), (4, 128))  # blocks, threads a block
GUARD = np.float32(-7.5)  # what surrounds a vector, and must still do so afterwards

ALPHA, LR, MOMENTUM, WEIGHT_DECAY = (np.float32(value) for value in (0.225, 0.037, 0.9, 5e-4))


# The same source on the CPU


class Shim:
    """The kernels of `elastic.cu` as g++ built them."""

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
    assert compiler, "g++ is not on the PATH: these tests build kernels/elastic.cu with it, so install a C++ compiler."
    folder = tmp_path_factory.mktemp("shim")
    exports = "".join(f"SHIM_EXPORT({name})\n" for name in ELASTIC)
    (folder / "exports.cpp").write_text(f'#include "{FOLDER / "elastic.cu"}"\n{exports}')
    flags = "-std=c++17 -O2 -ffp-contract=off -fno-strict-aliasing -Wall -Wextra -Werror -shared -fPIC".split()
    header = Path(__file__).with_name("cuda_shim.h")
    command = [compiler, *flags, "-include", header, folder / "exports.cpp", "-o", folder / "elastic.so"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Shim(folder / "elastic.so")


class Vectors:
    """float32 vectors between guards, at chosen distances from a 16-byte boundary."""

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self.random = np.random.default_rng(seed)
        self.buffers: list[tuple[np.ndarray, int]] = []

    def vector(self, offset: int) -> np.ndarray:
        """n numbers over many orders of magnitude, zeros of both signs among them, `offset` floats past a boundary."""
        buffer = np.full(self.n + 16, GUARD, np.float32)
        start = 4 + (-buffer.ctypes.data // 4) % 4 + offset
        self.buffers.append((buffer, start))
        values = self.random.standard_normal(self.n) * np.exp(3 * self.random.standard_normal(self.n))
        values[5::17], values[11::17] = 0.0, -0.0
        view = buffer[start : start + self.n]
        view[:] = values
        return view

    def check_guards(self) -> None:
        for buffer, start in self.buffers:
            assert (buffer[:start] == GUARD).all() and (buffer[start + self.n :] == GUARD).all()


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    assert expected.dtype == np.float32
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


def every_case(test):
    """Each size at each grid, with all vectors aligned, all equally unaligned, and unequally so."""
    shifts = [(offset,) * 4 for offset in OFFSETS] + [(0, 0, 1, 0), (0, 3, 0, 0), (2, 0, 0, 1)]
    test = pytest.mark.parametrize("offsets", shifts, ids=str)(test)
    test = pytest.mark.parametrize("n", SIZES)(test)
    return pytest.mark.parametrize("grid", GRIDS, ids=str)(test)


@every_case
def test_pull_moves_the_center_by_alpha_times_the_difference(shim, grid, n, offsets):
    make = Vectors(n, seed=n + 1)
    x, c, d = (make.vector(offset) for offset in offsets[:3])
    x0, c0 = x.copy(), c.copy()
    nonfinite = np.zeros(1, np.uint64)
    shim.launch("pull", grid, x, c, d, ALPHA, n, nonfinite)
    assert_same_bits(d, ALPHA * (x0 - c0))
    assert_same_bits(c, c0 + ALPHA * (x0 - c0))
    assert_same_bits(x, x0)
    assert nonfinite[0] == 0
    make.check_guards()


@every_case
def test_pull_refuses_what_is_not_finite_reloads_it_from_the_center_and_counts_it(shim, grid, n, offsets):
    make = Vectors(n, seed=n + 2)
    x, c, d = (make.vector(offset) for offset in offsets[:3])
    x[0::29], x[1::29], x[2::31] = np.nan, np.inf, -np.inf
    x[3::37], c[3::37] = 3e38, -3e38  # both finite, their difference not
    x[4::41], c[4::41] = np.nan, -0.0
    x0, c0 = x.copy(), c.copy()
    nonfinite = np.array([1000], np.uint64)
    shim.launch("pull", grid, x, c, d, ALPHA, n, nonfinite)
    with np.errstate(over="ignore"):
        expected = ALPHA * (x0 - c0)
    refused = ~np.isfinite(expected)
    expected[refused] = 0
    assert_same_bits(d, expected)
    assert_same_bits(c, c0 + expected)
    assert_same_bits(x, np.where(refused, c0, x0))
    assert nonfinite[0] == 1000 + refused.sum()
    assert refused.any() == (n > 0)
    make.check_guards()


def test_pull_adds_to_the_counter_once_for_a_thread_and_only_if_it_saw_any():
    """Read in the source: a launch of many threads must not queue at one address."""
    body = re.search(r"void pull\(.*?\n}\n", kernels.source("elastic"), re.DOTALL).group()
    assert body.count("atomicAdd") == 1
    assert body.endswith("    if (refused != 0)\n        atomicAdd(nonfinite, refused);\n}\n")


@every_case
def test_descend_subtracts_the_pull_and_then_the_step(shim, grid, n, offsets):
    make = Vectors(n, seed=n + 3)
    x, d, g = (make.vector(offset) for offset in offsets[:3])
    expected = (x - d) - LR * g
    d0, g0 = d.copy(), g.copy()
    shim.launch("descend", grid, x, d, g, LR, n)
    assert_same_bits(x, expected)
    assert_same_bits(d, d0)
    assert_same_bits(g, g0)
    make.check_guards()


@every_case
def test_descend_without_a_pull_is_plain_sgd(shim, grid, n, offsets):
    make = Vectors(n, seed=n + 4)
    x, g = (make.vector(offset) for offset in offsets[:2])
    expected = x - LR * g
    shim.launch("descend", grid, x, None, g, LR, n)
    assert_same_bits(x, expected)
    make.check_guards()


@every_case
def test_nesterov_moves_the_velocity_and_then_the_worker(shim, grid, n, offsets):
    make = Vectors(n, seed=n + 5)
    x, v, d, g = (make.vector(offset) for offset in offsets)
    velocity = MOMENTUM * v - LR * g
    expected = (x - d) + velocity
    d0, g0 = d.copy(), g.copy()
    shim.launch("nesterov", grid, x, v, d, g, LR, MOMENTUM, n)
    assert_same_bits(v, velocity)
    assert_same_bits(x, expected)
    assert_same_bits(d, d0)
    assert_same_bits(g, g0)
    make.check_guards()


@every_case
def test_nesterov_without_a_pull_adds_the_velocity(shim, grid, n, offsets):
    make = Vectors(n, seed=n + 6)
    x, v, g = (make.vector(offset) for offset in offsets[:3])
    velocity = MOMENTUM * v - LR * g
    expected = x + velocity
    shim.launch("nesterov", grid, x, v, None, g, LR, MOMENTUM, n)
    assert_same_bits(v, velocity)
    assert_same_bits(x, expected)
    make.check_guards()


@every_case
def test_lookahead_is_the_worker_plus_its_momentum(shim, grid, n, offsets):
    make = Vectors(n, seed=n + 7)
    y, x, v = (make.vector(offset) for offset in offsets[:3])
    expected = x + MOMENTUM * v
    x0, v0 = x.copy(), v.copy()
    shim.launch("lookahead", grid, y, x, v, MOMENTUM, n)
    assert_same_bits(y, expected)
    assert_same_bits(x, x0)
    assert_same_bits(v, v0)
    make.check_guards()


@every_case
def test_add_decay_adds_the_weights_to_the_gradient(shim, grid, n, offsets):
    make = Vectors(n, seed=n + 8)
    g, x = (make.vector(offset) for offset in offsets[:2])
    expected = g + WEIGHT_DECAY * x
    x0 = x.copy()
    shim.launch("add_decay", grid, g, x, WEIGHT_DECAY, n)
    assert_same_bits(g, expected)
    assert_same_bits(x, x0)
    make.check_guards()


# The same source for the GPU


def compile_for(name: str, architecture: int) -> tuple[bytes, str]:
    """The machine code and the PTX of one kernel file, by NVRTC; needs no GPU."""
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except Exception as error:
        pytest.fail(f"CuPy finds no NVRTC ({error}): install this project's extra `test`, which brings both.")
    program = nvrtc.createProgram(kernels.source(name), f"{name}.cu", [], [])
    try:
        try:
            nvrtc.compileProgram(program, [f"-arch=sm_{architecture}", "-std=c++17"])
        except nvrtc.NVRTCError as error:
            pytest.fail(f"{name}.cu, sm_{architecture}: {error}\n{nvrtc.getProgramLog(program)}")
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
@pytest.mark.parametrize("name", NAMES)
def test_nvrtc_compiles_every_file_and_fuses_nothing(name, architecture):
    cubin, ptx = compile_for(name, architecture)
    assert cubin[:4] == b"\x7fELF"
    declared = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", kernels.source(name))
    assert sorted(entries(ptx)) == sorted(declared) != []
    assert not re.search(r"\bfma\b", ptx), "an operation of this file is fused, so it does not round as the CPU does"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_elastic_kernel_moves_sixteen_bytes_an_access(architecture):
    kernel_bodies = entries(compile_for("elastic", architecture)[1])
    assert sorted(kernel_bodies) == sorted(ELASTIC)
    for name, body in kernel_bodies.items():
        assert re.search(r"\bld\.global(\.nc)?\.v4\.[fbu]32\b", body), f"{name} loads no 16 bytes at once"
        assert re.search(r"\bst\.global\.v4\.[fbu]32\b", body), f"{name} stores no 16 bytes at once"


def test_an_unknown_source_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'plastic'.*holds .*elastic"):
        kernels.source("plastic")
