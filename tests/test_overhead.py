"""The warning about exchanges that do not hide, by numbers: shares, the τ that would do, when it is said."""

from __future__ import annotations

import pytest

from easgd_local import overhead
from easgd_local.overhead import Spent, Watch, least_lost, sentence, tau_to_hide
from easgd_local.rules import RULES
from easgd_local.rules.easgd import EASGD


def said(watch: Watch, share: float, seconds: float, *, start_s: float = 0.0, **more: float) -> list[str]:
    """What is said when two workers report each second, losing this share of it; `more`: further shares by rank."""
    found = []
    for second in range(int(seconds) + 1):
        for rank in range(2):
            lost_s = second * more.get(f"worker{rank}", share)
            report = {"t": 100 * second, "exchange_s": lost_s / 4, "wait_s": 3 * lost_s / 4}
            found.append(watch.hear(rank, start_s + second, report))
    return [one for one in found if one]


def test_the_period_that_hides_the_exchange_is_the_least_that_does() -> None:
    """1 of 5 seconds lost in 100 steps at τ = 2: 20 ms an exchange, 40 ms a step; 20/(20 + 5·40) = 0.0909."""
    spent = Spent(0, 100, 1.0, 5.0)
    assert spent.share == 0.2
    assert tau_to_hide(2, spent) == 5
    for tau, hides in ((4, False), (5, True)):
        assert (0.02 / (0.02 + tau * 0.04) <= 0.1) == hides
    assert tau_to_hide(10, Spent(0, 100, 0.5, 5.0)) == 10  # exactly at the threshold
    assert tau_to_hide(1, Spent(0, 10, 5.0, 5.0)) is None  # nothing but exchange: what a step takes is unknown


def test_the_worker_that_loses_least_counts_as_others_only_wait_for_it() -> None:
    slow, quick = Spent(0, 50, 0.1, 5.0), Spent(1, 50, 4.0, 5.0)
    assert least_lost([quick, slow]) is slow
    assert least_lost([Spent(0, 0, 0.0, 5.0), quick]) is quick  # one that made no step says nothing
    assert least_lost([]) is None
    assert said(Watch(1, crowded=False), 0.8, 60, worker0=0.05) == []


def test_it_is_said_once_after_two_windows_with_the_remedy() -> None:
    watch = Watch(1, crowded=False)
    [told] = said(watch, 0.2, 60)
    assert told == (
        "tau=1: exchange and waiting take 20 % of the time even of worker 0, which loses least (2 ms an exchange, 8 ms "
        "a step): tau=3 would bring that to 10 % if an exchange goes on costing as much."
    )


@pytest.mark.parametrize("share, seconds", [(0.09, 60), (0.9, 9), (0.0, 60)])
def test_it_is_not_said_of_cheap_exchanges_nor_in_a_short_run(share: float, seconds: float) -> None:
    assert said(Watch(10, crowded=False), share, seconds) == []


def test_no_period_is_named_beyond_the_run_or_without_a_time_of_steps() -> None:
    usual, all_lost = Spent(0, 100, 1.0, 5.0), Spent(0, 10, 6.0, 5.0)
    assert " tau=3 would bring that to 10 % if" in sentence(1, usual, False, steps=3)
    assert sentence(1, usual, False, steps=2).endswith(": a larger tau would lower that if an exchange goes on costing "
                                                       "as much.")  # fmt: skip
    told = sentence(1, all_lost, False)
    assert "take 100 % of" in told and ", 0 ms a step): a larger tau would" in told
    [short] = said(Watch(1, crowded=False, steps=2), 0.2, 60)
    assert "a larger tau would" in short


def test_a_passing_crowd_is_no_reason() -> None:
    watch = Watch(10, crowded=False)
    lost_s = 0.0
    for second in range(60):
        lost_s += 0.5 if second // 5 % 2 else 0.0  # every other window
        assert watch.hear(0, second, {"t": second, "exchange_s": lost_s, "wait_s": 0.0}) is None


def test_with_more_threads_than_cores_only_the_exchange_counts() -> None:
    assert said(Watch(1, crowded=True), 0.36, 60) == []  # 9 % exchange, 27 % waiting
    [told] = said(Watch(1, crowded=True), 0.48, 60)
    assert told.startswith("tau=1: exchanges take 12 % of the time")


def test_a_worker_in_the_place_of_a_dead_one_counts_from_its_own_beginning() -> None:
    watch = Watch(1, crowded=False)
    assert said(watch, 0.2, 7) == []
    assert said(watch, 0.01, 60, start_s=8.0) == []


@pytest.mark.parametrize("name", RULES)
def test_only_rules_whose_period_can_grow_are_watched(name: str) -> None:
    watched = overhead.watch(RULES[name](), crowded=False) is not None
    assert watched == (hasattr(RULES[name](), "tau") and name != "mdownpour")


def test_the_period_of_the_rule_is_the_one_that_is_said() -> None:
    watch = overhead.watch(EASGD(tau=7), crowded=False)
    assert watch is not None
    [told] = said(watch, 0.5, 20)
    assert told.startswith("tau=7: ") and "tau=63 would" in told
