"""The curvature at the start: against whole Hessians and a quadratic, what has none, and what rules make of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from easgd_local import data, models
from easgd_local.config import Config
from easgd_local.curvature import largest_curvature, multiplications, start_curvature
from easgd_local.data import Dataset, shard
from easgd_local.prepare import prepare
from easgd_local.rules import RULES
from easgd_local.rules.eamsgd import EAMSGD
from easgd_local.rules.easgd import EASGD
from easgd_local.rules.easgd_gs import EASGDGaussSeidel
from easgd_local.rules.easgd_sync import EASGDSync
from easgd_local.rules.elastic import Elastic
from easgd_local.rules.sgd import SGD

ELASTIC = [name for name in RULES if issubclass(RULES[name], Elastic)]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.load("digits")


def estimate(model: nn.Module, digits: Dataset) -> float | None:
    return start_curvature(model, digits, shard(0, 0, 2, 32, len(digits.train)), 1e-4)


def perceptron(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return models.build("mlp", shape=(1, 8, 8), classes=10)


def test_on_a_quadratic_the_steps_find_the_largest_of_as_many_curvatures() -> None:
    h = torch.tensor([-7.0, 0.25, 0.5, 1.0, 3.0])
    x = nn.Parameter(torch.ones(5))
    assert largest_curvature((h * x * x).sum() / 2, [x]) == pytest.approx(3.0, rel=1e-5)  # not -7, the largest in size
    assert largest_curvature((h * x * x).sum() / 2, [x], steps=2) < 3.0  # from below
    still = nn.Parameter(torch.zeros(5))
    assert largest_curvature((h * still * still).sum() / 2, [still]) == 0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_of_a_network_it_is_the_whole_hessians_within_one_percent(seed: int) -> None:
    torch.manual_seed(seed)
    inputs, targets, sizes = torch.rand(31, 7), torch.randint(0, 4, (31,)), [35, 5, 20, 4]

    def loss(x: torch.Tensor) -> torch.Tensor:
        first, one, second, two = x.split(sizes)
        hidden = torch.tanh(F.linear(inputs, first.view(5, 7), one))
        return F.cross_entropy(F.linear(hidden, second.view(4, 5), two), targets)

    x = nn.Parameter(torch.randn(64) / 4)
    exact = np.linalg.eigvalsh(torch.autograd.functional.hessian(loss, x.detach()).numpy())[-1]
    assert 0.99 * exact <= largest_curvature(loss(x), [x]) <= exact * (1 + 1e-5)


def test_it_is_the_same_every_time_and_leaves_model_and_generator_alone(digits: Dataset) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.LayerNorm(9), nn.Dropout(0.5), nn.Linear(9, 10))
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    first = estimate(model, digits)
    assert first is not None and first > 0 and estimate(model, digits) == first
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and all(one.grad is None for one in model.parameters())


class Once(torch.autograd.Function):
    """The square, with a first derivative only."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return 2 * g * ctx.saved_tensors[0]


class Odd(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(64, 10), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.linear(x.flatten(1)))


@pytest.mark.parametrize("function", [Once.apply, lambda y: y * float("nan"), lambda y: 0 * y])
def test_what_has_no_second_derivative_or_no_finite_one_has_no_estimate(digits: Dataset, function: Any) -> None:
    model = Odd(function)
    h = estimate(model, digits)
    assert h is None or h == 1e-4  # the weight decay alone, where nothing bends


class Refusing(nn.Module):
    """A model that can be neither copied nor called."""

    def __init__(self, copies: bool) -> None:
        super().__init__()
        self.linear, self.copies = nn.Linear(64, 10), copies

    def __deepcopy__(self, memo: Any) -> nn.Module:
        if not self.copies:
            raise TypeError("cannot pickle this")
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise IndexError("no such batch")


@pytest.mark.parametrize("copies", [False, True])
def test_a_model_that_refuses_to_be_copied_or_called_has_no_estimate(digits: Dataset, copies: bool) -> None:
    assert estimate(Refusing(copies), digits) is None


def test_a_model_with_batchnorm_has_no_estimate(digits: Dataset) -> None:
    assert estimate(nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.BatchNorm1d(9), nn.Linear(9, 10)), digits) is None


def test_where_no_alpha_is_stable_the_step_size_alone_is_told() -> None:
    [assumed] = EASGD(lr=2.5).warnings(3)
    assert assumed == (
        "lr=2.5 is beyond 2, where steps of easgd begin to grow at curvature h = 1 (assumed): if the loss does not "
        "settle, lower lr."
    )
    [exactly] = EASGD(lr=0.5).warnings(3, 4.0)
    assert exactly.startswith("lr=0.5 is at 0.5, where steps of easgd begin to grow at curvature h = 4 (")


