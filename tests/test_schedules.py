"""The calendar against a worker that simply steps through the whole run and notes what happens when."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain, product

import pytest

from easgd_local.schedules import Calendar

TAUS, STEPS, PERIODS = (1, 2, 3, 7), (1, 2, 6, 13, 14), (0, 1, 2, 3, 5, 14, 40)
RUNS = list(product(TAUS, STEPS, (0, 1)))


@dataclass
class Course:
    """A whole run of one worker, by Algorithm 1: at clock t it exchanges if τ divides t, steps, and shows t + 1.

    With `ahead` = 1 it exchanges as soon as its clock shows t; the exchange at 0, when all are alike, counts as made.
    """

    tau: int
    steps: int
    ahead: int
    exchanges: list[int] = field(default_factory=list)  # made when the clock shows t
    rounds: list[list[int]] = field(default_factory=list)  # the clocks from each exchange to the next

    def __post_init__(self) -> None:
        made = self.ahead
        self.exchanges.append(made)
        self.rounds = [[] for _ in range(made)]
        for t in range(self.steps):
            if (t + self.ahead) % self.tau == 0:
                made += 1
                self.rounds.append([])
            self.exchanges.append(made)
            self.rounds[-1].append(t + 1)


def due(period: int, steps: int) -> list[int]:
    """The clocks before the end that are multiples of the period."""
    return [T for T in range(1, steps) if period and T % period == 0]


@pytest.mark.parametrize("tau, steps, ahead", RUNS)
def test_rounds_before_counts_the_exchanges_made(tau, steps, ahead):
    calendar = Calendar(tau, steps, ahead=ahead)
    assert [calendar.rounds_before(t) for t in range(steps + 1)] == Course(tau, steps, ahead).exchanges


@pytest.mark.parametrize("tau, steps, ahead", RUNS)
def test_each_date_belongs_to_the_last_round_before_it(tau, steps, ahead):
    course, none = Course(tau, steps, ahead), [[] for _ in Course(tau, steps, ahead).rounds]
    rounds = range(len(course.rounds))
    for period in PERIODS:
        expected = [[T for T in clocks if T in due(period, steps)] for clocks in course.rounds]
        evaluating = Calendar(tau, steps, evaluate_every=period, ahead=ahead)
        saving = Calendar(tau, steps, checkpoint_every=period, ahead=ahead)
        assert [evaluating.evaluation_steps(round) for round in rounds] == expected
        assert [saving.checkpoint_steps(round) for round in rounds] == expected
        assert [evaluating.checkpoint_steps(round) for round in rounds] == none
        assert [saving.evaluation_steps(round) for round in rounds] == none


@pytest.mark.parametrize("tau, steps, ahead", RUNS)
def test_every_date_is_in_exactly_one_round(tau, steps, ahead):
    for evaluate_every, checkpoint_every in product(PERIODS, (0, 3)):
        calendar = Calendar(tau, steps, evaluate_every, checkpoint_every, ahead)
        beyond = range(steps + 3)  # rounds that do not exist have no dates
        assert [*chain(*map(calendar.evaluation_steps, beyond))] == due(evaluate_every, steps)
        assert [*chain(*map(calendar.checkpoint_steps, beyond))] == due(checkpoint_every, steps)


@pytest.mark.parametrize("tau, steps, ahead", RUNS)
def test_snapshots_are_where_somebody_wants_to_look(tau, steps, ahead):
    for evaluate_every, checkpoint_every in product(PERIODS, (0, 3, 5)):
        course = Course(tau, steps, ahead)
        calendar = Calendar(tau, steps, evaluate_every, checkpoint_every, ahead)
        dates = {*due(evaluate_every, steps), *due(checkpoint_every, steps)}
        wanted = [round for round, clocks in enumerate(course.rounds) if dates & set(clocks)]
        rounds = range(len(course.rounds))
        assert [round for round in rounds if calendar.snapshot_after(round)] == wanted
        for round in rounds:
            earlier, later = [r for r in wanted if r < round], [r for r in wanted if r >= round]
            assert calendar.previous_snapshot(round) == (earlier[-1] if earlier else None)
            assert calendar.next_snapshot(round) == (later[0] if later else None)
        assert calendar.next_snapshot(len(course.rounds)) is None


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("period", PERIODS)
def test_a_checkpoint_is_also_due_at_the_end_but_not_at_the_start(steps, period):
    calendar = Calendar(3, steps, checkpoint_every=period)
    expected = sorted({*due(period, steps), steps}) if period else []
    assert [t for t in range(steps + 1) if calendar.checkpoint_due(t)] == expected
