"""Which step size of each rule gives the least test error on the digits, with the paper's four workers?

    python bench/tune.py               all rules, three seeds each: a quarter of an hour on two cores
    python bench/tune.py sma apam      these rules

Every trial is a whole run of `easgd-local train RULE --lr X --seed S`, all else at its defaults; the rows hold the
center's error at each step size. The defaults in the rules' dataclasses are the best of these: the least error of the
worst seed up to lr = 0.2, and within one percentage point of that the smallest step size, since deeper networks want
less.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from harness import Row, about, arguments, record, spread

from easgd_local.config import Config
from easgd_local.rules import RULES, rule_class
from easgd_local.training import train

GRID = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def error_of(name: str, lr: float, seed: int) -> float:
    """The center's test error after a default run; 1 if the run diverged."""
    with tempfile.TemporaryDirectory() as folder:
        summary = train(Config(rule=rule_class(name)(lr=lr), seed=seed, eval_every=0, out=str(Path(folder, "run"))))
    return float(summary["test_error"]) if summary["status"] == "done" else 1.0


def tried(name: str, lr: float, seeds: int) -> Row:
    """The row of a step size."""
    errors = [error_of(name, lr, seed) for seed in range(seeds)]
    return {"entry": f"{name} lr={lr:g}", "test_error": spread(errors), "worst_test_error": max(errors)}


def main() -> None:
    parser = arguments("Which step size of each rule gives the least test error on the digits?")
    parser.add_argument("rules", nargs="*", metavar="RULE", help="the rules to try; default all")
    parser.add_argument("--lr", type=float, nargs="+", help="the step sizes to try")
    given = parser.parse_args()
    grid = given.lr or ((0.01,) if given.quick else GRID)
    names = given.rules or (["downpour"] if given.quick else RULES)
    seeds = given.repetitions or (1 if given.quick else 3)
    record((tried(name, lr, seeds) for name in names for lr in grid), about("tune"), given)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
