"""Turns: every interleaving by an explorer, the formulas by their properties, the classes that wait for real."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from easgd_local import turns
from easgd_local.center import Center, Layout
from easgd_local.free_turns import Arbiter, FreeTurns
from easgd_local.referee import NEVER, Referee
from easgd_local.rules.sgd import SGD
from easgd_local.schedules import Calendar
from easgd_local.turns import Aborted, NoTurns, StrictTurns, TogetherTurns, owner, pass_turns, position, walk
from tests.conftest import eventually
from tests.explorer import Explored, Free, Hogwild, Op, Strict, Together, everything, explore

EVERY_ROUND = Calendar(tau=1, steps=100, evaluate_every=1)
NO_SNAPSHOTS = Calendar(tau=1, steps=100)


# Every interleaving of the strict order


def flawless(model: Strict | Free) -> Explored:
    """What is found when nothing breaks."""
    found = explore(model)
    assert not found.errors, found.story()
    assert found.endings
    return found


@pytest.mark.parametrize("workers, blocks", [(1, 1), (1, 3), (2, 2), (2, 4), (3, 3), (3, 6)])
def test_without_a_crash_every_interleaving_ends_with_the_same_history(workers, blocks):
    found = flawless(Strict(workers, blocks, rounds=2))
    assert len({ending.c for ending in found.endings}) == 1


def test_each_block_sees_the_workers_in_its_own_cyclic_order():
    (ending,) = flawless(Strict(3, 3, rounds=2)).endings
    # A visit of worker i in round k is written 3k + i; both halves of a block are listed.
    assert [list(half) for half in ending.c[::2]] == [[0, 2, 1, 3, 5, 4], [1, 0, 2, 4, 3, 5], [2, 1, 0, 5, 4, 3]]
    assert ending.c[::2] == ending.c[1::2]


@pytest.mark.parametrize(
    "workers, blocks, rounds, mortal",
    [(1, 2, 2, None), (2, 2, 2, None), (2, 4, 2, None), (3, 3, 2, None), (3, 6, 1, {1})],
)
def test_a_crash_at_any_point_leaves_only_what_the_visits_made(workers, blocks, rounds, mortal):
    found = flawless(Strict(workers, blocks, rounds, crashes=1, mortal=mortal))
    # Who died and where fixes the center, however the others and the launcher were scheduled.
    centers = {(ending.dead, ending.at, ending.c) for ending in found.endings}
    assert len(centers) == len({(dead, at) for dead, at, _ in centers})


@pytest.mark.parametrize("workers, rounds", [(2, 2), (3, 1)])
def test_two_crashes_at_any_two_points_leave_blocks_half_written_only_by_the_dead(workers, rounds):
    torn = 0
    for ending in flawless(Strict(workers, workers, rounds, crashes=2)).endings:
        for first, second in zip(ending.c[::2], ending.c[1::2], strict=True):
            torn += first != second
            assert all(ending.dead[mark % workers] for mark in set(first) ^ set(second))
    assert torn


@pytest.mark.parametrize("workers, blocks, rounds, who", [(2, 4, 3, 0), (3, 3, 2, 1)])
def test_a_worker_that_finishes_early_holds_nobody_up(workers, blocks, rounds, who):
    (ending,) = flawless(Strict(workers, blocks, rounds, stops={who: 1})).endings
    assert all(half.count(who) == 1 and len(half) == workers * rounds - (rounds - 1) for half in ending.c)


def test_a_worker_that_finishes_early_and_one_that_dies_hold_nobody_up():
    flawless(Strict(3, 3, rounds=2, stops={1: 1}, crashes=1))


@pytest.mark.parametrize("workers, blocks, rounds, mortal", [(2, 2, 3, None), (3, 3, 2, {1})])
def test_snapshots_are_the_center_after_exactly_their_round(workers, blocks, rounds, mortal):
    flawless(Strict(workers, blocks, rounds, calendar=EVERY_ROUND))
    flawless(Strict(workers, blocks, rounds, calendar=EVERY_ROUND, crashes=1, mortal=mortal))


def test_snapshots_may_lie_rounds_apart():
    flawless(Strict(2, 2, rounds=4, calendar=Calendar(tau=1, steps=100, checkpoint_every=2), crashes=1))


@pytest.mark.parametrize(
    "workers, blocks, rounds, crashes, mortal",
    [(1, 2, 3, 2, None), (2, 2, 3, 1, None), (2, 4, 2, 1, {0}), (3, 3, 2, 1, {1})],
)
def test_a_readmitted_worker_joins_between_the_turns_that_were_passed(workers, blocks, rounds, crashes, mortal):
    found = flawless(Strict(workers, blocks, rounds, crashes=crashes, mortal=mortal, readmissions=1))
    # Some of the new workers come in time to make an exchange, and the dead have made some before.
    assert any(at > start > 0 for ending in found.endings for at, start in zip(ending.at, ending.start, strict=True))


def test_a_readmitted_worker_may_die_too():
    flawless(Strict(2, 2, rounds=2, crashes=2, readmissions=1))


# What the explorer must find


def errors(**values: Any) -> set[str]:
    """What goes wrong in a small run by the protocol with these parts replaced."""
    return explore(Strict(**({"workers": 2, "blocks": 2, "rounds": 1} | values)), everything).errors


def test_a_crash_without_a_launcher_is_a_deadlock():
    assert errors(crashes=1, supervisor="sleeps") == {"deadlock"}


def test_a_supervisor_that_times_out_breaks_everything():
    assert errors(supervisor="times out") >= {
        "two workers in one block", "an update is lost", "a turn word goes backward", "deadlock",
    }  # fmt: skip


def test_storing_the_turn_before_the_block_loses_updates():
    found = errors(visit=("enter", "read", "leave", "write 0", "write 1"), rounds=2)
    assert found >= {"two workers in one block", "an update is lost"}


def test_serving_the_groups_in_the_wrong_direction_is_a_deadlock():
    def ascending(block: int, rank: int, workers: int, blocks: int) -> int:
        return (rank - block * workers // blocks) % workers

    assert errors(workers=3, blocks=3, position=ascending) == {"deadlock"}


def test_two_workers_with_the_same_place_collide():
    assert "two workers in one block" in errors(position=lambda b, i, p, G: 0)


def test_readmitting_one_round_early_meets_turns_that_are_passed():
    assert "a worker finds its turn passed" in errors(rounds=2, crashes=1, readmissions=1, readmits_early=1)


@pytest.mark.parametrize("blocks, stops", [(2, {}), (4, {1: 2})])
def test_writing_a_snapshot_before_the_earlier_one_is_taken_spoils_it(blocks, stops):
    hasty = ("enter", "read", "write 0", "write 1", "copy 0", "copy 1", "leave")
    found = errors(blocks=blocks, rounds=2, calendar=EVERY_ROUND, visit=hasty, stops=stops)
    assert found == {"a snapshot is not the center after its round"}


def test_copying_the_snapshot_after_the_turn_is_handed_on_spoils_it():
    late = ("enter", "read", "write 0", "write 1", "leave", "await taken", "copy 0", "copy 1")
    assert "a snapshot is not the center after its round" in errors(rounds=2, calendar=EVERY_ROUND, visit=late)


def test_passing_the_last_turn_without_copying_leaves_a_hole_in_the_snapshot():
    found = errors(rounds=2, calendar=EVERY_ROUND, stops={1: 1}, launcher_copies=False)
    assert found == {"a snapshot is not the center after its round"}


# Every interleaving of the rendezvous


@pytest.mark.parametrize("workers, blocks", [(1, 1), (1, 3), (2, 2), (2, 4), (3, 3), (3, 6)])
def test_together_every_interleaving_adds_in_the_order_of_ranks_and_closes_once(workers, blocks):
    (ending,) = flawless(Together(workers, blocks, rounds=2)).endings
    # A visit of worker i in round k is written (p + 1)k + i, and the close of the round (p + 1)k + p.
    assert {tuple(half) for half in ending.c} == {tuple(range(2 * (workers + 1)))}


@pytest.mark.parametrize(
    "workers, blocks, mortal", [(2, 2, {0}), (2, 4, {0}), (3, 3, {0, 1}), (1, 2, None), (2, 4, None), (3, 3, {2})]
)
def test_together_a_crash_at_any_point_leaves_only_what_the_visits_made(workers, blocks, mortal):
    found = flawless(Together(workers, blocks, rounds=2, crashes=1, mortal=mortal))
    assert any(any(ending.dead) for ending in found.endings)


def test_together_two_crashes_at_any_two_points_hold_nobody_up():
    flawless(Together(2, 2, rounds=2, crashes=2))
    flawless(Together(3, 2, rounds=1, crashes=2))


@pytest.mark.parametrize("workers, blocks, rounds, who", [(2, 4, 3, 0), (2, 2, 3, 1), (3, 3, 2, 1), (3, 3, 2, 2)])
def test_together_a_worker_that_finishes_early_holds_nobody_up(workers, blocks, rounds, who):
    (ending,) = flawless(Together(workers, blocks, rounds, stops={who: 1})).endings
    assert all(half.count(who) == 1 and len(half) == (workers + 1) * rounds - (rounds - 1) for half in ending.c)


def test_together_a_worker_that_finishes_early_and_one_that_dies_hold_nobody_up():
    flawless(Together(3, 3, rounds=2, stops={1: 1}, crashes=1, mortal={2}))


@pytest.mark.parametrize("workers, blocks, rounds, mortal", [(2, 2, 3, None), (2, 4, 2, {1}), (3, 3, 2, {1})])
def test_together_snapshots_are_the_center_after_the_close(workers, blocks, rounds, mortal):
    flawless(Together(workers, blocks, rounds, calendar=EVERY_ROUND))
    flawless(Together(workers, blocks, rounds, calendar=EVERY_ROUND, crashes=1, mortal=mortal))


@pytest.mark.parametrize("workers, blocks, rounds", [(2, 2, 3), (3, 1, 3)])
def test_together_a_readmitted_worker_joins_between_the_rounds(workers, blocks, rounds):
    found = flawless(Together(workers, blocks, rounds, crashes=1, readmissions=1))
    assert any(at > start > 0 for ending in found.endings for at, start in zip(ending.at, ending.start, strict=True))


def together_errors(**values: Any) -> set[str]:
    """What goes wrong in a small rendezvous with these parts replaced."""
    return explore(Together(**({"workers": 2, "blocks": 2, "rounds": 2} | values)), everything).errors


def test_together_writing_without_having_met_the_others_spoils_what_they_read():
    assert together_errors(meets=False) == {
        "a block is read after somebody's visit", "a block is written before everybody has read it",
    }  # fmt: skip


def test_together_reading_without_waiting_meets_a_round_that_is_not_over():
    assert together_errors(reads="at once") == {"a block is read before the end of the round before"}


@pytest.mark.parametrize("values", [{"crashes": 1, "mortal": {0}}, {"stops": {0: 1}}])
def test_together_a_launcher_that_does_not_announce_the_gone_is_a_deadlock(values):
    assert together_errors(retires_readers=False, **values) == {"deadlock"}


def test_together_a_crash_without_a_launcher_is_a_deadlock():
    assert together_errors(crashes=1, supervisor="sleeps") == {"deadlock"}


def test_together_passing_turns_in_the_strict_order_is_a_deadlock():
    assert together_errors(stops={0: 1}, owner=owner) == {"deadlock"}


def test_together_a_last_visitor_that_dies_without_withdrawing_the_round_lets_it_be_closed_twice():
    visit = tuple(kind for kind in Together.visit if kind != "withdraw")
    assert together_errors(crashes=1, visit=visit) == {"a round is closed twice"}


def test_together_a_launcher_that_closes_every_round_closes_those_to_which_nobody_came():
    found = together_errors(stops={0: 1, 1: 1}, launcher_closes="every")
    assert found == {"a round to which nobody came is closed"}


def test_together_a_launcher_that_closes_no_round_leaves_those_open_that_the_last_worker_missed():
    assert together_errors(stops={1: 1}, launcher_closes="no") == {"a round to which somebody came is not closed"}


@pytest.mark.parametrize(
    "visit, breach",
    [
        ("close, write, leave", "the center is not what the visits make of it"),
        ("write, leave, close", "a block is moved in another turn"),
        ("write, copy, close, leave", "a snapshot is not the center after its round"),
        ("write, close, leave, copy", "a snapshot is not the center after its round"),
    ],
)
def test_together_another_order_within_a_visit_is_wrong(visit, breach):
    halves = {"write": ("write 0", "write 1", "visited"), "close": ("close 0", "close 1")}
    halves |= {"copy": ("await taken", "copy 0", "copy 1"), "leave": ("leave",)}
    ops = [op for part in visit.split(", ") for op in halves[part]]
    assert breach in together_errors(visit=("enter", *ops), calendar=EVERY_ROUND if "copy" in visit else None)


# Every interleaving of the free order


@pytest.mark.parametrize("workers, blocks, exchanges", [(2, 2, 2), (3, 2, 1), (2, 3, 1)])
def test_free_every_exchange_visits_every_block_exactly_once(workers, blocks, exchanges):
    visits = {(i, number) for i in range(workers) for number in range(1, exchanges + 1)}
    for ending in flawless(Free(workers, blocks, exchanges)).endings:
        assert all(half == visits for half in ending.c)


@pytest.mark.parametrize("workers, exchanges, crashes", [(2, 2, 2), (3, 1, 1)])
def test_free_a_holder_that_dies_keeps_no_block(workers, exchanges, crashes):
    flawless(Free(workers, 2, exchanges, crashes=crashes))


def test_free_a_readmitted_worker_is_granted_nothing_that_its_predecessor_asked_for():
    found = flawless(Free(2, 2, exchanges=2, crashes=2, readmissions=1))
    assert any(made > start > 0 for end in found.endings for made, start in zip(end.finished, end.start, strict=True))


def test_free_a_crash_without_a_launcher_that_notices_is_a_deadlock():
    assert explore(Free(2, 2, 1, crashes=1, supervisor="sleeps"), everything).errors == {"deadlock"}


def test_free_a_supervisor_that_times_out_breaks_mutual_exclusion():
    found = explore(Free(2, 2, 1, supervisor="times out"), everything).errors
    assert found >= {"two workers in one block", "an update is lost"}


# The explorer's programs are what StrictTurns and TogetherTurns do


class Recorder(list):
    """Words that note every store."""

    def __init__(self, values: list[int], log: list[tuple[str, int, int]], kind: str = "leave") -> None:
        super().__init__(values)
        self.log, self.kind = log, kind

    def __setitem__(self, index: Any, value: int) -> None:
        self.log.append((self.kind, index, value))
        super().__setitem__(index, value)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_worker_does_what_the_explorer_believes(rank):
    program, log = Strict(3, 6, rounds=2, calendar=EVERY_ROUND).programs[rank], []
    layout = Layout(3, 6 * 16, block_bytes=64)
    number = {layout.block(b).start: b for b in range(layout.blocks)}
    center: Any = SimpleNamespace(
        layout=layout, turn=Recorder([0] * 6, log), abort=[0], waiting_for=[0] * 3, taken=[0],
        take_snapshot=lambda b: log.append(("copy", b, center.taken[0])), visited=[0] * 6, updates=[0] * 6,
    )  # fmt: skip
    ahead = (op for op in program if op.kind in ("enter", "await taken"))

    def others() -> None:
        """Does what the worker's next operation waits for."""
        for op in ahead:
            if op.kind == "enter" and center.turn[op.block] < op.turn:
                return list.__setitem__(center.turn, op.block, op.turn)
            if op.kind == "await taken" and center.taken[0] < op.turn // 3:
                center.taken[0] += 1
                return None

    one = StrictTurns(center, rank, EVERY_ROUND, others, first_round=0)
    for _ in range(2):
        for block in one.visit():
            log.append(("write", number[block.start], center.turn[number[block.start]]))
    assert log == list(notes(program))
    assert one.round == 2


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_together_a_worker_does_what_the_explorer_believes(rank):
    program, log = Together(3, 6, rounds=2, calendar=EVERY_ROUND).programs[rank], []
    layout = Layout(3, 6 * 16, block_bytes=64)
    number = {layout.block(b).start: b for b in range(layout.blocks)}
    center: Any = SimpleNamespace(
        layout=layout, turn=Recorder([0] * 6, log), abort=[0], waiting_for=[0] * 3, taken=[0], updates=[0] * 6,
        visited=Recorder([0] * 6, log, "visited"), read=Recorder([0] * 3, log, "announce"),
        take_snapshot=lambda b: log.append(("copy", b, center.taken[0])),
    )  # fmt: skip
    ahead = (op for op in program if op.kind in ("read center", "meet", "enter", "await taken"))

    def note(kind: str, block: slice) -> None:
        log.append((kind, number[block.start], center.turn[number[block.start]]))

    def others() -> None:
        """Does what the worker's next operation waits for."""
        for op in ahead:
            if op.kind in ("read center", "enter") and center.turn[op.block] < op.turn:
                return list.__setitem__(center.turn, op.block, op.turn)
            if op.kind == "meet" and center.read[op.block] <= op.turn // 3:
                return list.__setitem__(center.read, op.block, op.turn // 3 + 1)
            if op.kind == "await taken" and center.taken[0] < op.turn // 3:
                center.taken[0] += 1
                return None

    one = TogetherTurns(center, rank, EVERY_ROUND, others, 0, lambda block: note("close", block))
    for round in range(3):
        for block in one.read():
            note("read center", block)
        for block in one.visit() if round < 2 else ():
            assert min(center.read) == round + 1  # all have met
            note("write", block)
    assert log == list(notes(program))
    assert one.round == 2


def notes(program: list[Op]) -> Iterator[tuple[str, int, int]]:
    for op in program:
        if op.kind in ("write 0", "close 0"):
            yield op.kind[:-2], op.block, op.turn
        elif op.kind == "copy 0":
            yield "copy", op.block, op.turn // 3  # as many earlier snapshots have been taken
        elif op.kind == "leave":
            yield "leave", op.block, op.turn + 1
        elif op.kind in ("announce", "visited"):
            yield op.kind, op.block, op.turn // 3 + 1
        elif op.kind == "withdraw":
            yield "visited", op.block, 0
        elif op.kind == "read center":
            yield op.kind, op.block, op.turn


# The formulas

WORKERS, GROUP = st.integers(1, 9), st.integers(1, 5)
steadily = settings(derandomize=True, database=None, deadline=None, max_examples=60)


@steadily
@given(WORKERS, GROUP)
def test_owner_is_the_inverse_of_position(p, q):
    for b in range(p * q):
        assert [owner(b, s, p, p * q) for s in range(p)] == [owner(b, s + 7 * p, p, p * q) for s in range(p)]
        assert all(owner(b, position(b, i, p, p * q), p, p * q) == i for i in range(p))
        assert all(position(b, owner(b, s, p, p * q), p, p * q) == s for s in range(p))


@steadily
@given(WORKERS, GROUP)
def test_every_worker_walks_over_every_block_once_its_own_group_first(p, q):
    for i in range(p):
        path = walk(i, p, p * q)
        assert sorted(path) == list(range(p * q))
        assert path[:q] == list(range(i * q, (i + 1) * q))


@steadily
@given(WORKERS, GROUP)
def test_the_walks_are_a_latin_square(p, q):
    for together in zip(*(walk(i, p, p * q) for i in range(p)), strict=True):  # at the same step of the walk
        assert len(set(together)) == p


@steadily
@given(WORKERS, GROUP)
def test_whoever_is_waited_for_is_at_an_earlier_step(p, q):
    # A visit is (round, step of the walk, worker, block). It waits for the visit before it on the same block, which
    # must come earlier in the order of (round, step): then waiting never goes in a circle.
    when = {(i, b): step // q for i in range(p) for step, b in enumerate(walk(i, p, p * q))}
    for (i, b), step in when.items():
        for round in (1, 2):
            s = round * p + position(b, i, p, p * q)
            before = owner(b, s - 1, p, p * q)
            assert ((s - 1) // p, when[before, b]) < (round, step)
            assert before == (i + 1) % p  # its only neighbour
            assert step == position(b, i, p, p * q)


@steadily
@given(st.data())
def test_turns_are_passed_up_to_the_first_that_somebody_will_make(data):
    p, q = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    G = p * q
    turn = data.draw(st.lists(st.integers(3 * p, 4 * p), min_size=G, max_size=G))
    present = data.draw(st.integers(0, p - 1))
    gone = data.draw(st.dictionaries(st.integers(0, p - 1), st.sampled_from([3, 4, 5, NEVER])))
    gone.pop(present, None)
    passed = pass_turns(turn, gone, p, G)
    assert len(set(passed)) == len(passed)
    for b in range(G):
        mine = [s for block, s in passed if block == b]
        assert mine == list(range(turn[b], turn[b] + len(mine)))
        assert all(s // p < gone[owner(b, s, p, G)] for s in mine)
        s = turn[b] + len(mine)
        assert s // p >= gone.get(owner(b, s, p, G), 0)


def test_with_everybody_gone_the_round_that_has_begun_is_completed_and_no_other_begins():
    turn, gone = [4, 7, 3], {0: NEVER, 1: NEVER, 2: NEVER}
    for _ in range(5):
        for b, s in pass_turns(turn, gone, workers=3, blocks=3):
            assert turn[b] == s
            turn[b] = s + 1
    assert turn == [9, 9, 9]


def test_a_lone_worker_that_was_readmitted_is_waited_for_in_the_next_round():
    turn = [2, 3]
    assert pass_turns(turn, {0: 4}, workers=1, blocks=2) == [(0, 2), (1, 3)]
    assert pass_turns([4, 4], {0: 4}, workers=1, blocks=2) == []


# The launcher's part, for real


@pytest.fixture
def center_of() -> Iterator[Callable[..., Center]]:
    """`center_of(workers, n)`: a center with blocks of 16 floats, closed after the test."""
    with ExitStack() as stack:
        yield lambda workers, n: stack.enter_context(Center.create(Layout(workers, n, block_bytes=64)))


def test_the_launcher_takes_the_snapshot_for_the_dead_when_the_earlier_one_is_taken(center_of):
    center = center_of(2, 31)
    referee = Referee(center, EVERY_ROUND, SGD(), "strict")
    c, snapshot = center.vectors["c"], center.snapshot["c"]
    referee.retire(1)
    c[:] = 1
    center.turn[0] = 1  # worker 0 has made its visit to block 0, and worker 1 would be the last visitor there
    referee._pass()
    assert list(center.turn) == [2, 1]
    assert snapshot[:16].tolist() == [1] * 16 and not snapshot[16:].any()
    center.turn[1], c[:] = 2, 2
    center.turn[0] = 3
    referee._pass()
    assert list(center.turn) == [3, 3]  # block 0 waits for the reader, not so the first visit to block 1
    assert snapshot[:16].tolist() == [1] * 16
    center.taken[0] = 1
    referee._pass()
    assert list(center.turn) == [4, 3]
    assert snapshot[:16].tolist() == [2] * 16


class Closing(SGD):
    """A rule whose close of a round adds 1000 to the block."""

    def close(self, w: Any, b: slice) -> None:
        w.c[b] += 1000


def test_the_launcher_closes_for_the_dead_only_the_rounds_to_which_somebody_came(center_of):
    center = center_of(2, 31)
    referee = Referee(center, EVERY_ROUND, Closing(), "together")
    referee.retire(1)
    c, snapshot = center.vectors["c"], center.snapshot["c"]
    for b in range(2):
        center.turn[b] = 1  # worker 0's turn is over: it was made in block 0, and passed in block 1
    center.visited[0] = 1
    referee._pass()
    assert list(center.turn) == [2, 2]
    assert set(c[:16]) == {1000} and set(c[16:]) == {0}
    assert np.array_equal(snapshot, c)
    center.turn[0] = center.turn[1] = 3
    center.visited[1], center.taken[0] = 2, 1
    referee._pass()
    assert set(c[:16]) == {1000} and set(c[16:]) == {1000}
    assert np.array_equal(snapshot, c)


def test_the_launcher_passes_the_turns_of_a_rendezvous_in_the_order_of_ranks(center_of):
    center = center_of(3, 47)
    referee = Referee(center, NO_SNAPSHOTS, Closing(), "together")
    referee.retire(0), referee.retire(1)
    referee._pass()
    assert list(center.turn) == [2, 2, 2]  # worker 2 is the last in every block
    assert not center.vectors["c"].any() and list(center.updates) == [0, 0, 0]


def test_no_rendezvous_waits_for_the_gone_until_one_is_readmitted(center_of):
    center = center_of(2, 31)
    referee = Referee(center, NO_SNAPSHOTS, Closing(), "together")
    referee.retire(1)
    assert list(center.read) == [0, NEVER]
    center.turn[0], center.turn[1] = 2 * 4, 2 * 5 + 1  # round 5 has begun
    assert referee.readmit(1) == 6
    assert list(center.read) == [0, 6]  # of the rounds 0 to 5; it is waited for in round 6
    referee._pass()
    assert list(center.turn) == [2 * 4, 2 * 6]


def test_a_block_goes_to_the_next_worker_in_line(center_of):
    center = center_of(3, 31)
    arbiter, holders = Arbiter(center), []
    for i in range(3):
        center.request[i] = 1
    while arbiter.grant(()):
        (holder,) = (i for i in range(3) if center.grant[3 * i] > center.done[3 * i])
        assert not arbiter.grant(())  # every block is held now
        holders.append(holder)
        for b in range(3):
            center.done[3 * holder + b] = 1
    assert holders == [1, 2, 0]


def test_a_new_worker_leaves_alone_what_its_predecessor_asked_for(center_of):
    center = center_of(2, 31)
    arbiter = Arbiter(center)
    center.request[1] = 1
    center.grant[2] = 1  # worker 1 has block 0 and dies before it is granted block 1
    assert not arbiter.grant({1})
    new = FreeTurns(center, 1, lambda: None)
    assert not arbiter.grant(())
    center.request[0] = 1
    assert arbiter.grant(()) and list(center.grant) == [1, 1, 1, 0]
    assert new.round == 1


# Waiting, for real


class Clock:
    """Time that passes only by waiting: each yield takes a second, and then `meanwhile` happens."""

    def __init__(self, meanwhile: Callable[[int], None]) -> None:
        self.now, self.yields, self.sleeps, self.meanwhile = 0.0, 0, 0, meanwhile

    def perf_counter(self) -> float:
        return self.now

    def sched_yield(self) -> None:
        self.yields += 1
        self._tick()

    def sleep(self, seconds: float) -> None:
        assert seconds == turns.SLEEP_S
        self.sleeps += 1
        self._tick()

    def _tick(self) -> None:
        self.now += 1
        assert self.yields + self.sleeps < 1000, "waits for ever"
        self.meanwhile(self.yields + self.sleeps)


@pytest.fixture
def clock_with(monkeypatch) -> Callable[[Callable[[int], None]], Clock]:
    def install(meanwhile: Callable[[int], None]) -> Clock:
        clock = Clock(meanwhile)
        monkeypatch.setattr(turns, "time", clock)
        monkeypatch.setattr(turns, "os", clock)
        return clock

    return install


def test_the_time_of_waiting_is_charged_to_the_late_worker(center_of, clock_with):
    center = center_of(3, 31)
    seen = []

    def meanwhile(polls: int) -> None:
        seen.append(center.waiting_for[0])
        if polls == 5:
            center.turn[1] = 1  # worker 1 comes at last
        if polls == 7:
            center.turn[2] = 2  # and worker 2, and worker 1 again

    clock_with(meanwhile)
    one = StrictTurns(center, 0, NO_SNAPSHOTS, lambda: None, first_round=0)
    assert len(list(one.visit())) == 3
    assert one.waited_for_s == [0, 5, 2] and one.wait_s == 7
    assert seen == [2] * 5 + [3] * 2
    assert center.waiting_for[0] == 0


@pytest.mark.parametrize("chain, culprit", [((0, 0, 0), 1), ((0, 3, 0), 2), ((0, 3, 2), 2), ((0, 1, 0), 1)])
def test_the_time_is_charged_to_the_end_of_the_chain(center_of, clock_with, chain, culprit):
    center = center_of(3, 31)
    for i, word in enumerate(chain):  # 1 + whom worker i waits for
        center.waiting_for[i] = word
    clock_with(lambda polls: center.turn.__setitem__(1, 1))
    center.turn[2] = 2
    one = StrictTurns(center, 0, NO_SNAPSHOTS, lambda: None, first_round=0)
    list(one.visit())
    assert one.waited_for_s == [float(i == culprit) for i in range(3)]


def test_waiting_sleeps_when_yielding_has_not_helped(center_of, clock_with):
    center = center_of(2, 31)
    clock = clock_with(lambda polls: center.turn.__setitem__(1, polls // (turns.SPINS + 3)))
    list(StrictTurns(center, 0, NO_SNAPSHOTS, lambda: None, first_round=0).visit())
    assert (clock.yields, clock.sleeps) == (turns.SPINS, 3)


def test_holding_is_nobodys_fault(center_of, clock_with):
    center = center_of(2, 31)
    clock = clock_with(lambda polls: None)

    def hold() -> None:
        clock.now += 1000
        center.turn[1] = 1

    one = StrictTurns(center, 0, NO_SNAPSHOTS, hold, first_round=0)
    list(one.visit())
    assert one.waited_for_s == [0, 1] and clock.now == 1001


def together(center: Center, rank: int = 0, round: int = 0, calendar: Calendar = NO_SNAPSHOTS) -> TogetherTurns:
    return TogetherTurns(center, rank, calendar, lambda: None, round)


def test_together_the_time_of_waiting_is_charged_to_the_late_worker(center_of, clock_with):
    center = center_of(3, 47)
    seen = []

    def meanwhile(polls: int) -> None:
        seen.append(center.waiting_for[1])
        match polls:
            case 2:
                center.turn[1] = 3  # worker 2 ends the first round of block 1
            case 6:
                center.read[0] = 2  # worker 0 has read, too
            case 11:
                center.read[2] = 2  # and worker 2
            case 17:
                center.turn[0] = center.turn[1] = center.turn[2] = 4  # worker 0 has visited all blocks

    clock_with(meanwhile)
    one = together(center, rank=1, round=1)
    center.turn[0], center.turn[1], center.turn[2] = 3, 2, 3
    assert len(list(one.read())) == 3 and center.read[1] == 0
    assert len(list(one.visit())) == 3 and center.read[1] == 2
    assert one.waited_for_s == [4 + 6, 0, 2 + 5] and one.wait_s == 17
    assert seen == [3] * 2 + [1] * 4 + [3] * 5 + [1] * 6
    assert center.waiting_for[1] == 0 and list(center.turn) == [5, 5, 5]


def test_waiting_for_the_reader_of_a_snapshot_is_charged_to_the_worker_itself(center_of, clock_with):
    center = center_of(1, 15)
    clock_with(lambda polls: center.taken.__setitem__(0, polls // 4))
    one = StrictTurns(center, 0, EVERY_ROUND, lambda: None, first_round=0)
    list(one.visit())
    list(one.visit())
    assert one.waited_for_s == [4]


def test_free_the_time_of_waiting_is_charged_to_the_holder(center_of, clock_with):
    center = center_of(3, 47)
    arbiter = Arbiter(center)
    holder = FreeTurns(center, 2, lambda: None).visit()

    def meanwhile(polls: int) -> None:
        if polls == 4:
            list(holder)  # gives everything back
        arbiter.grant(())

    clock_with(meanwhile)
    assert next(holder) == center.layout.block(2)  # granted at the first poll, with all others
    one = FreeTurns(center, 0, lambda: None)
    assert len(list(one.visit())) == 3
    assert one.waited_for_s == [0, 0, 3]


def test_free_blocks_are_taken_as_they_are_granted(center_of):
    center = center_of(2, 31)
    one = FreeTurns(center, 0, lambda: None)
    center.grant[1] = 1
    visit = one.visit()
    assert next(visit) == center.layout.block(1)  # though its own group comes first in its walk
    center.grant[0] = 1
    assert next(visit) == center.layout.block(0)
    assert list(center.done) == [0, 1, 0, 0]
    assert next(visit, None) is None
    assert list(center.done) == [1, 1, 0, 0] and one.round == 1


def strict_first(center: Center) -> Any:
    return StrictTurns(center, 0, NO_SNAPSHOTS, lambda: None, first_round=0)


def strict_snapshot(center: Center) -> Any:
    center.turn[0] = center.turn[1] = 2 * 2
    return StrictTurns(center, 0, Calendar(1, 9, evaluate_every=1), lambda: None, first_round=2)


def free(center: Center) -> Any:
    return FreeTurns(center, 0, lambda: None)


def together_reading(center: Center) -> Any:
    return SimpleNamespace(visit=together(center, round=1).read)


def together_meeting(center: Center) -> Any:
    return together(center)


def together_visiting(center: Center) -> Any:
    center.read[0] = 1
    return together(center, rank=1)


def together_snapshot(center: Center) -> Any:
    center.read[0] = 2 + 1
    center.turn[0] = center.turn[1] = 2 * 2 + 1
    return together(center, rank=1, round=2, calendar=EVERY_ROUND)


@pytest.mark.parametrize(
    "make",
    [strict_first, strict_snapshot, free, together_reading, together_meeting, together_visiting, together_snapshot],
)
@pytest.mark.parametrize("word", [0, 2**62])
def test_an_abort_releases_who_waits(center_of, clock_with, make, word):
    center = center_of(2, 31)

    def meanwhile(polls: int) -> None:
        if make is strict_snapshot and polls == 1:
            center.turn[1] = 2 * 2 + 1
        elif polls == 3:
            center.abort[0] = 1
            for b in range(2):
                center.turn[b] = word or center.turn[b]

    clock = clock_with(meanwhile)
    with pytest.raises(Aborted):
        list(make(center).visit())
    assert 3 <= clock.yields <= 4


def none(center: Center) -> Any:
    return NoTurns(center, 0, lambda: None)


def together_first_reading(center: Center) -> Any:
    return SimpleNamespace(visit=together(center).read)


@pytest.mark.parametrize("make", [strict_first, free, together_first_reading, together_meeting, none])
def test_after_an_abort_no_block_is_entered(center_of, make):
    center = center_of(1, 15)
    center.turn[0], center.grant[0], center.abort[0] = 2**62, 1, 1  # an abort's turn looks like one that has come
    with pytest.raises(Aborted):
        next(make(center).visit())


def test_a_turn_that_was_passed_is_an_error(center_of):
    center = center_of(1, 15)
    center.turn[0] = 1
    with pytest.raises(AssertionError, match="block 0: turn 1 instead of 0"):
        next(strict_first(center).visit())


def test_together_a_turn_that_was_passed_is_an_error(center_of):
    center = center_of(1, 15)
    center.turn[0] = 1
    with pytest.raises(AssertionError, match="block 0: turn 1 instead of 0"):
        next(together(center).visit())


def test_together_a_block_is_closed_once_though_its_last_visitor_dies_in_the_close(center_of):
    center = center_of(2, 31)
    for b in range(2):
        center.read[0] = center.turn[b] = center.visited[b] = 1  # worker 0 has been there
    referee = Referee(center, NO_SNAPSHOTS, Closing(), "together")
    c = center.vectors["c"]

    def close_and_die(block: slice) -> None:
        c[block] += 1000
        raise ProcessLookupError

    with pytest.raises(ProcessLookupError):
        list(TogetherTurns(center, 1, NO_SNAPSHOTS, lambda: None, 0, close_and_die).visit())
    referee.retire(1)
    referee._pass()
    assert center.turn[0] == 2 and set(c[:16]) == {1000}


def test_together_only_the_last_visitor_closes_a_block_and_before_the_snapshot(center_of):
    center = center_of(2, 31)
    c = center.vectors["c"]

    def close(block: slice) -> None:
        c[block] += 1000

    for b in range(2):
        center.read[b] = 1
    for _ in TogetherTurns(center, 0, EVERY_ROUND, lambda: None, 0, close).visit():
        pass
    assert not c.any() and list(center.visited) == list(center.updates) == [1, 1]
    for block in TogetherTurns(center, 1, EVERY_ROUND, lambda: None, 0, close).visit():
        c[block] += 1
    assert set(c) == {1001} and np.array_equal(center.snapshot["c"], c)
    assert list(center.updates_snapshot) == [2, 2]


def test_none_visits_every_block_once_without_waiting_and_touches_no_word(center_of):
    center = center_of(3, 47)
    before = {name: list(getattr(center, name)) for name in center.layout.word_counts}

    def hold() -> None:
        raise AssertionError("waits")

    one = NoTurns(center, 1, hold)
    for _ in range(2):
        assert list(one.visit()) == [center.layout.block(b) for b in (1, 2, 0)]
    assert before == {name: list(getattr(center, name)) for name in center.layout.word_counts}
    assert one.wait_s == 0 and one.waited_for_s == [0] * 3


def test_none_leaves_at_the_next_block_after_an_abort(center_of):
    center = center_of(3, 47)
    visit = NoTurns(center, 1, lambda: None).visit()
    next(visit)
    center.abort[0] = 1
    with pytest.raises(Aborted):
        next(visit)


# Counting updates


@pytest.mark.parametrize("order, kind", [("strict", StrictTurns), ("together", TogetherTurns)])
def test_updates_are_numbered_by_the_visits_that_were_made_not_by_the_turns(center_of, order, kind):
    center = center_of(2, 31)
    referee = Referee(center, NO_SNAPSHOTS, SGD(), order)
    referee.retire(1)
    one = kind(center, 0, NO_SNAPSHOTS, referee._pass, 0)
    assert [[one.update for _ in one.visit()] for _ in range(3)] == [[1, 1], [2, 2], [3, 3]]
    referee._pass()
    assert min(center.turn) == 6 and list(center.updates) == [3, 3]


def test_a_visit_that_is_not_completed_has_no_number(center_of):
    center = center_of(1, 15)
    next(strict_first(center).visit())  # and dies
    assert center.updates[0] == 0


@pytest.mark.parametrize("order", ["strict", "free"])
def test_updates_go_on_from_those_of_an_earlier_run(center_of, order):
    center = center_of(2, 31)
    center.updates[0], center.updates[1] = 41, 31
    center.turn[1] = center.grant[0] = center.grant[1] = 1
    one = strict_first(center) if order == "strict" else free(center)
    assert [one.update for _ in one.visit()] == [42, 32]
    assert list(center.updates) == [42, 32] and one.stale == 0


@pytest.mark.parametrize("order", ["strict", "together", "free"])
def test_a_worker_is_as_stale_as_others_have_updated_any_block_since_its_own_visit(center_of, order):
    center = center_of(3, 47)
    one = {"strict": strict_first, "together": together, "free": free}[order](center)
    found = []
    for number, others in enumerate([(0, 0, 0), (2, 5, 1), (3, 0, 4), (6, 6, 6)], start=1):
        for b in range(3):
            center.updates[b] += others[b]
            center.read[b] = center.grant[b] = number
            place = position(b, 0, 3, 3) if order == "strict" else 0
            center.turn[b] = 3 * (number - 1) + place
        list(one.visit())
        found.append(one.stale)
    assert found == [0, 5, 5, 6]


# Everybody at once


class Crew:
    """Workers as threads, each with its own mapping of the center."""

    def __init__(self, center: Center, work: Callable[[Center, int], None]) -> None:
        self.center, self.errors = center, list[BaseException]()
        self.threads = [
            threading.Thread(target=self._enter, args=(center, rank, work), daemon=True)
            for rank in range(center.layout.workers)
        ]
        for thread in self.threads:
            thread.start()

    def _enter(self, center: Center, rank: int, work: Callable[[Center, int], None]) -> None:
        try:
            with Center.attach(center.layout, os.dup(center.fd)) as mine:
                work(mine, rank)
        except BaseException as error:
            self.errors.append(error)

    def join(self) -> None:
        late = not eventually(lambda: not any(thread.is_alive() for thread in self.threads), 20)
        self.center.abort[0] = 1  # releases who still waits
        for thread in self.threads:
            thread.join()
        assert not late and not self.errors, self.errors


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads change places a thousand times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


ROUNDS, N = 7, 301  # for three workers and 21 blocks


def visit_all(center: Center, turns: Any, rank: int, rounds: int = ROUNDS) -> None:
    """c <- (3c + i + 1) mod 1009 in every visit: exact in float32, and different in every other order."""
    c = center.vectors["c"]
    for _ in range(rounds):
        for b in turns.visit():
            read = c[b].copy()
            c[b] = (3 * read + rank + 1) % 1009


def sequentially(layout: Layout, rounds: int) -> np.ndarray:
    c = np.zeros(layout.n, np.float32)
    for b in range(layout.blocks):
        for s in range(rounds * layout.workers):
            i = owner(b, s, layout.workers, layout.blocks)
            c[layout.block(b)] = (3 * c[layout.block(b)] + i + 1) % 1009
    return c


def test_three_threads_make_the_center_that_one_after_another_would(center_of, hurried):
    center = center_of(3, N)
    calendar = Calendar(tau=1, steps=ROUNDS + 1, evaluate_every=3)  # snapshots after the rounds 2 and 5

    def work(mine: Center, rank: int) -> None:
        visit_all(mine, StrictTurns(mine, rank, calendar, lambda: None, 0), rank)

    crew = Crew(center, work)
    for round in (2, 5):
        assert eventually(lambda: min(center.turn) >= 3 * (round + 1), 20)  # noqa: B023
        assert np.array_equal(center.snapshot["c"], sequentially(center.layout, round + 1))
        center.taken[0] = round + 1
    crew.join()
    assert list(center.turn) == [3 * ROUNDS] * center.layout.blocks
    assert np.array_equal(center.vectors["c"], sequentially(center.layout, ROUNDS))


def test_a_thread_that_dies_in_mid_block_changes_nothing_for_the_others(center_of, hurried):
    center = center_of(3, N)
    last = center.layout.block(4)

    def work(mine: Center, rank: int) -> None:
        c = mine.vectors["c"]
        one = StrictTurns(mine, rank, NO_SNAPSHOTS, lambda: None, 0)
        for round in range(ROUNDS):
            for b in one.visit():
                if (rank, round, b) == (1, 2, last):
                    c[b.start : b.start + 8] += 100  # half of it
                    return referee.retire(1)  # the thread does nothing any more
                c[b] += 100**rank

    with Referee(center, NO_SNAPSHOTS, SGD(), "strict") as referee:
        Crew(center, work).join()
        referee.retire(0), referee.retire(2)
        assert eventually(lambda: min(center.turn) >= 3 * ROUNDS, 20)
    visits = [2 + (walk(1, 3, 21).index(b) < walk(1, 3, 21).index(4)) for b in range(21)]
    expected = np.zeros(N)
    for b in range(21):
        expected[center.layout.block(b)] = ROUNDS * 10001 + 100 * visits[b]
    expected[last.start : last.start + 8] += 100
    assert np.array_equal(center.vectors["c"], expected)


def test_free_three_threads_lose_no_visit(center_of, hurried):
    center = center_of(3, N)

    def work(mine: Center, rank: int) -> None:
        c, one = mine.vectors["c"], FreeTurns(mine, rank, lambda: None)
        for _ in range(ROUNDS):
            for b in one.visit():
                read = c[b].copy()
                c[b] = read + 100**rank

    with Referee(center, NO_SNAPSHOTS, SGD(), "free"):
        Crew(center, work).join()
    assert set(center.vectors["c"]) == {ROUNDS * 10101}
    assert set(center.done) == {ROUNDS}


def test_free_a_thread_that_dies_holding_a_block_holds_nobody_up(center_of, hurried):
    center = center_of(3, N)

    def work(mine: Center, rank: int) -> None:
        c, one = mine.vectors["c"], FreeTurns(mine, rank, lambda: None)
        for _ in range(ROUNDS):
            for b in one.visit():
                if rank == 1 and one.round == 2:
                    return referee.retire(1)
                c[b] += 100**rank

    with Referee(center, NO_SNAPSHOTS, SGD(), "free") as referee:
        Crew(center, work).join()
    assert set(center.vectors["c"]) == {ROUNDS * 10001 + 2 * 100}


def test_together_a_thread_that_dies_in_mid_block_leaves_the_closing_to_the_launcher(center_of, hurried):
    center = center_of(3, N)
    last = center.layout.block(4)

    def work(mine: Center, rank: int) -> None:
        c = mine.vectors["c"]

        def close(b: slice) -> None:
            c[b] += 1000

        one = TogetherTurns(mine, rank, NO_SNAPSHOTS, lambda: None, 0, close)
        for round in range(ROUNDS):
            for b in one.read():
                assert set((c[b] // 1000).astype(int) % 100) <= {round}
            for b in one.visit():
                if (rank, round, b) == (2, 2, last):
                    c[b.start : b.start + 8] += 10  # half of it
                    return referee.retire(2)  # the thread does nothing any more
                c[b] += (1, 100_000, 10)[rank]

    with Referee(center, NO_SNAPSHOTS, Closing(), "together") as referee:
        Crew(center, work).join()
        referee.retire(0), referee.retire(1)
        assert eventually(lambda: min(center.turn) >= 3 * ROUNDS, 20)
    expected = np.full(N, ROUNDS * (1000 + 100_001) + 10 * 2)
    expected[: last.start + 8] += 10
    assert np.array_equal(center.vectors["c"], expected)
    assert list(center.updates) == [2 * ROUNDS + 3] * 4 + [2 * ROUNDS + 2] * 17


# Processes

STARTED = """
import sys
import numpy as np
from easgd_local.center import Center, Layout
from easgd_local.schedules import Calendar
from easgd_local.turns import NoTurns, TogetherTurns

rank, workers, n, block_bytes, rounds, fd = map(int, sys.argv[1:])
center = Center.attach(Layout(workers, n, block_bytes=block_bytes), fd)
c = center.vectors["c"]
center.held[rank] = 1
while not center.leave[0]:  # all set off together
    assert not center.abort[0]
"""

RENDEZVOUS = (
    STARTED
    + """
def close(b):
    c[b] *= np.float32(0.7)

one = TogetherTurns(center, rank, Calendar(tau=1, steps=rounds + 1, evaluate_every=1), lambda: None, 0, close)
x, d = np.random.default_rng(rank).normal(size=n).astype(np.float32), np.zeros(n, np.float32)
for round in range(rounds):
    for b in one.read():
        d[b] = np.float32(0.3) * (x[b] - c[b])
    for b in one.visit():
        assert one.update == workers * round + rank + 1
        c[b] += d[b]
    x -= d
assert one.stale == workers - 1 or rounds == 1
"""
)

HOGWILD = (
    STARTED
    + """
one = NoTurns(center, rank, lambda: None)
for _ in range(rounds):
    for b in one.visit():
        c[b] += 100**rank
"""
)


@contextmanager
def processes(center: Center, program: str, rounds: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """One for each worker, all set off at the same time; none is left."""
    layout, crew = center.layout, list[subprocess.Popen[bytes]]()
    try:
        for rank in range(layout.workers):
            values = map(str, (rank, layout.workers, layout.n, layout.block_bytes, rounds, center.fd))
            crew.append(subprocess.Popen([sys.executable, "-c", program, *values], pass_fds=[center.fd]))
        assert eventually(lambda: all(center.held), 20)
        center.leave[0] = 1
        yield crew
        assert [process.wait(20) for process in crew] == [0] * layout.workers
    finally:
        for process in crew:
            process.kill()
            process.wait()


def test_together_three_processes_add_in_the_order_of_ranks_to_the_last_bit(center_of):
    center, rounds = center_of(3, N), 4
    c = np.zeros(N, np.float32)
    crew = [np.random.default_rng(rank).normal(size=N).astype(np.float32) for rank in range(3)]
    with processes(center, RENDEZVOUS, rounds):
        for round in range(rounds):
            differences = [np.float32(0.3) * (x - c) for x in crew]
            for x, d in zip(crew, differences, strict=True):
                c += d
                x -= d
            c *= np.float32(0.7)
            assert eventually(lambda: min(center.turn) >= 3 * (round + 1), 20)  # noqa: B023
            assert np.array_equal(center.snapshot["c"].view(np.uint32), c.view(np.uint32))
            center.taken[0] = round + 1
    assert list(center.updates) == [3 * rounds] * center.layout.blocks
    assert np.array_equal(center.vectors["c"].view(np.uint32), c.view(np.uint32))


def test_none_two_processes_leave_in_every_coordinate_what_some_interleaving_does():
    allowed = {ending.c for ending in explore(Hogwild((1, 100), times=5)).endings}
    assert {505, 500, 5, 101} < allowed and not {0, 600, 506} & allowed  # all, some or all but one are lost
    with Center.create(Layout(2, 1_000_003, block_bytes=1 << 18)) as center:
        with processes(center, HOGWILD, 5):
            pass
        found = set(center.vectors["c"].astype(int))
        assert found <= allowed
