"""The virtual clock, the links, the machine and the turns of `simulate`, against times worked out by hand."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from greenlet import getcurrent

from easgd_local.rules import RULES
from easgd_local.rules.base import Rule
from easgd_local.rules.downpour import Downpour
from easgd_local.rules.eamsgd import EAMSGD
from easgd_local.rules.easgd import EASGD
from easgd_local.rules.easgd_sync import EASGDSync
from easgd_local.rules.passm import PASSM, PASSMPlus
from easgd_local.rules.sgd import SGD
from easgd_local.simulate.clock import Clock
from easgd_local.simulate.link import Link
from easgd_local.simulate.machine import Limits, Machine
from easgd_local.simulate.orders import Block, Free, Grid
from easgd_local.simulate.problems import make_problem
from easgd_local.simulate.simulation import Outcome, Scenario, simulate
from easgd_local.simulate.traffic import traffic

AT_ONCE = {"link_gb_per_s": math.inf, "memory_gb_per_s": math.inf, "latency_s": 0.0}  # exchanges take no time


def run(rule: Rule, workers: int, steps: int, machine: Machine, **values: object) -> Outcome:
    """On a quadratic of 32 coordinates: two blocks of 16."""
    scenario = Scenario(rule=rule, workers=workers, steps=steps, **values)  # type: ignore[arg-type]
    return simulate(scenario, make_problem("quadratic", sigma=0.1), machine)


# The clock


def test_what_is_due_at_the_same_time_happens_in_the_order_it_was_asked_for() -> None:
    clock, seen = Clock(), []

    def task(name: str, sleeps: list[float]) -> None:
        for seconds in sleeps:
            clock.sleep(seconds)
            seen.append((clock.now_s, name))

    clock.run([lambda: task("a", [2, 1, 1]), lambda: task("b", [1, 2]), lambda: task("c", [3])])
    # c asked for 3 at 0, b at 1, a at 2.
    assert seen == [(1, "b"), (2, "a"), (3, "c"), (3, "b"), (3, "a"), (4, "a")]


def test_an_error_in_a_task_is_raised_and_the_other_tasks_are_ended() -> None:
    clock, ended = Clock(), []

    def waits() -> None:
        try:
            clock.park()
        finally:
            ended.append("waits")

    def fails() -> None:
        clock.sleep(1)
        raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        clock.run([waits, fails])
    assert ended == ["waits"]


def test_a_task_that_nobody_wakes_is_an_error() -> None:
    clock, sleeper = Clock(), []

    def waits() -> None:
        sleeper.append(getcurrent())
        clock.park()

    with pytest.raises(AssertionError, match="1 of 2 tasks wait for what nobody will do"):
        clock.run([waits, lambda: clock.sleep(1)])
    assert sleeper[0].dead


# The links


def ends_of(link_rate: float, memory_rate: float, transfers: list[tuple[float, float]]) -> list[float]:
    """When transfers (beginning, bytes) end."""
    clock = Clock()
    link, ends = Link(clock, link_rate, memory_rate), [0.0] * len(transfers)

    def task(number: int, begins_s: float, size: float) -> None:
        clock.sleep(begins_s)
        link.transfer(size)
        ends[number] = clock.now_s

    clock.run([lambda number=number, one=one: task(number, *one) for number, one in enumerate(transfers)])
    assert link.moved_bytes == sum(size for _, size in transfers)
    return ends


def test_a_transfer_alone_takes_its_bytes_over_the_smaller_bandwidth() -> None:
    assert ends_of(25, 100, [(3, 100)]) == [3 + 4]
    assert ends_of(100, 25, [(3, 100)]) == [3 + 4]
    assert ends_of(math.inf, math.inf, [(3, 100)]) == [3]
    assert ends_of(7.3, math.inf, [(0, 1e9)]) == [1e9 / 7.3]


def test_transfers_share_the_memory_but_not_the_links() -> None:
    assert ends_of(10, 40, [(0, 100)] * 4) == [10] * 4  # four links fill the memory exactly
    assert ends_of(10, 20, [(0, 100)] * 4) == [20] * 4
    # The second comes at 5 s, when 50 of 100 bytes have moved; both get 5 a second; it has its 20 at 9 s, and the
    # first its last 30 at 10 a second.
    assert ends_of(10, 10, [(0, 100), (5, 20)]) == [12, 9]


# The machine


def test_step_times_are_a_pure_function_with_the_mean_that_was_asked_for() -> None:
    machine = Machine(step_s=0.5, spread=0.4, straggler=3.0, speeds=(1.0, 2.0))
    means = [machine.mean_step_s(rank, 4) for rank in range(4)]
    assert means == [0.5, 0.25, 0.5, 0.75]
    times, again = machine.step_times(3, 4, seed=5), machine.step_times(3, 4, seed=5)
    drawn = np.array([times(t) for t in range(20_000)])
    assert [again(t) for t in (19_999, 0, 77)] == [drawn[t] for t in (19_999, 0, 77)]
    assert drawn[0] != machine.step_times(2, 4, seed=5)(0) * 1.5
    deviation = 0.75 * math.sqrt(math.exp(0.4**2) - 1)  # of a log-normal variable of this mean
    assert abs(drawn.mean() - 0.75) < 4 * deviation / math.sqrt(len(drawn))
    assert np.log(drawn).std() == pytest.approx(0.4, rel=0.03)


def test_the_memory_is_full_where_the_workers_bytes_are_its_bandwidth() -> None:
    machine = Machine(step_s=0.1, parameters=25e6, link_gb_per_s=10, memory_gb_per_s=40, latency_s=0.001)
    limits = Limits.of(machine, floats=2, tau=5, visits=4, hides=False)
    assert limits.exchange_bytes == 200e6
    assert limits.exchange_s == pytest.approx(0.02 + 0.004)
    assert limits.cycle_s == pytest.approx(0.524)
    assert limits.memory_full_at == pytest.approx(40e9 * 0.524 / 200e6)
    assert Limits.of(machine, floats=2, tau=5, visits=4, hides=True).cycle_s == pytest.approx(0.5)


def test_where_all_keep_pace_the_cycle_is_the_slowest_workers() -> None:
    machine = Machine(step_s=1.0, straggler=3.0, **AT_ONCE)

    def cycle_s(turns: str) -> float:
        return Limits.of(machine, floats=2, tau=5, visits=4, hides=False, workers=4, turns=turns).cycle_s

    assert cycle_s("strict") == cycle_s("together") == 15
    assert cycle_s("free") == cycle_s("none") == pytest.approx(4 / (3 / 5 + 1 / 15))


def test_the_share_of_the_links_is_what_was_moved() -> None:
    # 256 bytes every 3 s of a straggler, at 512 bytes a second: a sixth; half a second of exchange comes on top.
    machine = Machine(step_s=1.0, straggler=3.0, parameters=32, link_gb_per_s=512e-9, latency_s=0.0)
    assert run(EASGD(tau=1), 2, 200, machine).link_share == pytest.approx(0.5 / 3.5, rel=0.01)


def test_a_sequential_rule_hides_nothing_as_it_exchanges_after_the_gradient() -> None:
    machine = Machine(**BY_HAND, link_gb_per_s=128e-9, memory_gb_per_s=math.inf, latency_s=0.0, overlap=True)
    done = run(SGD(), 1, 10, machine)
    assert done.limits.cycle_s == pytest.approx(done.seconds / 10)


# Traffic


@pytest.mark.parametrize("name", sorted(RULES.keys() - {"passm", "passm+"}))
def test_traffic_is_what_the_readme_says(name: str) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| (`.+?`) \|.*\| ([^|]+) \|$", readme, re.M)
    (told,) = (float(cell) for names, cell in rows if f"`{name}`" in names and cell.strip().isdigit())
    assert traffic(RULES[name](), 1 if RULES[name].sequential else 4).floats == told


def test_a_divided_model_is_read_by_all_and_written_in_parts() -> None:
    assert traffic(PASSM(), 4).floats == 1 + 1 / 4
    assert traffic(PASSMPlus(), 4).floats == 2  # as in full steps


def test_only_exchanges_that_leave_x_alone_can_hide() -> None:
    assert not traffic(EASGD(), 2).moves_x and not traffic(EAMSGD(), 2).moves_x
    assert traffic(Downpour(), 2).moves_x


# Turns: two workers, steps of 1 s, two blocks. An exchange of 32 parameters moves 256 bytes, 128 in each block.

BY_HAND = {"step_s": 1.0, "parameters": 32.0}


def test_in_the_latin_square_two_workers_never_wait() -> None:
    machine = Machine(**BY_HAND, link_gb_per_s=128e-9, memory_gb_per_s=math.inf, latency_s=0.5)
    done = run(EASGD(tau=1), 2, 10, machine)
    assert done.seconds == 10 * (2 * (0.5 + 1) + 1)
    assert done.shares == {"compute": 0.25, "exchange": 0.75, "wait": 0.0}
    assert done.gradients_per_s == 0.5


def test_two_workers_share_a_slow_memory() -> None:
    machine = Machine(**BY_HAND, link_gb_per_s=128e-9, memory_gb_per_s=128e-9, latency_s=0.5)
    done = run(EASGD(tau=2), 2, 10, machine)
    assert done.seconds == pytest.approx(5 * (2 * (0.5 + 2) + 2))
    assert done.memory_share == pytest.approx(2 * 256 / 128 / 7)


def test_at_a_rendezvous_the_second_waits_for_the_first_in_each_block() -> None:
    # Reading: 64 bytes a block, 1 s each. Then rank 0 holds the blocks in 2..4 and 4..6, rank 1 in 4..6 and 6..8.
    machine = Machine(**BY_HAND, link_gb_per_s=64e-9, memory_gb_per_s=math.inf, latency_s=0.0)
    done = run(EASGDSync(tau=1), 2, 1, machine)
    assert done.seconds == 9
    assert done.shares == {"compute": 2 / 16, "exchange": 12 / 16, "wait": 2 / 16}  # of 7 + 9 seconds


def test_a_straggler_slows_strict_turns_but_not_free_ones() -> None:
    machine = Machine(step_s=1.0, straggler=3.0, **AT_ONCE)
    strict, free = (run(EASGD(tau=1), 4, 60, machine, turns=turns) for turns in ("strict", "free"))
    assert strict.gradients_per_s == pytest.approx(4 / 3, rel=0.02)
    assert free.gradients_per_s == pytest.approx(3 + 1 / 3, rel=0.02)
    assert strict.shares["wait"] == pytest.approx(3 * (2 / 3) / 4, abs=0.01)
    assert free.shares["wait"] == 0
    assert max(strict.staleness) == 3
    assert max(free.staleness) == 9  # the straggler finds three updates of each of the three others


def test_a_fleet_of_unequal_workers_is_as_fast_as_its_sum_in_free_turns() -> None:
    machine = Machine(step_s=1.0, speeds=(1.0, 1.0, 0.5, 2.0), **AT_ONCE)
    assert run(EASGD(tau=5), 8, 100, machine, turns="free").gradients_per_s == pytest.approx(9, rel=0.03)
    assert run(EASGD(tau=5), 8, 100, machine, turns="strict").gradients_per_s == pytest.approx(8 * 0.5, rel=0.03)


def test_saturated_links_and_memory_give_exactly_their_bandwidth() -> None:
    slow = {"step_s": 1e-12, "parameters": 1e6, "latency_s": 0.0}
    link = run(EASGD(tau=1), 1, 20, Machine(**slow, link_gb_per_s=0.2, memory_gb_per_s=1))
    assert link.seconds == pytest.approx(20 * 8e6 / 0.2e9, rel=1e-9)
    memory = run(EASGD(tau=1), 8, 20, Machine(**slow, link_gb_per_s=0.2, memory_gb_per_s=1))
    assert memory.seconds == pytest.approx(8 * 20 * 8e6 / 1e9, rel=1e-6)
    assert memory.memory_share == pytest.approx(1, rel=1e-6)
    assert memory.limits.memory_full_at == pytest.approx(5, rel=1e-6)


def test_an_exchange_hides_behind_the_gradient_only_where_the_rule_allows_it() -> None:
    # 2 blocks of 128 bytes at 512 bytes a second: an exchange of half a second.
    machine = Machine(**BY_HAND, link_gb_per_s=512e-9, memory_gb_per_s=math.inf, latency_s=0.0, overlap=True)
    assert run(EASGD(tau=1), 2, 10, machine).seconds == 10
    assert run(Downpour(tau=1, lr=0.01), 2, 10, machine).seconds == 15
    longer = Machine(**BY_HAND, link_gb_per_s=128e-9, memory_gb_per_s=math.inf, latency_s=0.0, overlap=True)
    assert run(EASGD(tau=1), 2, 10, longer).seconds == 20


def test_staleness_in_strict_turns_is_one_update_of_each_other_worker() -> None:
    done = run(EASGD(tau=2), 5, 20, Machine(spread=0.5))
    visits = 5 * 10 * 2  # workers, exchanges, blocks
    assert sum(done.staleness.values()) == visits
    assert done.staleness == {0: 2, 1: 2, 2: 2, 3: 2, 4: visits - 8}  # in the first round those before it


def test_a_block_is_held_for_one_of_the_centers_blocks_and_all_bytes_move() -> None:
    # 1e9 parameters make 954 blocks of 4 MiB or fewer; the toy's two lie at the first and in the middle.
    grid = Grid.of(2, 32, 1e9)
    assert grid.places == 954 and [block.place for block in grid.blocks] == [0, 477]
    for rank in range(2):
        walk = list(grid.walk(rank * 477))
        assert sum(places for places, _ in walk) + len(grid.blocks) == grid.places
        assert [block.place for _, block in walk if block] == [[0, 477], [477, 0]][rank]


def test_each_of_the_centers_blocks_costs_the_latency_once() -> None:
    machine = Machine(step_s=1.0, parameters=1e9, link_gb_per_s=math.inf, memory_gb_per_s=math.inf, latency_s=0.001)
    assert run(EASGD(tau=1), 2, 3, machine).seconds == pytest.approx(3 * (954 * 0.001 + 1))


def test_an_idle_block_goes_to_the_next_in_line_of_those_that_ask() -> None:
    clock, visits = Clock(), []

    @dataclass
    class Asker:
        rank: int
        round: int = 0

        def wait(self) -> None:
            clock.park()

        def move(self, places: int, floats: float) -> None:
            clock.sleep(places)

        def take(self, block: Block, place: int) -> slice:
            visits.append(self.rank)
            return block.coordinates

        def leave(self, block: Block) -> None: ...

    order = Free(Grid(4, 4, (Block(0, 0, slice(0, 16)),)), clock, lambda w, b: None)

    def ask(rank: int, at_s: float) -> None:
        clock.sleep(at_s)
        assert list(order.visit(Asker(rank), 2)) == [slice(0, 16)]

    # The second comes first, and holds the block while the others ask in the order 0, 1, 3.
    clock.run([lambda: ask(2, 0), lambda: ask(0, 0.1), lambda: ask(1, 0.2), lambda: ask(3, 0.3)])
    assert visits == [2, 3, 0, 1]


def test_the_time_does_not_depend_on_how_many_coordinates_the_toy_has() -> None:
    """With 64 workers 32 coordinates are two blocks, 256 sixteen, for the same places of the center."""

    def pace(dimension: int) -> float:
        scenario = Scenario(rule=EASGD(tau=1), workers=64, turns="free", steps=20, points=1)
        problem = make_problem("quadratic", dimension=dimension)
        return simulate(scenario, problem, Machine(spread=0.2)).gradients_per_s

    assert pace(32) == pytest.approx(pace(256), rel=0.1)  # 0.3 of it while blocks were held beside other places


@pytest.mark.parametrize("turns", ["strict", "free", "none"])
def test_the_shares_of_a_run_that_stops_at_its_target_add_up_to_one(turns: str) -> None:
    done = run(EASGD(tau=2), 5, 300, Machine(spread=0.5, memory_gb_per_s=5.0), turns=turns, stops=True, target=0.5)
    assert done.status == "reached"
    assert sum(done.shares.values()) == pytest.approx(1, rel=1e-12)


def test_equal_simulations_give_equal_bits_and_another_seed_others() -> None:
    machine = Machine(spread=0.7, speeds=(1.0, 0.6), memory_gb_per_s=1.0)

    def free(seed: int) -> Outcome:
        problem = make_problem("logistic", seed=seed, batch_size=4)
        return simulate(Scenario(rule=EAMSGD(tau=2), workers=7, turns="free", steps=50, seed=seed), problem, machine)

    one, same, other = free(3), free(3), free(4)
    assert one.shared["c"].tobytes() == same.shared["c"].tobytes() != other.shared["c"].tobytes()
    assert one.curve["seconds"].tobytes() == same.curve["seconds"].tobytes()
    assert (one.seconds, one.staleness, one.shares) == (same.seconds, same.staleness, same.shares)
    assert one.seconds != other.seconds
