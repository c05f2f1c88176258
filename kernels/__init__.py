"""The CUDA sources of easgd_local, header-free: NVRTC compiles them for the GPU at hand, g++ for the tests.

Installed only as `easgd_local.kernels`, because `kernels` is also the name of a public package.
"""

from pathlib import Path


def source(name: str) -> str:
    """The text of `<name>.cu`, to be handed to NVRTC."""
    folder = Path(__file__).parent
    path = folder / f"{name}.cu"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.cu")))
        raise ValueError(f"kernel source {name!r}: no such file in easgd_local.kernels, which holds {known}.")
    return path.read_text(encoding="utf-8")
