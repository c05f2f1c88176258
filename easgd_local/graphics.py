"""The GPUs of a run as the launcher's side finds them, in a process of its own: what they can do, and their kernels.

Found out once, so that all workers do the same, and before training starts, so that what is missing is one sentence.
"""

from __future__ import annotations

import mmap
import time
from collections import Counter
from collections.abc import Callable, Mapping
from ctypes import c_uint64
from dataclasses import dataclass, replace

from easgd_local import hardware, kernels
from easgd_local.backend.cuda import Gpu, compiled
from easgd_local.backend.driver import Attribute, Device, Driver, DriverError, dotted
from easgd_local.backend.resources import Stream
from easgd_local.stream_words import WAYS

Capability = tuple[int, int]
Images = Mapping[str, bytes]  # the machine code of each file of kernels

SMALL_BYTES = 1 << 20  # of c: below it blocks are not worth carrying. Not measured on a GPU yet.
CONTEXT_BYTES = 600 << 20  # what a process takes of a GPU beside its vectors and activations: an estimate
TRIAL_S, EARLY_S = 5.0, 5e-3
TRIAL_VALUE = 2**40 + 1
PAGE = 4096
ORDER = tuple(WAYS)  # from the best to the last resort


@dataclass(frozen=True)
class Graphics:
    """What all workers of a run know of the GPUs: compute capabilities by number, kernels, and how they exchange.

    `words` is one of `stream_words.WAYS`, `exchange` one of `link.EXCHANGES`. `exclusive` are the numbers of those that
    take one process at a time. `pretended`: the driver is that of the tests, and torch computes on the CPU.
    """

    names: tuple[str, ...]
    capabilities: tuple[Capability, ...]
    free_bytes: tuple[int, ...]
    images: Mapping[Capability, Images]
    words: str
    coherent: bool
    mps: bool
    pretended: bool
    exclusive: tuple[int, ...] = ()
    exchange: str = "overlap"

    def device_of(self, rank: int) -> int:
        """The number of the GPU of worker `rank`: neighbours in rank are on different ones."""
        return rank % len(self.capabilities)

    def images_for(self, rank: int) -> Images:
        """The kernels for the GPU of worker `rank`."""
        return self.images[self.capabilities[self.device_of(rank)]]

    def exchanging(self, exchange: str, turns: str, vector_bytes: int, workers: int) -> Graphics:
        """With the way of exchanging that was asked for, or the one that suits a center of this size; and the way of
        waiting that suits so many workers.

        Raises `ValueError` for one that is wrong with this order of turns.
        """
        if exchange in ("overlap", "inline") and turns == "none":
            raise ValueError(
                f"exchange={exchange} with turns=none: whole blocks would be brought back over what others wrote "
                f"meanwhile; use exchange=zerocopy, or leave it out."
            )
        words = self.words
        if words == "kernels" and workers > len(self.names):
            words = "processor"  # a kernel that waits would take its share of the time from the others on its GPU
        if exchange == "auto":
            in_place = turns == "none" or self.coherent or vector_bytes <= SMALL_BYTES
            exchange = "zerocopy" if in_place else "overlap"
        return replace(self, exchange=exchange, words=words)

    def check_processes(self, workers: int, *, evaluator: bool = False) -> None:
        """`ValueError` unless each GPU may be used by its workers, and the first by a process that evaluates."""
        for number in () if self.mps else self.exclusive:  # MPS makes one process of all
            here = sum(self.device_of(rank) == number for rank in range(workers)) + (evaluator and number == 0)
            if here > 1:
                among = ", the one that evaluates the center among them," if evaluator and number == 0 else ""
                raise ValueError(
                    f"workers={workers}: {here} processes{among} would be on GPU {number} ({self.names[number]}), "
                    f"which takes one at a time (compute mode exclusive-process); let it take more by nvidia-smi -c 0, "
                    f"or choose other GPUs by CUDA_VISIBLE_DEVICES."
                )

    def check_room(self, workers: int, needed_bytes: int) -> None:
        """`MemoryError` unless each GPU has room for so many bytes for each of its workers."""
        for number, free in enumerate(self.free_bytes):
            here = sum(self.device_of(rank) == number for rank in range(workers))
            evaluator = CONTEXT_BYTES if number == 0 else 0
            if here * (needed_bytes + CONTEXT_BYTES) + evaluator > free:
                raise MemoryError(
                    f"workers={workers}: {here} of them would be on GPU {number} ({self.names[number]}), where each "
                    f"takes {(needed_bytes + CONTEXT_BYTES) / 2**30:.1f} GiB without its activations and only "
                    f"{free / 2**30:.1f} GiB are free; choose fewer workers or a smaller model, or free some memory."
                )


