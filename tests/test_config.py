"""The configuration of a run: validated when constructed, to JSON and back, and the rules' hyperparameters."""

import inspect
import json
import re
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import easgd_local
from easgd_local.config import CHOICES, RESUMABLE, Config, differences, refuse_change
from easgd_local.faults import Fault
from easgd_local.rules import RULES, rule_class
from easgd_local.rules.eamsgd import EAMSGD
from easgd_local.rules.easgd import EASGD
from easgd_local.rules.elastic import Elastic
from easgd_local.rules.msgd import MSGD
from easgd_local.rules.sgd import SGD

OTHER = {  # a value of each field that is not its default
    "workers": 3, "device": "cpu", "data": "synthetic", "data_dir": "pictures", "image_size": 33, "memory_budget": 0.5,
    "model": "cifar7", "steps": 31, "epochs": 1.5, "batch_size": 7, "weight_decay": 0.25, "sampling": "independent",
    "seed": 2**63 - 1, "turns": "free", "precision": "bf16", "channels_last": True, "compile": True,
    "tf32": True, "nondeterministic": True, "exchange": "inline",
    "buffers": "recalibrate", "block_bytes": 640, "threads": 3,
    "eval_every": 0, "eval_samples": 5, "checkpoint_every": 4, "keep": 1, "out": "here", "on_failure": "stop",
    "tensorboard": True, "schedule": "step", "warmup": 3, "lr_step": 5, "lr_decay": 0.5,
    "faults": (Fault("kill", 1, 5), Fault("raise", 0)),
}  # fmt: skip


def of(rule: str, **values: Any) -> Config:
    return Config(rule=RULES[rule](), **values)


def other_rule(name: str) -> Any:
    """The rule with every hyperparameter away from its default, as far as they do not exclude each other."""
    values = {
        "lr": 0.125, "momentum": 0.5, "tau": 1 if name == "mdownpour" else 7, "rho": 0.3, "first": "worker",
        "average_rate": 0.5, "beta1": 0.5, "beta2": 0.25, "epsilon": 0.125, "delay": 3, "full_steps": 9,
        "inner": "msgd", "center_momentum": 0.5, "outer_lr": 0.25, "outer_momentum": 0.5,
    }  # fmt: skip
    return RULES[name](**{one.name: values.get(one.name, one.default) for one in fields(RULES[name])})


# Defaults and JSON


def test_the_defaults_are_the_papers_node_and_five_hundred_steps() -> None:
    config = of("eamsgd")
    assert (config.workers, config.steps, config.epochs, config.data, config.model) == (4, 500, None, "digits", "mlp")
    assert of("sgd").workers == of("msgd").workers == 1
    assert of("easgd", epochs=2).steps is None


def test_every_field_has_another_value_to_be_tested_with() -> None:
    assert OTHER.keys() == {one.name for one in fields(Config)} - {"rule"}
    config = of("easgd")
    assert all(getattr(config, name) != value for name, value in OTHER.items())


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("changed", [{}, {"steps": None}, {"epochs": None}])
def test_a_configuration_survives_json(name: str, changed: dict[str, Any]) -> None:
    values = OTHER | ({"workers": 1} if RULES[name].sequential else {}) | (changed or {"epochs": None})
    values["turns"] = RULES[name].orders[-1]
    config = Config(rule=other_rule(name), **values)
    text = json.dumps(config.to_json(), allow_nan=False)
    assert Config.from_json(json.loads(text)) == config
    assert json.dumps(Config.from_json(json.loads(text)).to_json()) == text


@pytest.mark.parametrize("name", RULES)
def test_a_default_configuration_survives_json(name: str) -> None:
    assert Config.from_json(json.loads(json.dumps(of(name).to_json()))) == of(name)


def test_paths_and_numbers_of_other_libraries_become_pythons_own() -> None:
    config = Config(
        rule=EASGD(lr=np.float64(0.5), tau=np.int64(3)), workers=np.int32(2), weight_decay=np.float32(0.5), epochs=2,
        out=Path("a/b"),
    )  # fmt: skip
    assert [type(x) for x in (config.rule.lr, config.rule.tau, config.workers, config.weight_decay, config.epochs)] == [
        float, int, int, float, float,
    ]  # fmt: skip
    assert config.out == "a/b" and Config.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        of("easgd").steps = 3
    with pytest.raises(FrozenInstanceError):
        EASGD().tau = 3


def test_an_unknown_field_in_json_tells_of_another_version() -> None:
    with pytest.raises(ValueError, match=r"configuration of another version .*colour"):
        Config.from_json(of("easgd").to_json() | {"colour": "red"})


# Mistakes of those who call from Python


