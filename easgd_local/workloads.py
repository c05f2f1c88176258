"""Hyperparameters for networks that have been tuned. The rules' own defaults are for the perceptron on the digits.

Found by python bench/paper/run.py cifar-tau --scale 0.032 --batch-size 32 --tune-cost 1.3, with four workers: the
trials are in bench/results/paper/cifar-tau.jsonl, and docs/results.md shows what became of them.
"""

from __future__ import annotations

from collections.abc import Collection

WORKLOADS: dict[str, dict[str, dict[str, float]]] = {
    "cifar7": {
        "easgd": {"lr": 0.05},
        "eamsgd": {"lr": 0.003, "momentum": 0.99},
        "downpour": {"lr": 0.05},
        "adownpour": {"lr": 0.05},
        "mvadownpour": {"lr": 0.05},
        "mdownpour": {"lr": 0.000158, "momentum": 0.99},
        "msgd": {"lr": 0.00316, "momentum": 0.99},
        "ddp": {"lr": 0.00316, "momentum": 0.99},  # as msgd, which is what each of its processes runs
        "post-local-sgd": {"lr": 0.00316, "momentum": 0.99},
    },
}
TOGETHER = ("lr", "momentum", "optimizer")  # tuned as one: who gives one of them gets the rule's defaults for the rest


def tuned(model: str, rule: str, given: Collection[str] = ()) -> dict[str, float]:
    """What `rule` takes on `model` unless told otherwise; nothing where one of TOGETHER is given, or none was tuned."""
    return {} if set(TOGETHER) & set(given) else dict(WORKLOADS.get(model, {}).get(rule, {}))
