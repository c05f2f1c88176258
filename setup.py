"""What easgd_local is, needs and installs."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "easgd_local" / "__init__.py").read_text("utf-8"), re.MULTILINE)

# One of these for an NVIDIA GPU, after the CUDA version of its driver: CuPy, and the compiler that it calls.
CUDA_12 = [
    "cupy-cuda12x>=14.0",
    "nvidia-cuda-nvrtc-cu12>=12.8",  # the first to know sm_100 and sm_120
    "torch<2.11",  # later ones are built for CUDA 13
    "torchvision<0.26",
]
CUDA_13 = ["cupy-cuda13x>=14.0", "nvidia-cuda-nvrtc>=13.0,<14"]

# The tests compile the kernels by NVRTC, GPU or not, so they need one of the two above.
TEST = [
    "build>=1.2",
    "hypothesis>=6.100",
    "psutil>=5.9",
    "pytest>=8.0",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.5",
    "setuptools>=77",
    "tensorboard>=2.17",
    "wheel>=0.43",
]

setup(
    name="easgd_local",
    version=VERSION[1],
    description="Elastic averaging SGD on all the GPUs of one machine, through shared memory",
    long_description=(HERE / "README.md").read_text("utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author="the easgd_local authors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # The kernels lie at the top of the repository, but `kernels` is also the name of a public package.
    packages=[*find_packages(include=["easgd_local", "easgd_local.*"]), "easgd_local.kernels"],
    package_dir={"easgd_local.kernels": "kernels"},
    package_data={"easgd_local": ["data/*.npz", "data/*.md"], "easgd_local.kernels": ["*.cu", "*.cuh"]},
    entry_points={"console_scripts": ["easgd-local = easgd_local.cli:main"]},
    install_requires=[
        "greenlet>=3.0",  # the simulator leaves a rule in the middle of its step and comes back
        "matplotlib>=3.8",
        "numpy>=2.0",
        "rich>=13.7",
        "safetensors>=0.4.3",
        "torch>=2.4",
        "torchvision>=0.19",
    ],
    extras_require={
        "cuda12": CUDA_12,
        "cuda13": CUDA_13,
        "tensorboard": ["tensorboard>=2.17"],
        "test": TEST + CUDA_13,
        "test-cuda12": TEST + CUDA_12,
        "lint": ["mypy>=1.11", "ruff>=0.6"],
    },
)
