"""Builds and loads the pretended CUDA driver of fakecuda.cpp: a test file says `pytest_plugins = ["tests.fake_cuda"]`.

The fixture `fake_cuda` makes it the driver of this test and of the processes that the test starts, through the
environment; fakecuda.cpp says which further variables it obeys.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from easgd_local import kernels
from easgd_local.graphics import Graphics

KERNELS = Path(kernels.__file__).parent
FLAGS = "-std=c++17 -O1 -ffp-contract=off -fno-strict-aliasing -Wall -Wextra -Werror -shared -fPIC -pthread".split()


def build(folder: Path) -> Path:
    """The library, built in the folder."""
    compiler = shutil.which("g++")
    assert compiler, "g++ is not on the PATH: these tests build a driver with it, so install a C++ compiler."
    here, library = Path(__file__).parent, folder / "libfakecuda.so"
    sources = [KERNELS / kernels.SHARED, *sorted(KERNELS.glob("*.cu"))]
    names = re.findall(r"__global__ void (\w+)\(", "".join(source.read_text("utf-8") for source in sources))
    command = [compiler, *FLAGS, f"-DKERNELS={' '.join(f'KERNEL({name})' for name in names)}"]
    for source in [here / "cuda_shim.h", *sources]:
        command += ["-include", str(source)]
    done = subprocess.run([*command, str(here / "fakecuda.cpp"), "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


@pytest.fixture
def found(fake_cuda: Path) -> Graphics:
    """What the pretended driver offers: one GPU."""
    images = {"all": b"the pretended driver has every kernel"}
    return Graphics(
        ("Fake GPU 0",), ((9, 0),), (2**33,), {(9, 0): images}, "memops", coherent=False, mps=False, pretended=True
    )  # fmt: skip


@pytest.fixture(scope="session")
def fake_cuda_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("fake_cuda"))


@pytest.fixture
def fake_cuda(fake_cuda_library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The path of the library that `Driver.open` loads; fails the test if something is not given back to it."""
    for name in [name for name in os.environ if name.startswith("FAKE_CUDA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("EASGD_LIBCUDA", str(fake_cuda_library))
    live = ctypes.CDLL(str(fake_cuda_library)).fake_cuda_live
    before = live()
    yield fake_cuda_library
    assert live() == before, f"{live() - before} contexts, allocations, registrations, streams, events or modules left"
