"""Does the simulator predict a real run? Samples a second of two workers on the digits, predicted and measured.

One real run of `easgd_local.train`, rule EASGD, p = 2, τ = 1, gives the delays: what a step takes without exchange, how
much that varies, and what an exchange takes without waiting. They are the simulator's machine, which then predicts
the throughput at this and at other periods; real runs at these measure it. `share_of_measured` is prediction over
measurement, taken repetition by repetition.

The predictions at other periods are the test: what was measured there has not been looked at. Start-up and the first
tenth of each run are outside. First the result is checked: every real run has made its steps, and the simulated workers
as many as were asked for.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import numpy as np

import easgd_local as easgd
from easgd_local.simulate.machine import FLOAT_BYTES, Machine
from easgd_local.simulate.problems import make_problem
from easgd_local.simulate.simulation import Scenario, simulate
from easgd_local.simulate.traffic import traffic

WORKERS, BATCH, WARM_UP = 2, 64, 0.1
PERIODS = (1, 4, 16)  # the first gives the delays


@dataclass(frozen=True)
class Measured:
    """A real run, after its warm-up: the rate of all workers, and of each step and exchange the mean time."""

    samples_per_s: float
    step_s: float
    spread: float  # deviation of the logarithm of a step's time
    exchange_s: float
    parameters: int


def measure(tau: int, steps: int) -> Measured:
    """One run of two workers."""
    reports: dict[int, list[tuple[float, ...]]] = defaultdict(list)
    parameters = 0

    def listen(event: dict[str, Any]) -> None:
        nonlocal parameters
        if event["kind"] == "start":
            parameters = event["parameters"]
        if event["kind"] == "worker":
            numbers = (event[name] for name in ("t", "exchange_s", "wait_s", "exchanges"))
            reports[event["rank"]].append((time.perf_counter(), *numbers))

    with tempfile.TemporaryDirectory() as folder:
        config = easgd.Config(
            rule=easgd.EASGD(tau=tau), workers=WORKERS, batch_size=BATCH, steps=steps, threads=1, eval_every=0,
            eval_samples=1, out=str(Path(folder) / "run"),
        )  # fmt: skip
        summary = easgd.train(config, listeners=[listen])
    assert summary["status"] == "done" and len(reports) == WORKERS, summary
    return digest([np.array(reports[rank]) for rank in range(WORKERS)], parameters)


def digest(courses: list[np.ndarray], parameters: int) -> Measured:
    """The numbers of a run, from each worker's reports: columns time, t, exchange_s, wait_s, exchanges."""
    rates, alone_s, deviations, exchange_s = [], [], [], []
    for course in courses:
        course = course[math.ceil(WARM_UP * len(course)) :]
        seconds, steps, exchanging_s, waiting_s, exchanges = np.diff(course, axis=0).T
        rates.append(BATCH * steps.sum() / seconds.sum())
        step_s = (seconds - exchanging_s - waiting_s) / steps
        alone_s.append(float((step_s * steps).sum() / steps.sum()))
        # A report is the mean of some steps, whose deviation is so many roots smaller; its middle, as some are held up.
        low, high = np.percentile(np.log(step_s.clip(1e-9)), (16, 84))
        deviations.append((high - low) / 2 * math.sqrt(float(steps.mean())))
        exchange_s.append(float(exchanging_s.sum() / exchanges.sum()))
    return Measured(
        sum(rates), float(np.mean(alone_s)), float(np.mean(deviations)), float(np.mean(exchange_s)), parameters
    )


def predict(tau: int, steps: int, seen: Measured) -> float:
    """Samples a second of the simulated workers."""
    rule = easgd.EASGD(tau=tau)
    size_bytes = FLOAT_BYTES * traffic(rule, WORKERS).floats * seen.parameters
    machine = Machine(
        step_s=seen.step_s, spread=min(seen.spread, 1.0), parameters=seen.parameters, latency_s=0.0,
        link_gb_per_s=1e-9 * size_bytes / seen.exchange_s, memory_gb_per_s=math.inf,
    )  # fmt: skip
    done = simulate(Scenario(rule=rule, workers=WORKERS, steps=steps), make_problem("quadratic"), machine)
    assert done.gradients == WORKERS * steps
    return BATCH * done.gradients_per_s


def main() -> None:
    given = harness.arguments("Does the simulator predict a real run?").parse_args()
    steps, repetitions = (100, 1) if given.quick else (1000, 7)
    common = harness.about("simulate")
    real: dict[int, list[float]] = defaultdict(list)
    told: dict[int, list[float]] = defaultdict(list)
    delays = []
    for _ in range(given.repetitions or repetitions):
        for tau in PERIODS:
            seen = measure(tau, steps)
            real[tau].append(seen.samples_per_s)
            if tau == PERIODS[0]:
                delays.append(seen)
        for tau in PERIODS:
            told[tau].append(predict(tau, steps, delays[-1]))
    rows = [
        {
            "entry": f"τ = {tau}", "workers": WORKERS, "batch_size": BATCH, "steps": steps,
            "samples_per_s": harness.spread(real[tau]), "predicted_samples_per_s": harness.spread(told[tau]),
            "share_of_measured": harness.spread(np.array(told[tau]) / np.array(real[tau])),
            "step_s": harness.spread(one.step_s for one in delays),
            "step_spread": harness.spread(one.spread for one in delays),
            "exchange_s": harness.spread(one.exchange_s for one in delays),
        }
        for tau in PERIODS
    ]  # fmt: skip
    harness.record(rows, common, given)


if __name__ == "__main__":
    main()
