"""How fast is every kernel on the device, as a share of a device copy of the same bytes?

Every operation of `backend.operations`, at two lengths. The bytes that it moves are counted in its source, a
vector read 4, one written 4, one updated 8 an element, and must be those that its comment says. The bound is the
driver's copy on the device (torch's `copy_` of a whole tensor) that moves as many bytes, half of them read and half
written. GB = 10^9 bytes a second.

"warm" is the mean of launches one behind the other, as many as move a gigabyte, at most 50; "cold" is one launch behind
the reading of a buffer of twice the largest last-level cache. Kernel and copy take turns. All is timed on the device,
which starts when the host has enqueued it. The shorter vectors fit into such a cache: warm, they say nothing of the
memory.

Beside `pull`, `nesterov` and `amsgrad` stand their rivals on the same memory: torch operation by operation, the same
through torch.compile, and CuPy's ElementwiseKernel; beside a pull and a Nesterov step, torch.optim.SGD, fused, and a
pull in torch. Their GB are those that our kernels move, so that shares compare times.

First the results are checked: the kernels' equal the CPU's to the bit, the rivals' but for rounding.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import harness
import numpy as np
from link import Enqueue, Rig, about, graphics_for, record

from easgd_local import kernels
from easgd_local.backend.cpu import CpuOps, Vector
from easgd_local.backend.cuda import DeviceVector
from easgd_local.backend.operations import OPERATIONS

QUESTION = "How fast is every kernel on the device, as a share of a device copy of the same bytes?"
FLOATS, QUICK_FLOATS = (25_000_000, 1_000_003), (10_007,)
REPETITIONS, QUICK_REPETITIONS = 21, 3
CHECKED_FLOATS = 1023
SCALARS = (0.3, 0.9, 0.99, 1e-3)  # of every operation, as many as it has
WARM_BYTES, MOST_LAUNCHES = 10**9, 50
SCRUB_BYTES, QUICK_SCRUB_BYTES = 256 << 20, 1 << 20
KERNEL = r'((?://.*\n)+)\nextern "C" __global__ void (\w+)\([^)]*\)\n(\{\n(?:.*\n)*?\}\n)'  # its comment, name and body
USES = {"Read": 4, "Optional": 4, "Seldom": 4, "Written": 4, "Updated": 8}  # bytes per element
TOLERANCE = 32 * float(np.finfo(np.float32).eps)  # rivals may contract and reorder some ten operations


# The kernels


@dataclass(frozen=True)
class Case:
    """An operation, with the vector that may be absent or without it."""

    operation: str
    absent: bool

    @property
    def name(self) -> str:
        return f"{self.operation}, without d" if self.absent else self.operation

    @property
    def vectors(self) -> int:
        """How many it takes."""
        kind = OPERATIONS[self.operation]
        return len(kind.roles) + (kind.optional and not self.absent)

    def arguments(self, vectors: list[Any]) -> list[Any]:
        """In the operation's order: what it must have, scalars, what may be absent."""
        kind = OPERATIONS[self.operation]
        required = len(kind.roles)
        return [*vectors[:required], *SCALARS[: kind.scalars], *vectors[required : self.vectors]]

    def call(self, ops: Any, vectors: list[Any]) -> None:
        """By any backend."""
        getattr(ops, self.operation)(*self.arguments(vectors))


CASES = [Case(name, absent) for name, kind in OPERATIONS.items() for absent in ((False, True)[: 1 + kind.optional])]


def bytes_per_element() -> dict[Case, int]:
    """What each kernel moves, by the uses in its source; that its comment says the same is asserted."""
    moved = {}
    for file in kernels.names():
        for comment, name, body in re.findall(KERNEL, kernels.source(file)):
            if name not in OPERATIONS:
                continue
            counted = sum(USES[use] for use in re.findall(rf"\b({'|'.join(USES)})\{{", body))
            said = re.search(r"(\d+) bytes per element(?:, (\d+) without d)?", comment)
            assert said and int(said[1]) == counted, f"{name}: moves {counted} bytes per element, its comment: {said}"
            moved[Case(name, False)] = counted
            if OPERATIONS[name].optional:
                assert said[2] and int(said[2]) == counted - 4, f"{name} without d: its comment says {said[2]} bytes"
                moved[Case(name, True)] = counted - 4
    assert set(moved) == set(CASES), set(moved) ^ set(CASES)
    return moved


