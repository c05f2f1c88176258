"""What this machine has: cores, memory, processor, GPUs, versions."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "numpy", "safetensors", "cupy-cuda12x", "cupy-cuda13x")


def cores() -> int:
    """The number of processor cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def available_bytes() -> int:
    """Memory that can still be claimed: what the kernel calls available, or less where a control group limits us."""
    return min(_meminfo("MemAvailable"), _cgroup_room_bytes())


def describe() -> dict[str, Any]:
    """Hardware for config.json and for bench rows."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "memory_bytes": _meminfo("MemTotal"),
        "gpus": gpus(),
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Versions of Python, this package and what it computes with; packages that are absent are left out."""
    from easgd_local import __version__

    found = {"python": platform.python_version(), "easgd_local": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def launches_block() -> bool:
    """Whether CUDA is told to wait for each kernel where it is launched, as for debugging."""
    return os.environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0")


def mps_is_active() -> bool:
    """Whether NVIDIA's Multi-Process Service runs, as far as its folder tells."""
    return Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")).exists()


def gpus() -> list[str]:
    """Names of the NVIDIA GPUs, asked of the driver's own tool so that no CUDA context is made; [] without a driver."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def _meminfo(key: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/meminfo has no {key}")


def _cgroup_room_bytes() -> int:
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return 2**63 - 1
    return 2**63 - 1 if limit == "max" else max(0, int(limit) - used)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