def device_name(graphics: Graphics | None) -> str:
    """Where workers compute, in words."""
    if graphics is None:
        return "cpu"
    kinds = ", ".join(f"{count} x {name}" for name, count in Counter(graphics.names).items())
    return f"cuda ({kinds}; {graphics.exchange}, {graphics.words})"


def effective(graphics: Graphics | None) -> dict[str, str]:
    """Where workers compute and how they reach the center, for config.json."""
    ways = {} if graphics is None else {"words": graphics.words, "exchange": graphics.exchange}
    return {"device": device_name(graphics), **ways}


def look(known: Mapping[Capability, Images] | None = None) -> Graphics:
    """Asks the driver, torch and CuPy; `ValueError` with one sentence for what is missing. Starts CUDA in this process.

    known: kernels that need not be compiled again.
    """
    try:
        driver = Driver.open()
        devices = [Device(driver, number) for number in range(driver.devices)]
        if not driver.pretended:
            _check_torch(driver)
        capabilities = tuple(device.compute_capability for device in devices)
        images = {one: (known or {}).get(one) or _compile(one) for one in set(capabilities)}
        ways = [_trial(device, images[device.compute_capability]) for device in devices]
    except DriverError as error:
        raise ValueError(f"device=cuda: {error}") from error
    return Graphics(
        names=tuple(device.name for device in devices),
        capabilities=capabilities,
        free_bytes=tuple(free for _, free in ways),
        images=images,
        words=max((way for way, _ in ways), key=ORDER.index),
        coherent=all(device.attribute(Attribute.HOST_PAGE_TABLES) == 1 for device in devices),
        mps=hardware.mps_is_active(),
        pretended=driver.pretended,
        exclusive=tuple(device.number for device in devices if device.exclusive),
    )


def _check_torch(driver: Driver) -> None:
    import torch

    if torch.cuda.is_available():
        return
    built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
    raise ValueError(
        f"device=cuda: torch {torch.__version__} {built} and finds no GPU that it can use, while the driver supports "
        f"CUDA {dotted(driver.version)}; install a torch built for CUDA of at most that."
    )


def _compile(capability: Capability) -> Images:
    try:
        return {name: compiled(name, capability) for name in kernels.names()}
    except ImportError as error:
        raise ValueError(
            f"device=cuda: CuPy, which compiles the kernels, cannot be imported ({error}); pip install "
            f"'easgd_local[cuda13]', or [cuda12] for a driver of CUDA 12."
        ) from error
    except Exception as error:
        if type(error).__name__ != "NVRTCError":
            raise
        raise ValueError(
            f"device=cuda: the kernels cannot be compiled for sm_{capability[0]}{capability[1]} ({error}); install the "
            f"CuPy of a CUDA that knows this GPU, and none that is newer than the driver."
        ) from error


def _trial(device: Device, images: Images) -> tuple[str, int]:
    """The best way that this device really waits for and writes words of pinned host memory, and its free bytes."""
    gpu = Gpu(images, device.number)
    free = gpu.driver.free_bytes()
    memory = mmap.mmap(-1, PAGE)
    words = memoryview(memory).cast("Q")
    address = gpu.register(memory, PAGE).device_address()
    for place, way in enumerate(ORDER[:-1]):
        if way == "memops" and not device.memops_64:
            continue
        if way == "kernels" and hardware.launches_block():  # the launch of one that waits would not return
            continue
        try:
            if _works(gpu, way, words, address, 2 * place):
                words.release()
                gpu.__exit__(None, None, None)
                return way, free
        except DriverError:
            continue
    gpu.abandon()  # a stream may wait for ever; it ends with this process, and until then its memory stays
    _ABANDONED.append((gpu, memory, words))
    return ORDER[-1], free


_ABANDONED: list[object] = []


def _works(gpu: Gpu, way: str, words: memoryview[int], address: int, place: int) -> bool:
    """Whether a stream waits for word `place` until it is written from here, and then writes the next one."""
    stream, awaited, written = gpu.own(Stream.create(gpu.driver)), address + 8 * place, address + 8 * place + 8
    if way == "memops":
        stream.wait_value(awaited, TRIAL_VALUE)
        stream.write_value(written, TRIAL_VALUE)
    else:
        gpu.launch(stream, "await_word", c_uint64(awaited), c_uint64(TRIAL_VALUE))
        gpu.launch(stream, "store_word", c_uint64(written), c_uint64(TRIAL_VALUE))
    time.sleep(EARLY_S)
    too_early = stream.is_done()
    words[place] = TRIAL_VALUE
    return not too_early and _soon(stream.is_done) and words[place + 1] == TRIAL_VALUE


def _soon(done: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + TRIAL_S
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(1e-4)
    return True