def check(rig: Rig) -> None:
    """Every operation equals the CPU's to the bit, and so does the number of elements that it refused."""
    with_nan = CHECKED_FLOATS // 2
    places = [rig.gpu.allocate(CHECKED_FLOATS) for _ in range(6)]
    expected = CpuOps()
    for case in CASES:
        arrays = [values(CHECKED_FLOATS, seed) for seed in range(case.vectors)]
        if OPERATIONS[case.operation].guarded:
            arrays[-1][with_nan] = np.nan
        load(rig, places, arrays)
        case.call(rig.ops, places)
        case.call(expected, arrays)
        for vector, array in zip(places, arrays, strict=False):
            assert np.array_equal(rig.transfer.host(vector), array, equal_nan=True), f"{case.name} differs from the CPU"
    rig.gpu.fetch_counter(rig.gpu.training, 0)
    rig.gpu.training.synchronize()
    assert rig.gpu.fetched(0) == expected.nonfinite, (rig.gpu.fetched(0), expected.nonfinite)


def values(n: int, seed: int) -> Vector:
    """From 0 to 1."""
    return np.random.default_rng(seed).random(n, np.float32)


def load(rig: Rig, vectors: list[DeviceVector], arrays: list[Vector]) -> None:
    """To the device."""
    for vector, array in zip(vectors, arrays, strict=False):
        rig.transfer.load(vector, array)


# The rivals, on the same memory


def torch_pull(x: Any, c: Any, d: Any, alpha: float) -> None:
    d.copy_(x).sub_(c).mul_(alpha)
    c.add_(d)


def torch_nesterov(x: Any, v: Any, g: Any, lr: float, momentum: float, d: Any) -> None:
    v.mul_(momentum).sub_(g, alpha=lr)
    x.sub_(d).add_(v)


def torch_amsgrad(
    c: Any, m: Any, v: Any, vhat: Any, x: Any, g: Any, lr: float, beta1: float, beta2: float, epsilon: float
) -> None:
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    vhat.copy_(vhat.maximum(v))
    c.addcdiv_(m, vhat.sqrt().add_(epsilon), value=-lr)
    x.copy_(c)


TORCH: dict[str, Callable[..., None]] = {
    "pull": torch_pull, "nesterov": torch_nesterov, "amsgrad": torch_amsgrad
}  # fmt: skip

CUPY = {  # what is read only, what is written, and the formula
    "pull": ("x alpha", "c d", "d = alpha * (x - c); c += d"),
    "nesterov": ("g lr momentum d", "x v", "v = momentum * v - lr * g; x = (x - d) + v"),
    "amsgrad": (
        "g lr beta1 beta2 epsilon", "c m v vhat x",
        "m = beta1 * m + (1 - beta1) * g; v = beta2 * v + (1 - beta2) * g * g; vhat = max(vhat, v);"
        "c -= lr * m / (sqrt(vhat) + epsilon); x = c",
    ),
}  # fmt: skip


def torch_on(function: Callable[..., None], case: Case, vectors: list[DeviceVector]) -> Enqueue:
    """A function of tensors, on that memory; it goes to torch's current stream, which is the training stream."""
    return partial(function, *case.arguments(tensors(vectors)))


def compiled_on(function: Callable[..., None], case: Case, vectors: list[DeviceVector]) -> Enqueue:
    """The same through torch.compile, for that length alone."""
    import torch

    return torch_on(torch.compile(function, dynamic=False), case, vectors)


def cupy_on(handle: int, case: Case, vectors: list[DeviceVector]) -> Enqueue:
    """The same in one kernel that CuPy writes, on the stream of that handle."""
    import cupy

    class Borrowed:
        def __cuda_stream__(self) -> tuple[int, int]:
            return 0, handle

    stream = cupy.cuda.Stream.from_external(Borrowed())
    read, written, formula = CUPY[case.operation]
    declared = [", ".join(f"float32 {name}" for name in names.split()) for names in (read, written)]
    kernel = cupy.ElementwiseKernel(*declared, formula, f"rival_{case.operation}")
    names = inspect.signature(TORCH[case.operation]).parameters
    given = dict(zip(names, case.arguments([cupy.asarray(vector) for vector in vectors]), strict=True))
    arguments = [given[name] for name in f"{read} {written}".split()]

    def enqueue() -> None:
        with stream:
            kernel(*arguments)

    return enqueue


def tensors(vectors: list[DeviceVector]) -> list[Any]:
    """torch's view of them."""
    import torch

    return [torch.as_tensor(vector, device="cuda") for vector in vectors]


def pull_and_step(ops: Any, vectors: list[Any]) -> None:
    """d <- α(x - c);  c <- c + d;  v <- δv - ηg;  x <- (x - d) + v"""
    x, c, d, v, g = vectors[:5]
    ops.pull(x, c, d, *SCALARS[:1])
    ops.nesterov(x, v, g, *SCALARS[:2], d)


