"""Simulated workers compute what the listings, and real workers on a real center, compute: to the bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from easgd_local import data, models
from easgd_local.backend.cpu import CpuOps
from easgd_local.gradient import Gradient
from easgd_local.rules import RULES
from easgd_local.rules.base import Rule
from easgd_local.rules.diloco import DiLoCo
from easgd_local.rules.downpour import Downpour
from easgd_local.rules.eamsgd import EAMSGD
from easgd_local.rules.easgd import EASGD
from easgd_local.simulate.machine import Machine
from easgd_local.simulate.orders import Grid
from easgd_local.simulate.simulation import Outcome, Scenario, simulate
from tests import listings, paper, threads
from tests.test_rules import CASES, in_order, named
from tests.threads import LAYERS, N, noisy_quadratic, starting_point

UNEQUAL = Machine(step_s=1.0, spread=0.5, straggler=2.0, speeds=(1.0, 0.7, 1.3), parameters=1e9)
AT_ONCE = Machine(step_s=1.0, link_gb_per_s=np.inf, memory_gb_per_s=np.inf, latency_s=0)


@dataclass
class MadeUp:
    """The gradients of tests/threads.py as a problem."""

    n: int = N
    layers: list[slice] = field(default_factory=lambda: list(LAYERS))
    start: np.ndarray = field(default_factory=starting_point)
    measure: str = "nothing"

    def gradient(self, rank: int, t: int, x: np.ndarray) -> np.ndarray:
        return noisy_quadratic(rank, t, x)

    def error(self, x: np.ndarray) -> float:
        return 1.0  # so that nothing is ever stopped as diverged


def simulated(
    rule: Rule, workers: int, steps: int = 20, turns: str | None = None, machine: Machine = UNEQUAL
) -> Outcome:
    """With blocks of 16 floats, as in tests/threads.py."""
    scenario = Scenario(rule=rule, workers=workers, turns=turns, steps=steps, block_bytes=64)
    return simulate(scenario, MadeUp(), machine)


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.tobytes() == other.tobytes()


@pytest.mark.parametrize("machine", [UNEQUAL, AT_ONCE], ids=["unequal", "at once"])
@pytest.mark.parametrize("rule", CASES, ids=named)
def test_four_simulated_workers_equal_the_listing_to_the_bit(rule: Rule, machine: Machine) -> None:
    workers = 1 if rule.sequential else 4
    done = simulated(rule, workers, turns=in_order(rule), machine=machine)
    blocks, own = threads.blocks_of(workers), threads.owned(workers)
    expected = listings.compute(rule, starting_point(), workers, 20, noisy_quadratic, blocks, own)
    for name, value in expected.items():
        assert same(done.x[int(name[1:])] if name not in done.shared else done.shared[name], value), name


@pytest.mark.parametrize("name", RULES)
def test_simulated_workers_equal_real_ones_to_the_bit(name: str) -> None:
    rule = RULES[name]()
    workers, turns = 1 if rule.sequential else 4, in_order(rule)
    done, real = simulated(rule, workers, turns=turns), threads.train(rule, workers, 20, turns=turns)
    assert all(same(done.shared[one], real.shared[one]) for one in real.shared)
    assert all(map(same, done.x, real.x))
    for local, kept in zip(done.local, real.local, strict=True):
        assert all(same(local[one], kept[one]) for one in kept)


def test_local_optimizers_of_torch_equal_those_of_real_workers() -> None:
    for inner in ("adam", "rmsprop", "adagrad"):
        rule = DiLoCo(tau=3, inner=inner)
        assert same(simulated(rule, 3).shared["c"], threads.train(rule, 3, 20).c)


class OfProcesses:
    """The digits and the perceptron as the worker processes of a run see them."""

    measure = "nothing"

    def __init__(self, workers: int, batch_size: int, weight_decay: float) -> None:
        digits = data.load("digits")
        torch.manual_seed(0)
        networks = [models.build("mlp", shape=digits.input_shape, classes=10) for _ in range(workers)]
        samplers = [data.shard(0, rank, workers, batch_size, len(digits.train)) for rank in range(workers)]
        self._ops = CpuOps()
        self._gradients = [
            Gradient(network, digits, sampler, rank=rank, weight_decay=weight_decay)
            for rank, (network, sampler) in enumerate(zip(networks, samplers, strict=True))
        ]
        self.n, self.layers = self._gradients[0].n, self._gradients[0].layers
        self.start = self._gradients[0].flat.values()

    def gradient(self, rank: int, t: int, x: np.ndarray) -> np.ndarray:
        return self._gradients[rank](self._ops, t, x)

    def error(self, x: np.ndarray) -> float:
        return 1.0


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_simulated_workers_equal_the_processes_of_a_run_to_the_bit(run: Callable[..., dict[str, Any]]) -> None:
    rule = EAMSGD(lr=0.02, tau=2)
    summary = run(rule=rule, workers=4, steps=9, batch_size=8, weight_decay=0.01, seed=0)
    with one_thread():
        scenario = Scenario(rule=rule, workers=4, steps=9, points=1)
        done = simulate(scenario, OfProcesses(4, 8, 0.01), UNEQUAL)
    assert hashlib.sha256(done.shared["c"].tobytes()).hexdigest() == summary["center_sha256"]


@pytest.mark.parametrize("machine", [
    UNEQUAL,
    Machine(parameters=1e10, link_gb_per_s=0.5, latency_s=0.01),
    Machine(overlap=True, memory_gb_per_s=0.1),
], ids=["unequal", "slow links", "hidden behind gradients"])  # fmt: skip
def test_the_machine_decides_when_but_not_what_in_strict_turns(machine: Machine) -> None:
    rule = EAMSGD(lr=0.03, tau=3, alpha=0.2)
    quick = simulated(rule, 5, machine=Machine(parameters=1, link_gb_per_s=np.inf, memory_gb_per_s=np.inf, latency_s=0))
    slow = simulated(rule, 5, machine=machine)
    assert same(quick.shared["c"], slow.shared["c"])
    assert slow.seconds > quick.seconds


def test_many_workers_visit_in_the_order_of_the_latin_square() -> None:
    # 66 workers, more than are cut as the real center: their few blocks still see them in the listing's cyclic order.
    rule, workers = EASGD(lr=0.1, tau=1, alpha=0.1), 66
    done, grid = simulated(rule, workers, 3), Grid.of(66, N, UNEQUAL.parameters)
    c, x = starting_point(), [starting_point() for _ in range(workers)]
    order = [
        (i, block.coordinates)
        for block in grid.blocks
        for i in sorted(range(workers), key=lambda i: grid.position(block, i))
    ]
    paper.easgd(x, c, noisy_quadratic, eta=rule.lr, alpha=0.1, tau=1, steps=range(3), order=order)
    assert same(done.shared["c"], c) and all(map(same, done.x, x))
    assert [block.coordinates for block in grid.blocks] == [slice(k, min(k + 16, N)) for k in range(0, N, 16)]


@pytest.mark.parametrize("turns", ["strict", "free", "none"])
def test_no_push_is_lost_in_any_order(turns: str) -> None:
    # Gradients of 1 and η a power of two: sums are exact, and all but the last gradient of each worker is pushed.
    class Ones(MadeUp):
        def gradient(self, rank: int, t: int, x: np.ndarray) -> np.ndarray:
            return np.ones(N, np.float32)

    rule, problem = Downpour(lr=2**-6, tau=1), Ones(start=np.zeros(N, np.float32))
    done = simulate(Scenario(rule=rule, workers=5, turns=turns, steps=30, block_bytes=64), problem, UNEQUAL)
    assert done.gradients == 5 * 30
    assert np.array_equal(done.shared["c"], np.full(N, -(2**-6) * 5 * 29, np.float32))