@pytest.mark.parametrize("make, sentence", [
    (lambda: Config(rule="easgd"), r"rule='easgd': must be a rule .*, such as EASGD\(\) or EASGD\(tau=10\)"),
    (lambda: Config(rule=EASGD), "must be a rule with its hyperparameters"),
    (lambda: of("easgd", steps=1.5), "steps=1.5: must be a whole number, not float"),
    (lambda: of("easgd", steps="100"), "steps='100': must be a whole number, not str"),
    (lambda: of("easgd", workers=True), "workers=True: must be a whole number, not bool"),
    (lambda: of("easgd", epochs="3"), "epochs='3': must be a number, not str"),
    (lambda: of("easgd", turns="Strict"), "turns=Strict: must be one of strict, free, none, together"),
    (lambda: of("easgd", turns="together"), "turns=together: the rule easgd is defined for turns=strict or free or "),
    (lambda: of("easgd-sync", turns="strict"), "turns=strict: the rule easgd-sync is defined for turns=together;"),
    (lambda: of("adownpour", turns="none"), "turns=none: the rule adownpour is defined for turns=strict or free;"),
    (lambda: of("easgd", schedule="linear"), "schedule=linear: must be one of constant, step, cosine, sqrt"),
    (lambda: of("easgd", schedule="step"), "schedule=step: .* give lr_step"),
    (lambda: of("easgd", lr_step=5), "lr_step=5: belongs to the schedule step, but schedule=constant"),
    (lambda: of("easgd", schedule="cosine", lr_decay=0.5), "lr_decay=0.5: belongs to the schedule step"),
    (lambda: of("easgd", schedule="step", lr_step=5, lr_decay=1.5), r"lr_decay=1.5: .* \(0, 1\]"),
    (lambda: of("easgd", warmup=-1), "warmup=-1: must be at least 0"),
    (lambda: of("asgd", workers=2), "workers=2: the rule asgd is sequential"),
    (lambda: EASGD(tau=2.5), "tau=2.5: must be a whole number"),
    (lambda: EASGD(alpha="0.1"), "alpha='0.1': must be a number"),
    (lambda: SGD(lr=None), "lr=None: must be a number, not NoneType"),
    (lambda: of("easgd", batch_size=None), "batch_size=None: must be a whole number, not NoneType"),
    (lambda: Config(rule=EASGD(beta=9)), r"beta=9.0: α = β/p = 2.25, but .* choose beta at most p = 4"),
    (lambda: Config(rule=EAMSGD(rho=21, lr=0.05), workers=1), "rho=21.0: α = ηρ = 1.05, but .* at most 1/lr = 20"),
    (lambda: of("easgd", data=5), "data=5: must be a word, not int"),
    (lambda: rule_class("EASGD2"), "rule=EASGD2: the rules are easgd, eamsgd"),
    (lambda: Fault("explode", 0), "kind=explode: must be one of kill"),
])  # fmt: skip
def test_a_mistake_is_told_when_the_object_is_made(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_can_be_made(name: str) -> None:
    for choice in CHOICES[name]:
        rule = "easgd-sync" if choice == "together" else "easgd"
        needed = {"lr_step": 5} if choice == "step" else {}
        assert getattr(of(rule, **{name: choice}, **needed), name) == choice


@pytest.mark.parametrize("name", RULES)
def test_the_order_of_turns_is_the_first_that_the_rule_is_defined_for(name: str) -> None:
    assert of(name).turns == RULES[name].orders[0]
    assert {of(name, turns=order).turns for order in RULES[name].orders} == set(RULES[name].orders)


@pytest.mark.parametrize("name, least", [
    ("workers", 1), ("steps", 1), ("batch_size", 1), ("eval_samples", 1), ("keep", 1), ("threads", 1),
    ("image_size", 8), ("block_bytes", 64), ("seed", 0), ("eval_every", 0), ("checkpoint_every", 0),
])  # fmt: skip
def test_a_count_may_be_at_its_limit_and_not_below(name: str, least: int) -> None:
    assert getattr(of("easgd", **{name: least}), name) == least
    with pytest.raises(ValueError, match=f"{name}={least - 1}: must be at least {least}"):
        of("easgd", **{name: least - 1})


def test_the_limits_from_above_may_be_reached() -> None:
    assert of("easgd", workers=64).workers == 64
    for name, value in (("workers", 65), ("seed", 2**63), ("threads", 1025), ("steps", 10**12 + 1)):
        with pytest.raises(ValueError, match=f"{name}={value}: "):
            of("easgd", **{name: value})


# What makes it another run


@pytest.mark.parametrize("name", [name for name in OTHER if name not in RESUMABLE | {"faults"}])
def test_a_change_of_what_is_computed_is_a_difference(name: str) -> None:
    decays = {"schedule": "step", "lr_step": 7, "lr_decay": 0.25} if name.startswith("lr_") else {"lr_step": None}
    before = {"rule": EASGD(), "steps": 10} | decays
    after = before | {name: OTHER[name]} | ({"lr_step": 7} if name == "schedule" else {})
    found = differences(Config(**before), Config(**after))
    assert found.pop(name) == (getattr(Config(**before), name), OTHER[name])
    assert found == ({"lr_step": (None, 7)} if name == "schedule" else {})


def test_the_length_of_a_run_with_a_cosine_is_part_of_what_is_computed() -> None:
    before, after = (of("easgd", schedule="cosine", steps=steps) for steps in (10, 20))
    assert differences(before, after) == {"steps": (10, 20)}
    before, after = (of("easgd", schedule="cosine", epochs=2, workers=workers) for workers in (1, 2))
    assert differences(before, after) == {"workers": (1, 2)}


@pytest.mark.parametrize("name", sorted(RESUMABLE | {"faults"}))
def test_a_change_of_anything_else_is_none(name: str) -> None:
    values = {"steps": 10} | {name: OTHER[name]} | ({"steps": None} if name == "epochs" else {})
    assert differences(of("easgd", steps=10), of("easgd", **values)) == {}


def test_another_rule_or_hyperparameter_is_a_difference() -> None:
    old = Config(rule=EASGD(tau=3))
    assert differences(old, Config(rule=EASGD(tau=4))) == {"tau": (3, 4)}
    assert differences(old, Config(rule=EASGD(tau=3, beta=0.9))) == {"beta": (None, 0.9)}
    assert differences(old, Config(rule=EAMSGD(tau=3)))["rule"] == ("easgd", "eamsgd")
    with pytest.raises(ValueError, match=r"tau=4: the run in there was started with tau=3, .* leave --tau out"):
        refuse_change("tau", 3, 4, Path("there"))


# The rules


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_documented_by_its_formula_and_its_source(name: str) -> None:
    rule = RULES[name]
    assert rule.name == name and rule_class(name) is rule and getattr(easgd_local, rule.__name__) is rule
    first, _, rest = inspect.getdoc(rule).partition("\n\n")
    assert re.search(r"[xcvmsu](\^i|_b)? +<- ", rest), "its formula"
    assert re.search(r"\d{4}.*\((arXiv:\d{4}\.\d{4,5}|doi:\S+)", first, re.DOTALL), "its source, with year and number"
    assert all(one.metadata["help"] for one in fields(rule))


@pytest.mark.parametrize("name", [name for name in RULES if issubclass(RULES[name], Elastic)])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("given", [{}, {"alpha": 0.3}, {"beta": 0.75}, {"rho": 2.5}, {"alpha": 0.0}, {"alpha": 1.0}])
def test_alpha_beta_and_rho_describe_one_moving_rate(name: str, workers: int, given: dict[str, float]) -> None:
    """α = β/p = ηρ."""
    rule = RULES[name](lr=0.125, **given)
    derived = rule.derived(workers)
    assert derived.keys() == {"alpha", "beta", "rho"} and derived["alpha"] == rule.moving_rate(workers)
    assert derived["beta"] / workers == pytest.approx(derived["alpha"], rel=1e-15)
    assert 0.125 * derived["rho"] == pytest.approx(derived["alpha"], rel=1e-15)
    for key, value in (given or {"beta": 0.9}).items():
        assert derived[key] == pytest.approx(value, rel=1e-15)
    for key in derived:  # and each of the three names the same rule
        same = replace(rule, **(dict.fromkeys(derived) | {key: derived[key]}))
        assert same.moving_rate(workers) == pytest.approx(derived["alpha"], rel=1e-15)


@pytest.mark.parametrize("rule", [SGD(), MSGD(momentum=0.5)])
def test_the_sequential_rules_derive_nothing_and_warn_of_nothing(rule: Any) -> None:
    assert rule.derived(1) == {} and rule.warnings(1) == [] and rule.period == 1


@pytest.mark.parametrize("rule", [EASGD, EAMSGD])
def test_the_stability_bound_is_the_edge_of_the_warning(rule: Any) -> None:
    """(4 - 2η)/(4 - η) at curvature 1, for η = 1: 2/3."""
    bound = 2 / 3
    assert rule(lr=1.0, alpha=bound - 1e-9).warnings(3) == []
    [sentence] = rule(lr=1.0, alpha=bound + 1e-9).warnings(3)
    assert re.match(r"alpha=0.6667 is beyond the stability bound \(4 - 2ηh\)/\(4 - ηh\) = 0.6667 of .* lower", sentence)
    assert rule().warnings(1) == []  # the defaults are stable even alone
    assert rule(lr=2.5, alpha=0.01).warnings(4)


@pytest.mark.parametrize("tau, due", [(1, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 3, 6])])
def test_an_exchange_is_due_at_the_multiples_of_tau(tau: int, due: list[int]) -> None:
    rule = EASGD(tau=tau)
    assert [t for t in range(7) if rule.due(t)] == due and rule.period == tau