def sgd_on(vectors: list[DeviceVector]) -> Enqueue:
    """The same by torch.optim.SGD, fused, behind a pull in torch, for tensors x, c, d, g; its momentum is its own."""
    import torch

    x, c, d, _, g = tensors(vectors[:5])
    parameter = torch.nn.Parameter(x)
    parameter.grad = g
    optimizer = torch.optim.SGD([parameter], SCALARS[0], momentum=SCALARS[1], nesterov=True, fused=True)

    def enqueue() -> None:
        torch_pull(x, c, d, SCALARS[0])
        x.sub_(d)
        optimizer.step()

    return enqueue


def first_sgd_step(ops: Any, vectors: list[Any]) -> None:
    """d <- α(x - c);  c <- c + d;  x <- (x - d) - η(g + δg), as torch makes the first step"""
    x, c, d, _, g = vectors[:5]
    ops.pull(x, c, d, SCALARS[0])
    ops.descend(x, g, SCALARS[0] * (1 + SCALARS[1]), d)


@dataclass(frozen=True)
class Entry:
    """What is timed: a name, the bytes per element that count, what enqueues it on vectors, and what it computes."""

    name: str
    bytes_per_element: int
    on: Callable[[list[DeviceVector]], Enqueue]
    reference: Callable[[Any, list[Any]], None]


def ours(rig: Rig) -> list[Entry]:
    """Every operation by its kernel."""
    moved = bytes_per_element()
    entries = [Entry(case.name, moved[case], enqueued_by(rig, case.call), case.call) for case in CASES]
    both = moved[Case("pull", False)] + moved[Case("nesterov", False)]
    return [*entries, Entry("pull and nesterov", both, enqueued_by(rig, pull_and_step), pull_and_step)]


def enqueued_by(rig: Rig, call: Callable[[Any, list[Any]], None]) -> Callable[[list[DeviceVector]], Enqueue]:
    """By the operations of the device."""
    return lambda vectors: partial(call, rig.ops, vectors)


def rivals(handle: int) -> list[Entry]:
    """Others who compute the same on the stream of that handle."""
    moved, entries = bytes_per_element(), []
    for name, function in TORCH.items():
        case = Case(name, False)
        ways = {
            "torch eager": partial(torch_on, function, case),
            "torch.compile": partial(compiled_on, function, case),
            "CuPy": partial(cupy_on, handle, case),
        }
        entries += [Entry(f"{name}, {way}", moved[case], partial(limited, on, case.vectors), case.call)
                    for way, on in ways.items()]  # fmt: skip
    both = moved[Case("pull", False)] + moved[Case("nesterov", False)]
    return [*entries, Entry("pull and nesterov, torch eager and torch.optim.SGD", both, sgd_on, first_sgd_step)]


def limited(on: Callable[[list[DeviceVector]], Enqueue], count: int, vectors: list[DeviceVector]) -> Enqueue:
    """On the first so many vectors."""
    return on(vectors[:count])


def able(rig: Rig, entries: list[Entry], vectors: list[DeviceVector]) -> list[Entry]:
    """The rivals that run here, having computed on these vectors what they should; of the others it is said why."""
    found = []
    for entry in entries:
        arrays = [values(len(vectors[0]), seed) for seed in range(len(vectors))]
        load(rig, vectors, arrays)
        try:
            entry.on(vectors)()
            rig.gpu.training.synchronize()
            entry.reference(CpuOps(), arrays)
            compare(entry.name, [rig.transfer.host(vector) for vector in vectors], arrays)
        except Exception as error:  # something is missing, or the result is wrong: the others can still be timed
            said = (str(error).strip().splitlines() or [""])[0]
            print(f"{entry.name}: left out, {type(error).__name__}: {said}")
            continue
        found.append(entry)
    return found


def compare(name: str, found: list[Vector], wanted: list[Vector]) -> None:
    """Equal but for rounding."""
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        error, most = float(np.abs(one - other).max()), TOLERANCE * float(np.abs(other).max())
        assert error <= most, f"{name}: vector {number} differs by {error}, more than {most}"


# Timing


