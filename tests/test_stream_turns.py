"""The exchange in stream order: real workers, processes, and a pretended CUDA driver whose streams are slow threads."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from easgd_local import fork_server, kernels
from easgd_local.backend.cpu import CpuOps
from easgd_local.backend.cuda import CudaOps, Gpu, Transfer, compiled
from easgd_local.backend.operations import OPERATIONS
from easgd_local.center import Center
from easgd_local.graphics import Graphics
from easgd_local.link import Link
from easgd_local.referee import Referee
from easgd_local.respondent import Respondent
from easgd_local.schedules import Calendar
from easgd_local.stream_turns import StreamStrict
from easgd_local.turns import Aborted
from tests import listings, threads
from tests.conftest import eventually
from tests.stream_peers import main, noise, plan_for
from tests.threads import N, starting_point

pytest_plugins = ["tests.fake_cuda"]
pytestmark = pytest.mark.usefixtures("fake_cuda")

RULES = [
    {"name": "easgd", "lr": 0.1, "tau": 1, "alpha": 0.25}, {"name": "eamsgd", "lr": 0.03, "tau": 3, "alpha": 0.3},
    {"name": "easgd-gs", "lr": 0.1, "tau": 2, "alpha": 0.3, "first": "worker"}, {"name": "adownpour", "lr": 0.05},
    {"name": "apam", "lr": 0.01}, {"name": "passm+", "lr": 0.02, "full_steps": 3}, {"name": "admm", "lr": 0.02},
]  # fmt: skip
SYNCHRONOUS = [
    {"name": "easgd-sync", "lr": 0.1, "tau": 2, "alpha": 0.25}, {"name": "diloco", "inner": "sgd", "lr": 0.1, "tau": 2},
]  # fmt: skip
WAYS = [
    ("sma", "overlap", "kernels"), ("mdownpour", "overlap", "processor"), ("mdownpour", "inline", "memops"),
    ("sma", "zerocopy", "memops"), ("sma", "zerocopy", "processor"),
]  # fmt: skip


class Run:
    """A center, and processes that work on it."""

    def __init__(
        self, stack: ExitStack, found: Graphics, rule: dict[str, Any], workers: int, steps: int,
        evaluate_every: int = 0, turns: str = "strict", **more: Any,
    ) -> None:  # fmt: skip
        self.values = {"rule": rule, "workers": workers, "steps": steps, "n": N, "evaluate_every": evaluate_every}
        self.values |= {"turns": turns}
        self.plan, self._more = plan_for(**self.values), {"found": found, **more}
        self._patience_s = 20 if found.pretended else 50  # real ones start slowly, many at a time
        self.center = stack.enter_context(Center.create(self.plan.layout))
        for name in self.center.vectors:
            if name.rstrip("0123456789") in ("c", *self.plan.rule.copies):
                self.center.vectors[name][:] = starting_point()
        self._stack, self.processes = stack, list[Any]()

    def start(self, **given: dict[str, Any]) -> None:
        """`given["worker_1"]` goes to worker 1."""
        for rank in range(self.plan.layout.workers):
            environment = {name: value for name, value in os.environ.items() if "CUDA" in name}
            arguments = self.values | self._more | {"rank": rank} | given.get(f"worker_{rank}", {})
            memory = f"/proc/{os.getpid()}/fd/{self.center.fd}"
            process = fork_server.context().Process(target=main, args=(memory, environment), kwargs=arguments)
            with fork_server.starting():
                process.start()
            self._stack.callback(lambda p=process: (p.kill(), p.join()))
            self.processes.append(process)
        assert eventually(lambda: all(self.center.held[rank] for rank in range(len(self.processes))), self._patience_s)
        self.center.leave[0] = 1

    def codes(self) -> list[int | None]:
        return [self.code(rank) for rank in range(len(self.processes))]

    def code(self, rank: int) -> int | None:
        """The exit code of a worker; None if it has not ended in time."""
        self.processes[rank].join(self._patience_s)
        return self.processes[rank].exitcode

    def listing(self) -> listings.State:
        workers, blocks = self.plan.layout.workers, [self.plan.layout.block(b) for b in range(self.plan.layout.blocks)]
        rule, steps = self.plan.rule, self.plan.calendar.steps
        own = threads.owned(workers)
        return listings.compute(rule, starting_point(), workers, steps, threads.noisy_quadratic, blocks, own)


@pytest.fixture
def run(found: Graphics) -> Iterator[Callable[..., Run]]:
    fork_server.warm_up("easgd_local.preload_loop")
    with ExitStack() as stack:
        yield lambda *args, **kwargs: Run(stack, found, *args, **kwargs)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_JITTER_US", "150")
    monkeypatch.setenv("FAKE_CUDA_SEED", "5")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: " ".join(map(str, rule.values())))
def test_processes_that_exchange_in_stream_order_compute_the_listing_to_the_bit(rule, run, slow):
    two = run(rule, workers=2, steps=9)
    two.start()
    assert two.codes() == [0, 0]
    for name, value in two.listing().items():
        if name in two.center.vectors:
            assert np.array_equal(two.center.vectors[name].view(np.uint32), value.view(np.uint32)), name


@pytest.mark.parametrize("rule", SYNCHRONOUS, ids=lambda rule: rule["name"])
def test_a_rendezvous_in_stream_order_computes_the_listing_to_the_bit(rule, run, slow):
    three = run(rule, workers=3, steps=7, turns="together")
    three.start()
    assert three.codes() == [0, 0, 0]
    assert np.array_equal(three.center.vectors["c"].view(np.uint32), three.listing()["c"].view(np.uint32))


@pytest.mark.parametrize(("name", "exchange", "words"), WAYS)
def test_every_way_of_exchanging_and_of_waiting_computes_the_same(name, exchange, words, run, slow):
    turns = "together" if name == "sma" else "strict"
    two = run({"name": name, "lr": 0.03}, workers=2, steps=9, turns=turns, exchange=exchange, words=words)
    two.start()
    assert two.codes() == [0, 0]
    listed = two.listing()
    for vector in listed.keys() & two.center.vectors.keys():
        assert np.array_equal(two.center.vectors[vector], listed[vector]), vector
    assert {two.center.updates[b] for b in range(two.center.layout.blocks)} == {18}


@pytest.mark.parametrize(("exchange", "words"), [("overlap", "memops"), ("zerocopy", "kernels")])
def test_nothing_is_lost_where_blocks_are_granted_as_they_are_asked_for(exchange, words, run, slow):
    rule = {"name": "downpour", "lr": 0.1, "tau": 2}
    three = run(rule, workers=3, steps=9, turns="free", function="noise", exchange=exchange, words=words)
    with Referee(three.center, three.plan.calendar, three.plan.rule, "free"):
        three.start()
        assert three.codes() == [0, 0, 0]
    brought = sum(noise(i, t, np.zeros(N, np.float32)) for i in range(3) for t in range(8))  # those of step 8 stay
    assert np.allclose(three.center.vectors["c"], starting_point() - 0.1 * brought, atol=1e-5)
    assert {three.center.updates[b] for b in range(three.center.layout.blocks)} == {15}


def test_without_turns_what_a_worker_alone_writes_is_never_lost(run, slow):
    rule = {"name": "passm", "lr": 0.1, "momentum": 0.5}
    three = run(rule, workers=3, steps=9, turns="none", function="noise", exchange="zerocopy")
    three.start()
    assert three.codes() == [0, 0, 0]
    c = three.center.vectors["c"]
    for rank, own in enumerate(threads.owned(3)):
        wanted, u = starting_point()[own], np.zeros(own.stop - own.start, np.float32)
        for t in range(9):
            u = np.float32(0.5) * u + noise(rank, t, starting_point())[own]
            wanted = wanted - np.float32(0.1) * u
        assert np.array_equal(c[own], wanted)


def test_with_more_processes_and_a_snapshot_of_every_round_too(run, slow):
    workers = 4
    many = run({"name": "eamsgd", "lr": 0.03, "tau": 1, "alpha": 0.2}, workers, steps=6, evaluate_every=1)
    many.start()
    reader, seen = many.center, []
    for round in range(5):
        complete = (round + 1) * workers
        assert eventually(lambda c=complete: all(reader.turn[b] >= c for b in range(reader.layout.blocks)), 20)
        seen.append(reader.snapshot["c"].copy())
        reader.taken[0] = round + 1
    assert many.codes() == [0] * workers
    assert np.array_equal(reader.vectors["c"], many.listing()["c"])
    for round, snapshot in enumerate(seen):
        values = many.values | {"steps": round + 1}
        short = listings.compute(
            many.plan.rule, starting_point(), workers, values["steps"], threads.noisy_quadratic,
            [reader.layout.block(b) for b in range(reader.layout.blocks)],
        )  # fmt: skip
        assert np.array_equal(snapshot, short["c"]), round


def test_a_worker_killed_in_mid_exchange_holds_nobody_up_and_scribbles_nothing_afterwards(run, slow):
    three = run({"name": "easgd", "lr": 0.1, "tau": 1, "alpha": 0.25}, workers=3, steps=12)
    with Referee(three.center, three.plan.calendar, three.plan.rule, "strict") as referee:
        three.start(worker_1={"dies_at": 4})
        assert three.code(1) == -9
        referee.retire(1)
        assert [three.code(0), three.code(2)] == [0, 0]
        assert all(three.center.turn[b] >= 34 for b in range(three.center.layout.blocks))
    c = three.center.vectors["c"].copy()
    assert np.isfinite(c).all() and not np.array_equal(c, starting_point())
    time.sleep(0.05)
    assert np.array_equal(three.center.vectors["c"], c)


@pytest.mark.parametrize("forgotten", ["the turn", "the exchange"])
def test_a_missing_wait_is_found(forgotten, run, slow):
    """Known-bad exchanges: without waiting for the turn, or for the exchange where training needs what it brings."""
    two = run({"name": "downpour", "lr": 0.1, "tau": 1}, workers=2, steps=20)
    two.start(worker_0={"forgets": forgotten}, worker_1={"forgets": forgotten})
    two.codes()
    assert not np.array_equal(two.center.vectors["c"], two.listing()["c"])


# One process


@pytest.fixture
def gpu(found: Graphics) -> Iterator[Gpu]:
    with Gpu(found.images_for(0)) as made:
        yield made


def filled(gpu: Gpu, transfer: Transfer, values: np.ndarray) -> Any:
    vector = gpu.allocate(len(values))
    transfer.load(vector, values)
    return vector


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_enqueued_equals_that_of_the_cpu(name, absent, gpu):
    kind, rng = OPERATIONS[name], np.random.default_rng(3)
    arrays = [rng.random(1023).astype(np.float32) for _ in range(len(kind.roles) + kind.optional)]
    arrays[-1][5] = np.nan if kind.guarded else 0.5
    scalars = [0.3, 0.9, 0.99, 1e-3][: kind.scalars]
    if absent and kind.optional:
        arrays.pop()
    ops, transfer = CudaOps(gpu), Transfer(gpu)
    vectors = [filled(gpu, transfer, array) for array in arrays]
    required = len(kind.roles)
    getattr(ops, name)(*vectors[:required], *scalars, *vectors[required:])
    expected = CpuOps()
    getattr(expected, name)(*arrays[:required], *scalars, *arrays[required:])
    for vector, array in zip(vectors, arrays, strict=True):
        assert np.array_equal(transfer.host(vector), array, equal_nan=True)
    gpu.fetch_counter(gpu.training, 3)
    gpu.training.synchronize()
    ops.refused = gpu.fetched(3)
    assert ops.nonfinite == expected.nonfinite
    ops.nonfinite = 0
    assert ops.nonfinite == 0


def test_copy_and_fill_are_those_of_the_cpu_and_nothing_is_enqueued_for_nothing(gpu):
    ops, transfer = CudaOps(gpu), Transfer(gpu)
    y, x = filled(gpu, transfer, np.zeros(31, np.float32)), filled(gpu, transfer, np.arange(31, dtype=np.float32))
    ops.copy(y[3:20], x[3:20])
    ops.fill(y[25:], -0.5)
    ops.copy(y[9:9], x[9:9])
    ops.fill(y[9:9], 7.0)
    ops.add(y[9:9], x[9:9])
    expected = np.r_[np.zeros(3), np.arange(3, 20), np.zeros(5), np.full(6, -0.5)]
    assert np.array_equal(transfer.host(y), expected.astype(np.float32))


Alone = Callable[..., tuple[StreamStrict, Center]]


@pytest.fixture
def alone(gpu) -> Iterator[Alone]:
    """The turns of worker 0 of some, in one process; `gpu` is closed before the center that it has pinned."""
    with ExitStack() as stack:

        def make(workers: int, exchange: str, hold: Callable[[], None] = lambda: None) -> tuple[StreamStrict, Center]:
            center = stack.enter_context(Center.create(plan_for({"name": "easgd"}, workers, 9, N).layout))
            stack.callback(lambda: gpu.__exit__(None, None, None))
            link = Link(center, gpu, CudaOps(gpu), exchange)
            for lane in link.lanes:  # also where a test has kept training from waiting for them
                stack.callback(lane.synchronize)
            return StreamStrict(link, 0, Calendar(1, 9), "memops", hold, 0, lambda block: None), center

        yield make


def test_training_waits_for_the_exchange_only_where_it_touches_what_that_has_in_hand(gpu, alone, monkeypatch):
    turns, _ = alone(1, "overlap")
    ops, (x, d, v, y) = turns._ops, (gpu.allocate(N) for _ in range(4))
    waited: list[str] = []
    monkeypatch.setattr(gpu.training, "wait_event", lambda event: waited.append("waited"))
    for b in turns.visit():
        ops.pull(x[b], turns._link.shared["c"][b], d[b], 0.5)
    ops.lookahead(y, x, v, 0.9)  # reads x, which the pull reads too
    assert waited == []
    ops.descend(y, v, 0.1)  # has nothing to do with the exchange
    assert waited == []
    ops.descend(x, v, 0.1, d)  # writes x
    assert waited == ["waited"]
    ops.descend(x, v, 0.1, d)  # the exchange is over
    assert waited == ["waited"]
    turns.drain()


def test_what_is_empty_is_not_in_hand(gpu, alone, monkeypatch):
    """A model without buffers exchanges none, and its forward pass must not wait for that."""
    turns, _ = alone(1, "overlap")
    ops, x, d, y = turns._ops, gpu.allocate(N), gpu.allocate(N), gpu.allocate(N)
    waited: list[str] = []
    monkeypatch.setattr(gpu.training, "wait_event", lambda event: waited.append("waited"))
    for b in turns.visit():
        ops.pull(x[b], turns._link.shared["c"][b], d[b], 0.5)
        ops.copy(x[N:N], turns._link.shared["c"][slice(b.start, b.start)])
    ops.copy(y, x)
    assert waited == []
    turns.drain()


def test_a_worker_inside_a_step_is_answered_for_while_its_processor_may_wait_for_the_device():
    with Center.create(plan_for({"name": "easgd"}, 2, 9, N).layout) as center:
        one = Respondent(center, 1)
        one.start()
        center.pause[0] = 1
        time.sleep(0.05)
        assert center.held[1] == 0  # at a boundary it answers itself
        one.enter(6)
        assert eventually(lambda: center.held[1] == 1, 5) and center.earliest_stop[1] == 7
        one.leave()
        center.pause[0] = 3
        time.sleep(0.05)
        assert center.held[1] == 1
        one.end()


def test_inline_training_waits_for_every_exchange(gpu, alone, monkeypatch):
    turns, _ = alone(1, "inline")
    waited: list[str] = []
    monkeypatch.setattr(gpu.training, "wait_event", lambda event: waited.append("waited"))
    for _ in turns.visit():
        pass
    assert waited == ["waited"]
    turns.drain()


def test_the_host_enqueues_no_more_than_two_exchanges_ahead_and_says_whom_it_waits_for(alone):
    def hold() -> None:
        raise Aborted  # the launcher's word, as soon as the host waits

    turns, center = alone(2, "overlap", hold)  # the other worker never comes
    made = 0
    with pytest.raises(Aborted):
        while True:
            for _ in turns.visit():
                pass
            made += 1
    assert made == 2
    assert center.waiting_for[0] == 2  # worker 1, counted from 1
    while not turns._link.first.is_done():
        for b in range(center.layout.blocks):
            center.turn[b] = 2**62  # whatever waits goes on


@pytest.mark.parametrize("name", kernels.names())
def test_kernels_are_compiled_to_machine_code_without_a_gpu_and_nothing_is_cut_off(name):
    image = compiled(name, (9, 0))
    assert image[:4] == b"\x7fELF"
    (start,), (size, count) = struct.unpack_from("<Q", image, 32), struct.unpack_from("<HH", image, 54)
    assert start + size * count <= len(image)  # of the program's headers, which come last
