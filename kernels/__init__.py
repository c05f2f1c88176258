"""The CUDA sources of easgd_local, header-free: NVRTC compiles them for the GPU at hand, g++ for the tests.

Installed only as `easgd_local.kernels`, because `kernels` is also the name of a public package.
"""

from pathlib import Path

SHARED = "vectors.cuh"  # how every kernel goes through its vectors


def names() -> list[str]:
    """The files of kernels, without their endings."""
    return sorted(file.stem for file in Path(__file__).parent.glob("*.cu"))


def source(name: str) -> str:
    """The text of `<name>.cu` behind that of `vectors.cuh`, to be handed to NVRTC; messages name the two by line."""
    folder = Path(__file__).parent
    path = folder / f"{name}.cu"
    if not path.is_file():
        known = ", ".join(names())
        raise ValueError(f"kernel source {name!r}: no such file in easgd_local.kernels, which holds {known}.")
    files = (folder / SHARED, path)
    return "".join(f'#line 1 "{file.name}"\n{file.read_text(encoding="utf-8")}' for file in files)