def test_work_is_counted_and_what_is_expensive_is_left_alone(digits: Dataset) -> None:
    assert multiplications(perceptron(0), (1, 8, 8)) == 64 * 128 + 128 * 64 + 64 * 10
    small = nn.Conv2d(3, 5, 3)
    assert multiplications(small, (3, 8, 8)) == 3 * 5 * 9 * 36
    assert estimate(nn.Sequential(nn.Flatten(), nn.Linear(64, 300_000), nn.Linear(300_000, 10)), digits) is None


# What rules make of it


@pytest.mark.parametrize("name", ELASTIC)
@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_the_defaults_warn_of_nothing_at_the_curvatures_of_the_digits(digits: Dataset, name: str, workers: int) -> None:
    curvatures = [estimate(perceptron(seed), digits) for seed in range(3)]
    for turns in RULES[name].orders:
        assert [RULES[name]().warnings(workers, h, turns) for h in curvatures] == [[], [], []]


@pytest.mark.parametrize("turns, limit", [("strict", 2 / 3), ("free", 2 / 3), ("none", 2 / 5)])
def test_the_bound_of_alpha_is_that_of_the_curvature_and_the_order_of_turns(turns: str, limit: float) -> None:
    """ηh = 1: (4 - 2)/(4 - 1) in exclusive turns; 2/(2 + p) with p = 3 where differences can be stale."""

    def make(alpha: float) -> EASGD:
        return EASGD(lr=0.25, alpha=alpha)

    assert make(limit - 1e-9).warnings(3, 4.0, turns) == []
    [sentence] = make(limit + 1e-9).warnings(3, 4.0, turns)
    assert f"= {limit:.4g} of easgd with turns={turns}" in sentence
    assert "curvature h = 4 (the largest of one" in sentence
    assert sentence.endswith("lower alpha or lr.")
    assert make(0.99).warnings(3, 0.001, "strict") == []  # where the loss is flat α may be large


def test_the_rendezvous_and_gauss_seidel_know_the_curvature_too() -> None:
    assert EASGDSync(lr=0.25, alpha=0.39).warnings(3, 4.0) == [] != EASGDSync(lr=0.25, alpha=0.41).warnings(3, 4.0)
    rule = EASGDGaussSeidel(lr=0.17, alpha=0.6)
    assert rule.spectral_radius(3, 10.0) == pytest.approx(EASGDGaussSeidel(lr=1.7, alpha=0.6).spectral_radius(3))
    assert rule.warnings(3, 0.1) == []


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_a_step_size_is_warned_about_from_where_a_worker_alone_grows(momentum: float) -> None:
    h, most = 4.0, EAMSGD(momentum=momentum).lr_limit(4.0)

    def radius(lr: float) -> float:
        q = 1 - lr * h  # (x, v) <- (x + v, v) after v <- δv - ηh(x + δv)
        return float(np.abs(np.linalg.eigvals([[q, momentum * q], [q - 1, momentum * q]])).max())

    assert radius(most * (1 - 1e-6)) < 1 < radius(most * (1 + 1e-6))
    assert EAMSGD(lr=most * 0.99, momentum=momentum, alpha=0.0).warnings(2, h) == []
    [sentence] = EAMSGD(lr=most * 1.01, momentum=momentum, alpha=0.0).warnings(2, h)
    assert f"is beyond {most:.3g}, where steps of eamsgd begin to grow at curvature h = 4" in sentence


def test_a_run_is_prepared_with_its_estimate_and_says_it(tmp_path: Path) -> None:
    told = [r"lr=100.0 is beyond 3\.\d+, .*curvature h = 0\.[56].* lower lr, or give a warmup\.$"]
    # The start says nothing of the end of a warmup.
    assumed = [r"lr=100.0 is beyond 2, .*curvature h = 1 \(assumed\): .* lower lr\.$"]
    large, usual = EASGD(lr=100.0), EASGD()
    cases = [(large, 0, told), (large, 5, assumed), (usual, 0, []), (SGD(), 0, [])]
    for number, (rule, warmup, said) in enumerate(cases):
        out = tmp_path / str(number)
        workers = 1 if rule.sequential else 2
        with prepare(Config(rule=rule, workers=workers, steps=50, warmup=warmup, out=str(out))) as prepared:
            assert len(prepared.warnings) == len(said) and all(map(re.match, said, prepared.warnings))
        effective = json.loads((out / "config.json").read_text())["effective"]
        assert ("curvature" in effective) == isinstance(rule, Elastic)
        assert effective.get("curvature", 0.6) == pytest.approx(0.6, abs=0.05)
