"""Step sizes as functions of the worker's clock."""

from __future__ import annotations

import math

import pytest

from easgd_local.config import Config
from easgd_local.learning_rate import LearningRate
from easgd_local.rules.easgd import EASGD


@pytest.mark.parametrize("shape", ["constant", "step", "cosine", "sqrt"])
def test_every_schedule_starts_at_the_step_size_given(shape: str) -> None:
    assert LearningRate(shape, 0.3, 100, every=7)(0) == 0.3


def test_each_schedule_is_its_formula() -> None:
    assert LearningRate("constant", 0.3, 100)(99) == 0.3
    step = LearningRate("step", 0.8, 100, every=10, decay=0.5)
    assert [step(t) for t in (0, 9, 10, 19, 20)] == [0.8, 0.8, 0.4, 0.4, 0.2]
    cosine = LearningRate("cosine", 0.8, 100)
    assert [cosine(t) for t in (25, 50)] == pytest.approx([0.4 * (1 + math.sqrt(0.5)), 0.4])
    assert 0 < cosine(99) < 0.001
    assert [LearningRate("sqrt", 0.8, 100)(t) for t in (3, 15)] == [0.4, 0.2]


def test_a_warm_up_rises_by_equal_steps_to_the_schedule() -> None:
    rate = LearningRate("constant", 1.0, 100, warmup=4)
    assert [rate(t) for t in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    cosine, warm = LearningRate("cosine", 1.0, 50), LearningRate("cosine", 1.0, 50, warmup=9)
    assert warm(3) == pytest.approx(0.4 * cosine(3))
    assert [warm(t) for t in range(9, 50)] == [cosine(t) for t in range(9, 50)]


def test_the_configuration_makes_the_schedule_it_describes() -> None:
    config = Config(rule=EASGD(lr=0.2), schedule="step", lr_step=30, warmup=5)
    assert config.learning_rate(100) == LearningRate("step", 0.2, 100, warmup=5, every=30, decay=0.1)
