"""What this machine can do for a training: `easgd-local doctor`. Looks, measures for a second, changes nothing."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from easgd_local import hardware
from easgd_local.backend.driver import Attribute, Device, Driver, DriverError, dotted
from easgd_local.center import Center, Layout
from easgd_local.devices import OnGpu
from easgd_local.flat import Flat
from easgd_local.fork_server import ask
from easgd_local.gpus import UNTRIED, find
from easgd_local.graphics import Graphics, device_name
from easgd_local.schedules import Calendar

REPETITIONS = 5
WORDS = {True: "yes", False: "no"}


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` is empty where all is well."""

    subject: str
    found: str
    remedy: str = ""


def examine(*, model: str, data: str, workers: int, tau: int, batch_size: int) -> Iterator[Finding]:
    """The machine first, then GPUs and what they need, then the exchange of this model, measured on the CPU and, where
    there is a GPU that can be used, there too."""
    yield from machine(workers)
    said = []
    for one in graphics():
        said.append(one.remedy)
        yield one
    measured = {"model": model, "data": data, "workers": workers, "tau": tau, "batch_size": batch_size}
    yield from exchange(**measured)  # type: ignore[arg-type]
    try:
        found = find()
    except ValueError as error:
        news = "" if any(remedy and remedy in str(error) for remedy in said) else str(error)
        yield Finding("So", "`train` and `launch` run on the CPU here", news)
        return
    yield from ask(partial(exchange_on_gpu, found, **measured))  # type: ignore[arg-type]
    yield Finding("So", f"`--device cuda` uses {device_name(found)}", UNTRIED)


def machine(workers: int) -> Iterator[Finding]:
    """Cores, memory, NUMA."""
    cores, room = hardware.cores(), hardware.available_bytes()
    crowded = f"more workers than cores gain nothing on CPUs; try --workers {cores}" if workers > cores else ""
    yield Finding("processor", f"{hardware.describe()['processor']}, {cores} cores for {workers} workers", crowded)
    yield Finding("memory", f"{room / 2**30:.1f} GiB available, of which the center must be claimed at the start")
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1
    yield Finding("NUMA nodes", str(nodes), "" if nodes == 1 else "the center lies in the memory of one of them")


def graphics() -> Iterator[Finding]:
    """The driver, each GPU, CuPy, MPS; what is missing."""
    try:
        driver = Driver.open()
    except DriverError as error:
        yield Finding("GPU driver", "none that can be used", str(error))
    else:
        yield Finding("GPU driver", f"for CUDA {dotted(driver.version)}")
        for number in range(driver.devices):
            yield from gpu(Device(driver, number))
    found = [name for name in ("cupy-cuda12x", "cupy-cuda13x") if name in hardware.versions()]
    missing = "" if found else "pip install 'easgd_local[cuda13]', or [cuda12] for a driver of CUDA 12"
    yield Finding(
        "CuPy", ", ".join(f"{name} {hardware.versions()[name]}" for name in found) or "not installed", missing
    )
    if importlib.util.find_spec("torch") is not None:
        import torch

        built = torch.version.cuda
        yield Finding("torch", f"{torch.__version__}, {f'built for CUDA {built}' if built else 'built without CUDA'}")
    mps = hardware.mps_is_active()
    yield Finding("MPS", "active" if mps else "not active", "not tried with easgd_local" if mps else "")


def gpu(device: Device) -> Iterator[Finding]:
    """One GPU: what the exchange in stream order needs of it, and its link."""
    major, minor = device.compute_capability
    subject = f"GPU {device.number}"
    yield Finding(subject, f"{device.name}, sm_{major}{minor}, at {device.pci_bus_id}, {link(device.pci_bus_id)}")
    memops, copies = device.memops_64, device.attribute(Attribute.ASYNC_ENGINES)
    peers = [
        str(other) for other in range(device.driver.devices)
        if other != device.number and device.reaches(Device(device.driver, other))
    ]  # fmt: skip
    yield Finding(
        subject,
        f"waits for and writes of 64-bit words in streams: {WORDS[memops]}; host memory can be pinned in place: "
        f"{WORDS[bool(device.attribute(Attribute.HOST_REGISTER))]}; copies beside a kernel: {copies}",
        "" if memops else "kernels or the processor wait instead, which is slower; update the driver",
    )
    if device.exclusive:
        yield Finding(
            subject, "takes one process at a time (compute mode exclusive-process)",
            "one worker at most, and none of `train`, which evaluates in a process of its own; nvidia-smi -c 0",
        )  # fmt: skip
    if device.driver.devices > 1:
        yield Finding(subject, f"peer access to GPU {', '.join(peers)}" if peers else "no peer access (none is needed)")


def link(pci_bus_id: str) -> str:
    """The link of a device now, and at its best, as the kernel tells it."""
    folder = Path("/sys/bus/pci/devices") / pci_bus_id.lower()[-12:]
    try:
        now, best = (
            tuple((folder / f"{which}_link_{what}").read_text().strip() for what in ("speed", "width"))
            for which in ("current", "max")
        )
    except OSError:
        return "link not told"
    return f"link {now[0]} x{now[1]} now, at best {best[0]} x{best[1]}"