@dataclass(frozen=True)
class Bound:
    """The copy of as many bytes, and what clears the caches."""

    rig: Rig
    source: DeviceVector
    target: DeviceVector
    scrubbed: DeviceVector

    def copy(self, moved_bytes: int) -> None:
        """Reads half of them and writes half."""
        self.rig.gpu.training.copy_on_device(self.target.address, self.source.address, moved_bytes // 2)

    def scrub(self) -> None:
        """Fills the caches with what need not be written back: by reading it, where torch can."""
        if self.rig.pretended:
            self.rig.gpu.training.fill(self.scrubbed.address, 0, len(self.scrubbed))
        else:
            self._seen_by_torch.sum()

    @cached_property
    def _seen_by_torch(self) -> Any:
        import torch

        self.rig.gpu.training.fill(self.scrubbed.address, 0, len(self.scrubbed))
        return torch.as_tensor(self.scrubbed, device="cuda")


def measure(bound: Bound, entry: Entry, vectors: list[DeviceVector], repetitions: int) -> Iterator[harness.Row]:
    """Rows of one entry at one length, warm and cold."""
    moved_bytes, operation = entry.bytes_per_element * len(vectors[0]), entry.on(vectors)
    copy = partial(bound.copy, moved_bytes)
    operation()  # a compiler may compile for this length
    bound.rig.gpu.training.synchronize()
    for cache in ("warm", "cold"):
        launches = 1 if cache == "cold" else int(np.clip(WARM_BYTES // moved_bytes, 1, MOST_LAUNCHES))
        before = bound.scrub if cache == "cold" else lambda: None
        pair = [bound.rig.timer(partial(repeat, one, launches), before) for one in (operation, copy)]
        seconds = [[timer()[0] / launches for timer in pair] for _ in range(repetitions + 1)]
        yield row(entry, len(vectors[0]), cache, np.array(seconds[1:]))  # the first is not counted


def repeat(operation: Enqueue, times: int) -> None:
    """One behind the other."""
    for _ in range(times):
        operation()


def row(entry: Entry, floats: int, cache: str, seconds: Any) -> harness.Row:
    """One row; the share is taken repetition by repetition."""
    moved_gb = 1e-9 * entry.bytes_per_element * floats
    operation_s, copy_s = seconds.T
    return {
        "entry": f"{entry.name}, {floats:,} floats, {cache}",
        "bytes_per_element": entry.bytes_per_element,
        "operation_us": harness.spread(1e6 * operation_s),
        "gb_per_s": harness.spread(moved_gb / operation_s),
        "copy_gb_per_s": harness.spread(moved_gb / copy_s),
        "share_of_copy": harness.spread(copy_s / operation_s),
    }


def run(rig: Rig, lengths: tuple[int, ...], repetitions: int, scrub_bytes: int) -> Iterator[harness.Row]:
    """All rows."""
    check(rig)
    entries = ours(rig)
    most = max(entry.bytes_per_element for entry in entries) // 8 * max(lengths)  # floats of half the bytes
    bound = Bound(rig, *(rig.gpu.allocate(n) for n in (most, most, scrub_bytes // 4)))
    rig.ops.fill(bound.source, 0.5)
    places = [rig.gpu.allocate(max(lengths)) for _ in range(6)]
    yield from measure_all(bound, entries, places, lengths, repetitions)
    if rig.stream is None:
        print("The driver only pretends: torch and CuPy cannot compute in its memory, so there are no rivals.")
        return
    others = able(rig, rivals(rig.stream.cuda_stream), [place[: min(lengths)] for place in places])
    yield from measure_all(bound, others, places, lengths, repetitions)


def measure_all(
    bound: Bound, entries: list[Entry], places: list[DeviceVector], lengths: tuple[int, ...], repetitions: int
) -> Iterator[harness.Row]:
    """Rows of these entries at every length."""
    arrays = [values(max(lengths), seed) for seed in range(len(places))]
    for floats in lengths:
        vectors = [place[:floats] for place in places]
        for entry in entries:
            load(bound.rig, vectors, [array[:floats] for array in arrays])
            yield from measure(bound, entry, vectors, repetitions)


def main() -> None:
    parser = harness.arguments(QUESTION)
    parser.add_argument("--floats", type=int, nargs="+", help=f"lengths; default {FLOATS[0]} and {FLOATS[1]}")
    given = parser.parse_args()
    lengths = tuple(given.floats or (QUICK_FLOATS if given.quick else FLOATS))
    graphics = graphics_for("kernels", given)
    common = about("kernels", graphics)
    with Rig(graphics) as rig:
        repetitions = given.repetitions or (QUICK_REPETITIONS if given.quick else REPETITIONS)
        scrub_bytes = QUICK_SCRUB_BYTES if given.quick else SCRUB_BYTES
        record(run(rig, lengths, repetitions, scrub_bytes), common, given)


if __name__ == "__main__":
    main()
