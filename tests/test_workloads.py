"""Networks that have been tuned bring hyperparameters of their own, as the rows found them, unless some are given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from easgd_local import models
from easgd_local.cli import make_config
from easgd_local.compare.entries import parse
from easgd_local.compare.rivals import DDP, ENTRANTS
from easgd_local.rules import RULES, rule_class
from easgd_local.workloads import WORKLOADS, tuned

ROWS = Path(__file__).parents[1] / "bench" / "results" / "paper"
CASES = [(model, rule) for model, found in WORKLOADS.items() for rule in found]


@pytest.mark.parametrize("model, rule", CASES)
def test_a_tuned_network_brings_its_hyperparameters(model: str, rule: str) -> None:
    assert model in models.NAMES
    wanted = ENTRANTS[rule](**WORKLOADS[model][rule])
    assert parse([rule], model)[0].rule == wanted
    assert parse([rule])[0].rule == ENTRANTS[rule]()
    if rule in RULES:
        assert make_config({"rule": rule, "model": model}).rule == wanted
        assert make_config({"rule": rule}).rule == rule_class(rule)()


@pytest.mark.parametrize("given", [{"lr": 0.25}, {"momentum": 0.5}])
def test_what_the_user_gives_of_them_is_taken_with_the_rules_own_rest(given: dict[str, Any]) -> None:
    arguments = {"rule": "eamsgd", "model": "cifar7", **given}
    assert make_config(arguments).rule == rule_class("eamsgd")(**given)
    (word,) = (f"{name}={value}" for name, value in given.items())
    assert parse([f"eamsgd {word}"], "cifar7")[0].rule == rule_class("eamsgd")(**given)


def test_another_optimizer_of_ddp_has_its_own_step_size() -> None:
    assert parse(["ddp optimizer=adam"], "cifar7")[0].rule == DDP(optimizer="adam")
    ours, theirs = (WORKLOADS["cifar7"][one] for one in ("msgd", "ddp"))
    assert ours == theirs == WORKLOADS["cifar7"]["post-local-sgd"]  # nobody is compared at the digits' step size


def test_another_hyperparameter_leaves_them_as_they_are() -> None:
    found = make_config({"rule": "eamsgd", "model": "cifar7", "tau": 3}).rule
    assert found == rule_class("eamsgd")(tau=3, **WORKLOADS["cifar7"]["eamsgd"])


def test_a_network_that_was_not_tuned_has_none() -> None:
    assert tuned("resnet18", "easgd") == tuned("cifar7", "diloco") == {}


@pytest.mark.parametrize("rule", sorted(RULES.keys() & WORKLOADS["cifar7"].keys()))
def test_the_step_size_is_the_one_that_the_search_found_at_the_nearest_period(rule: str) -> None:
    """τ = 16 was run, and the elastic rules' 10 is nearer to it than to 4."""
    rows = [json.loads(line) for line in (ROWS / "cifar-tau.jsonl").read_text("utf-8").splitlines()]
    nearest = {10: " tau=16 ", 1: " tau=1 "}[rule_class(rule)().tau] if rule not in ("mdownpour", "msgd") else " "
    found = [one for one in rows if not one["trial"] and one["label"].startswith(rule + nearest)]
    assert found[-1]["lr"] == WORKLOADS["cifar7"][rule]["lr"]
