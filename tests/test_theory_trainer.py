"""The trainer itself against the theory: processes on a quadratic follow the predicted center, stable or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import easgd_local as easgd
from easgd_local import metrics, theory
from easgd_local.center import BLOCK_BYTES, Layout
from easgd_local.flat import ALIGNMENT
from tests import quadratics
from tests.conftest import unpainted
from tests.quadratics import START, TARGET

pytestmark = pytest.mark.usefixtures("nothing_left")
Centers = Callable[..., list[dict[str, Any]]]
EPS = 2.0**-24  # of one rounding to float32, at most
LR, ALPHA, STEPS = 0.125, 0.6, 40


@pytest.fixture
def centers(tmp_path: Path) -> Centers:
    """What `evaluate` said of the center at t = 0, 1, 2, ... of a launch."""

    def start(fn: Any, *args: Any, workers: int) -> list[dict[str, Any]]:
        with unpainted():
            done = easgd.launch(fn, args=args, workers=workers, threads=1, view=False, out=tmp_path / f"{workers}")
        found = {event["t"]: event for event in metrics.read(done.folder) if event["kind"] == "center"}
        return [found[t] for t in range(done.summary["steps"] + 1)]

    return start


def first_visitor(coordinate: int, workers: int) -> int:
    """Block b sees workers g, g - 1, ... (mod p) in each round, where g is its group: all start at once."""
    layout = Layout(workers, ALIGNMENT, ("c",), BLOCK_BYTES)
    blocks = [b for b in range(layout.blocks) if layout.block(b).start <= coordinate < layout.block(b).stop]
    return blocks[0] * workers // layout.blocks


def predicted(h: float, workers: int, apart: float, first: int) -> np.ndarray:
    """States (x of the workers in the order of their visits, c) after 0, 1, 2, ... cycles, as offsets from TARGET.

    With aims that differ a cycle is z <- M z + k with the M of the theory; k is what a cycle makes of 0.
    """
    cycle = theory.easgd_round_robin_matrix(LR, ALPHA, workers, h)
    k = np.zeros(workers + 1)
    for place in range(workers):
        x, c, aim = k[place], k[-1], apart * ((first - place) % workers)
        k[place], k[-1] = (1 - LR * h - ALPHA) * x + ALPHA * c + LR * h * aim, ALPHA * x + (1 - ALPHA) * c
    rest = np.linalg.solve(np.eye(workers + 1) - cycle, k)
    return theory.trajectory(cycle, START - TARGET - rest, STEPS) + rest


def rounding(states: np.ndarray, h: float, workers: int) -> np.ndarray:
    """How far float32 can lead from the states: 8 roundings a turn, of what is in it, each grown by all that follows.

    In a turn c has 3 (x - c, times α, added), x those and 5 more (model, residual, its gradient, times η, added), of
    numbers that are no larger than 1 + ηh times the weights.
    """
    turn = np.array([[1 - LR * h - ALPHA, ALPHA], [ALPHA, 1 - ALPHA]])
    within = workers * max(1.0, np.linalg.norm(turn, 2)) ** workers  # a cycle's turns, each grown to its end
    made = 8 * EPS * (1 + LR * h) * within * (np.abs(states).max(axis=1) + TARGET)
    cycle = theory.easgd_round_robin_matrix(LR, ALPHA, workers, h)
    grown = np.array([np.linalg.norm(np.linalg.matrix_power(cycle, n), 2) for n in range(len(states))])
    return np.array([made[: n + 1] @ grown[n::-1] for n in range(len(states))])


def edge(workers: int) -> float:
    """The curvature at which the round robin with ALPHA stops being stable."""
    low, high = 1 / LR, 2 / LR
    for _ in range(40):
        middle = (low + high) / 2
        stable = theory.easgd_round_robin_radius(LR, ALPHA, workers, middle) <= 1
        low, high = (middle, high) if stable else (low, middle)
    return low


@pytest.mark.parametrize("workers, apart", [(2, 0.0), (3, 0.0), (3, 0.5)])
def test_the_center_follows_the_predicted_mean_on_both_sides_of_the_bound(
    centers: Centers, workers: int, apart: float
) -> None:
    limit = edge(workers)
    if workers % 2:  # for these the paper's bound is the edge itself
        assert theory.easgd_alpha_limit(LR, limit) == pytest.approx(ALPHA)
    wanted = [0.94 * limit, 1.08 * limit, 1.0, 0.1]
    weights = quadratics.features(wanted).diagonal().double().numpy()
    curvatures = weights**2 / len(wanted)  # as they are, in float32
    found = centers(
        quadratics.full_batches, easgd.EASGD(tau=1, alpha=ALPHA), LR, wanted, STEPS, apart, workers=workers
    )  # fmt: skip
    runs = np.array([[event[f"w{j}"] - TARGET for j in range(len(wanted))] for event in found]).T
    for j, (h, run) in enumerate(zip(curvatures, runs, strict=True)):
        states = predicted(h, workers, apart, first_visitor(j, workers))
        error, tolerance = np.abs(run - states[:, -1]), rounding(states, h, workers)
        assert (error <= tolerance).all(), f"h = {h}: {(error / tolerance).max()} times the tolerance"
        assert tolerance[-1] < 0.02 * np.abs(states).max()
    moved = np.abs(np.diff(runs))
    early, late = moved[:, 5:10].max(axis=1), moved[:, -5:].max(axis=1)  # not of the first rush
    assert late[0] < 0.5 * early[0] and late[1] > 2 * early[1]


def test_with_other_orders_of_the_workers_the_prediction_is_another_one() -> None:
    """Else the test above would not see the order."""
    states = [predicted(1.0, 3, 0.5, first) for first in range(3)]
    allowed = rounding(states[0], 1.0, 3)
    assert all((np.abs(states[0] - other)[:, -1] / allowed).max() > 50 for other in states[1:])


def test_of_noisy_minibatches_mean_and_variance_of_the_center_are_the_predicted_ones(centers: Centers) -> None:
    """4096 copies: at each t a mean within 5 of its standard errors, a variance within 5 of its own."""
    lr, alpha, h, sigma, copies, workers = 0.2, 0.2, 1.5, 2.0, 4096, 3
    rule = easgd.EASGDSync(tau=1, alpha=alpha)
    found = centers(quadratics.minibatches, rule, lr, h, sigma, copies, 25, workers=workers)
    t = np.arange(len(found))
    given: dict[str, Any] = {"lr": lr, "alpha": alpha, "workers": workers, "curvature": h}
    mean = theory.center_mean(t, **given, start=START - TARGET)
    variance = theory.center_variance(t, **given, sigma=sigma)
    float32 = 25 * 8 * EPS * START
    assert (np.abs([event["mean"] for event in found] - mean) <= 5 * np.sqrt(variance / copies) + float32).all()
    spread = np.abs([event["variance"] for event in found] - variance)
    assert (spread <= 5 * variance * np.sqrt(2 / copies) + 1e-9).all()
    assert variance[-1] > 0.9 * theory.center_variance(np.inf, **given, sigma=sigma) > 0  # long enough
