"""What a worker of the user's loop refuses, each in a sentence that says what, value, rule and remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import easgd_local as easgd
from easgd_local.child import Refusal
from easgd_local.loop import LoopWorker, fitted
from easgd_local.randomness import seed_of
from easgd_local.rules import RULES


class Nobody:
    """A launcher that is never asked."""

    def send(self, word: Any) -> None:
        raise AssertionError(f"sent {word[0]}")


def worker() -> LoopWorker:
    return LoopWorker(0, 2, Nobody(), seed=0)  # type: ignore[arg-type]


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **({"lr": 0.1} | options))


def attach(**changes: Any) -> None:
    model = changes.pop("model", nn.Linear(3, 2))
    optimizer = changes.pop("optimizer", None) or sgd(model)
    worker().attach(model, optimizer, changes.pop("rule", easgd.EASGD()), **changes)


@pytest.mark.parametrize("changes, message", [
    ({"model": torch.ones(3), "optimizer": sgd(nn.Linear(3, 2))}, r"^model=Tensor: must be a torch.nn.Module"),
    ({"optimizer": object()}, r"^optimizer=object: must be a torch.optim.Optimizer, whose steps can be seen"),
    ({"rule": "easgd"}, r"^rule='easgd': must be a rule with its hyperparameters, such as EASGD\(tau=10"),
    ({"turns": "together"}, r"^turns=together: with the rule easgd it must be one of strict, free, none"),
    ({"buffers": "mean"}, r"^buffers=mean: .* one of average, recalibrate, local"),
    ({"optimizer_state": "sync"}, r"^optimizer_state=sync: .* one of local, reset"),
    ({"buffers": "recalibrate"}, r"^buffers=recalibrate without calibrate_on: .* give both or neither"),
    ({"calibrate_on": []}, r"^buffers=average with calibrate_on: .* give both or neither"),
    ({"evaluate_every": -1}, r"^evaluate_every=-1: must be a whole number of steps"),
    ({"evaluate_every": 1.5}, r"^evaluate_every=1.5: must be a whole number of steps"),
    ({"stateful": [3]}, r"^stateful: int has no state_dict and load_state_dict"),
    ({"rule": easgd.EASGD(beta=5.0)}, r"^beta=5.0: α = β/p = 2.5, but the moving rate must lie in \[0, 1\]"),
    ({"model": nn.Linear(3, 2).double()}, r"^weight has dtype torch.float64: .*call model.float\(\)"),
])  # fmt: skip
def test_what_cannot_be_attached_is_refused(changes, message):
    with pytest.raises(Refusal, match=message):
        attach(**changes)


def test_no_optimizer_at_all_is_refused():
    with pytest.raises(Refusal, match=r"^optimizer: there is none"):
        worker().attach(nn.Linear(3, 2), [], easgd.EASGD())


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_rule_is_laid_over_an_optimizer_or_says_that_it_makes_the_steps_itself(name):
    rule, optimizer = RULES[name](), sgd(nn.Linear(3, 2), momentum=0.9, nesterov=True)
    if not rule.attachable:
        with pytest.raises(Refusal, match=rf"^rule={name.replace('+', '.')}: makes the steps itself"):
            fitted(rule, optimizer)
    else:
        assert fitted(rule, optimizer).lr == 0.1  # the optimizer's


def test_the_rules_that_can_be_attached():
    names = {name for name, rule in RULES.items() if rule().attachable}
    elastic = {"easgd", "easgd-sync", "easgd-gs", "eamsgd", "eamsgd-sync"}
    assert names == elastic | {"downpour", "adownpour", "mvadownpour", "localsgd", "sma", "diloco"}


@pytest.mark.parametrize("rule, options, message", [
    (easgd.EASGD(lr=0.3), {}, r"^lr=0.3 in the rule and 0.1 in the optimizer: the step size is the opt"),
    (easgd.EAMSGD(momentum=0.9), {}, r"^rule=eamsgd with momentum=0.9 over SGD with Nesterov momentum None: the mom"),
    (easgd.EAMSGD(momentum=0.5), {"momentum": 0.9, "nesterov": True}, r"^rule=eamsgd with momentum=0.5 .* 0.9"),
    (easgd.LocalSGD(inner="adam"), {}, r"^inner=adam: the local optimizer is the SGD that is attached"),
    (easgd.EASGDGaussSeidel(first="worker"), {}, r"^rule=easgd-gs: makes the steps itself"),
])  # fmt: skip
def test_a_rule_and_an_optimizer_that_contradict_each_other_are_refused(rule, options, message):
    with pytest.raises(Refusal, match=message):
        fitted(rule, sgd(nn.Linear(3, 2), **options))


def test_the_moving_rate_of_rho_is_that_of_the_optimizers_step_size():
    assert fitted(easgd.EASGD(rho=2.0), sgd(nn.Linear(3, 2))).moving_rate(4) == pytest.approx(0.2)


@pytest.mark.parametrize("ask", ["log", "center_model", "state_dict"])
def test_before_attach_there_is_nothing_to_ask(ask):
    with pytest.raises(Refusal, match=rf"^{ask}: nothing is attached yet; call worker.attach"):
        getattr(worker(), ask)()


def test_a_state_that_is_none_is_refused():
    with pytest.raises(Refusal, match=r"^load_state_dict: this is not what worker.state_dict\(\) gave"):
        worker().load_state_dict({"weight": 3})


@pytest.mark.parametrize("batch_size, sampling, message", [
    (0, "shard", r"^batch_size=0: a step needs at least one sample"),
    (60, "shard", r"^batch_size=60 x workers=2 = 120 samples a step, but there are 100"),
    (101, "independent", r"^batch_size=101, but there are 100 samples"),
    (8, "random", r"^sampling=random: must be one of shard, independent"),
])  # fmt: skip
def test_a_sampler_that_cannot_be_is_refused(batch_size, sampling, message):
    with pytest.raises(Refusal, match=message):
        worker().sampler(range(100), batch_size, sampling=sampling)


def test_every_worker_and_every_run_has_random_numbers_of_its_own():
    seeds = [seed_of(seed, rank) for seed in (0, 1, 2**62) for rank in range(64)]
    assert len(set(seeds)) == len(seeds)
    draws = {tuple(LoopWorker(rank, 2, Nobody(), 0).generator.get_state()[:9].tolist()) for rank in range(2)}  # type: ignore[arg-type]
    assert len(draws) == 2


@pytest.mark.parametrize("options, message", [
    ({"shuffle": False}, r"^shuffle=False or drop_last=False: a worker's loader shuffles"),
    ({"drop_last": False}, r"^shuffle=False or drop_last=False"),
    ({"sampler": [1]}, r"^sampler: a worker's loader has its own; leave it out"),
])  # fmt: skip
def test_a_loader_has_an_order_of_its_own(options, message):
    with pytest.raises(Refusal, match=message):
        worker().loader(range(100), 8, **options)
    assert len(worker().loader(range(100), 8, shuffle=True, drop_last=True)) == 6
