"""Reloads from the center: how often, and when a run is hopeless."""

from __future__ import annotations

import pytest

from easgd_local.reloads import HOPELESS, Reloads

TAU = 3


@pytest.fixture
def reloads() -> Reloads:
    return Reloads(3, TAU)


def reloaded(reloads: Reloads, rank: int, exchanges: range) -> None:
    for number in exchanges:
        reloads.add(rank, number * TAU)


def test_it_is_hopeless_when_all_that_train_are_reloaded_at_every_exchange(reloads: Reloads) -> None:
    reloaded(reloads, 0, range(HOPELESS))
    reloaded(reloads, 2, range(4, 4 + HOPELESS))
    now = [HOPELESS * TAU, 0, (4 + HOPELESS) * TAU]
    assert reloads.hopeless([0, 2], now.__getitem__)
    assert not reloads.hopeless([0, 1, 2], now.__getitem__)  # one is sound
    assert not reloads.hopeless([], now.__getitem__)


def test_a_worker_that_has_recovered_is_not_hopeless(reloads: Reloads) -> None:
    reloaded(reloads, 0, range(2 * HOPELESS))
    assert not reloads.hopeless([0], lambda rank: 4 * HOPELESS * TAU)


def test_exchanges_that_went_well_begin_the_count_anew(reloads: Reloads) -> None:
    reloaded(reloads, 0, range(HOPELESS - 1))
    assert reloads.add(0, (HOPELESS + 1) * TAU) == HOPELESS
    assert not reloads.hopeless([0], lambda rank: (HOPELESS + 1) * TAU)


def test_at_the_end_it_is_told_who_was_reloaded_how_often(reloads: Reloads) -> None:
    reloaded(reloads, 0, range(1))
    reloaded(reloads, 2, range(4))
    assert reloads.sentences() == [
        "worker 0 was reloaded from the center once, as its values were not finite.",
        "worker 2 was reloaded from the center 4 times, as its values were not finite.",
    ]