def exchange(*, model: str, data: str, workers: int, tau: int, batch_size: int) -> Iterator[Finding]:
    """Times one gradient step and one exchange of the model on the CPU, in this process."""
    import torch

    from easgd_local import data as datasets
    from easgd_local import models
    from easgd_local.backend.cpu import CpuOps, vector
    from easgd_local.gradient import Gradient

    if tau < 1 or batch_size < 1 or workers < 1:
        raise ValueError(f"tau={tau}, batch_size={batch_size}, workers={workers}: each must be at least 1.")
    dataset = datasets.load(data)
    before = torch.get_num_threads()
    net = models.build(model, shape=dataset.input_shape, classes=len(dataset.classes))
    threads = models.worth_threads(net, dataset.input_shape, batch_size, hardware.cores() // workers)
    torch.set_num_threads(threads)
    try:
        sampler = datasets.shard(0, 0, workers, batch_size, len(dataset.train))
        gradient = Gradient(net, dataset, sampler, rank=0, weight_decay=1e-4)
        ops, n = CpuOps(), gradient.n
        x, c, d = vector(n), vector(n), vector(n)
        x[:] = c[:] = gradient.flat.values()
        step_s = median_s(lambda t: gradient(ops, t, x))
        pull_s = median_s(lambda t: ops.pull(x, c, d, 0.1))
    finally:
        torch.set_num_threads(before)
    size = f"{gradient.flat.parameters:,} parameters, {4 * n / 2**20:.1f} MiB"
    yield Finding("model", f"{model} on {data}: {size}; a center of {2 * 4 * n / 2**20:.1f} MiB with its snapshot")
    used = "1 thread" if threads == 1 else f"{threads} threads"
    yield Finding("step", f"{1e3 * step_s:.2f} ms for {batch_size} samples with {used} (median of 5)")
    yield Finding("exchange", f"{1e3 * pull_s:.3f} ms on the CPU, {16 * n / pull_s / 1e9:.1f} GB/s (median of 5)")
    share = pull_s / (tau * step_s)
    cheap = round(pull_s / (0.01 * step_s))
    advice = f"a larger tau costs less: 1 % at --tau {cheap}" if share > 0.03 else ""
    yield Finding("predicted", f"at tau={tau} the exchange costs {100 * share:.2f} % of a step, waiting aside", advice)


def exchange_on_gpu(
    found: Graphics, *, model: str, data: str, workers: int, tau: int, batch_size: int
) -> list[Finding]:  # fmt: skip
    """Times one gradient step and one exchange of the model on the first GPU, by one worker that has it for itself."""
    from easgd_local import data as datasets
    from easgd_local import models
    from easgd_local.computing import Computing
    from easgd_local.gradient import Gradient

    dataset = datasets.load(data)
    net = models.build(model, shape=dataset.input_shape, classes=len(dataset.classes))
    n = Flat(net).n
    found = found.exchanging("auto", "strict", 4 * n, 1)
    computing = Computing(device="cpu" if found.pretended else "cuda")
    computing.set_up()
    sampler = datasets.shard(0, 0, workers, batch_size, len(dataset.train))
    with Center.create(Layout(1, n)) as center:
        place = OnGpu(center, 0, Calendar(1, 1), found)
        turns = place.turns("strict", lambda: None, 0, None)
        gradient = Gradient(net, dataset, sampler, rank=0, weight_decay=1e-4, computing=computing, memory=place)
        x, d = place.vector(n), place.vector(n)
        place.load(x, gradient.flat.values())
        place.load(d, np.zeros(n, np.float32))

        def step(t: int) -> None:
            gradient(place.ops, t, x)
            place.drain()

        def meet(number: int) -> None:
            for b in turns.visit():
                place.ops.pull(x[b], place.shared["c"][b], d[b], 0.1)
            place.drain()

        step_s, meet_s = median_s(step), median_s(meet)
        place.close(drained=True)
    share = meet_s / (tau * step_s)
    hidden = "hidden beside the gradient" if meet_s < step_s else "longer than a step, so it cannot all be hidden"
    return [
        Finding("on a GPU", f"{1e3 * step_s:.2f} ms a step of {batch_size} samples (median of 5)"),
        Finding("on a GPU", f"{1e3 * meet_s:.3f} ms an exchange ({found.exchange}), {8 * n / meet_s / 1e9:.1f} GB/s"),
        Finding("predicted", f"at tau={tau} it takes {100 * share:.2f} % of the steps' time: {hidden}"),
    ]


def median_s(work: Callable[[int], object]) -> float:
    """Median seconds of five calls after a first one; the call gets its number."""
    taken = []
    for number in range(REPETITIONS + 1):
        began = time.perf_counter()
        work(number)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])
