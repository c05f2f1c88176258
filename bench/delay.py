"""What does staleness cost APAM? Test error on the digits when gradients are taken D steps back.

The delays are those of the paper's study (Xu et al. 2020, arXiv:2002.09095), as far as the run is long enough, with one
worker, where a gradient is exactly D updates old, and with four in strict turns, where it is 4D + 3 updates old: the
largest staleness that any worker met is measured and checked against that bound.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from harness import about, arguments, record, spread

from easgd_local.config import Config
from easgd_local.rules.apam import APAM
from easgd_local.training import train

DELAYS = (0, 1, 6, 11, 21, 51, 101, 201)


def run(workers: int, delay: int, steps: int, seed: int) -> dict[str, Any]:
    """One run; its summary."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder, "run"))
        return train(Config(rule=APAM(delay=delay), workers=workers, steps=steps, seed=seed, eval_every=0, out=out))


def main() -> None:
    given = arguments("What does staleness cost APAM on the digits?").parse_args()
    steps, delays = (40, (0, 6)) if given.quick else (500, DELAYS)
    common, rows = about("delay"), []
    seeds = range(given.repetitions or (1 if given.quick else 3))
    for workers in (1, 4):
        for delay in delays:
            summaries = [run(workers, delay, steps, seed) for seed in seeds]
            between = max(report["staleness"] for one in summaries for report in one["worker_reports"])
            assert between == workers - 1, "in strict turns each other worker updates a block once between two visits"
            errors = [one["test_error"] if one["status"] == "done" else 1.0 for one in summaries]
            rows.append({
                "entry": f"{workers} workers, delay {delay}", "steps": steps,
                "staleness_updates": delay * workers + between, "test_error": spread(errors),
                "train_loss": spread(one["train_loss"] for one in summaries),
            })  # fmt: skip
    record(rows, common, given)


if __name__ == "__main__":
    main()
