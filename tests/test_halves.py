"""Parameters in half precision: the model computes with x rounded, and nothing else is rounded."""

from __future__ import annotations

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from easgd_local import evaluate
from easgd_local.backend.cpu import CpuOps, vector
from easgd_local.child import Refusal
from easgd_local.computing import Computing
from easgd_local.flat import Flat
from easgd_local.gradient import Gradient
from easgd_local.halves import TYPES, narrow
from easgd_local.rules.diloco import DiLoCo
from easgd_local.rules.easgd import EASGD
from easgd_local.rules.localsgd import LocalSGD
from tests import threads
from tests.loop_threads import BLOCK_BYTES, Net, Team, batch, seeded
from tests.test_attached import LR, adamw, nesterov, sgd
from tests.test_flat import Small
from tests.test_gradient import BATCH_SIZE, RANK, SEED, build, data, gradient_of, one_thread, start  # noqa: F401

BITS = {torch.bfloat16: 8, torch.float16: 11}


class Half(Net):
    """The network of the loops in bfloat16, from float32 inputs to float32 answers."""

    def __init__(self) -> None:
        super().__init__()
        self.to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x.to(torch.bfloat16)).float()


class MixedNet(Half):
    """Its last layer in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.body[2].float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body[2](self.body[:2](x.to(torch.bfloat16)).float())


def loss_of(model: nn.Module, i: int, t: int) -> torch.Tensor:
    inputs, targets = batch(i, t)
    return F.mse_loss(model(inputs), targets)


def step(team: Team, i: int, t: int) -> None:
    (optimizer,) = team.optimizers[i]
    optimizer.zero_grad()
    loss_of(team.models[i], i, t).backward()
    optimizer.step()


def gradient(make: type[nn.Module]) -> threads.paper.Gradient:
    """(i, t, x) -> the gradient of a network of its own whose parameters are x rounded, widened."""

    def g_of(i: int, t: int, x: np.ndarray) -> np.ndarray:
        model, g = make(), np.zeros_like(x)
        entries = Flat(model).entries
        with torch.no_grad():
            for entry, parameter in zip(entries, model.parameters(), strict=True):
                parameter.copy_(entry.of(torch.from_numpy(x)))
        loss_of(model, i, t).backward()
        for entry, parameter in zip(entries, model.parameters(), strict=True):
            g[entry.start : entry.stop] = parameter.grad.float().numpy().ravel()
        return g

    return g_of


# The vector


@pytest.mark.parametrize("kind", TYPES)
def test_parameters_are_x_rounded_to_the_nearest_and_to_even_on_a_tie(kind):
    model = nn.Linear(5, 1, bias=False).to(kind)
    flat, unit = Flat(model), 2.0 ** (1 - BITS[kind])
    x = vector(flat.n)
    flat.bind(x)
    x[:5] = [1 + 0.5 * unit, 1 + 1.5 * unit, 1 + 0.51 * unit, -1 - 0.49 * unit, 3]
    assert model.weight.flatten().tolist() == [0] * 5  # x has moved, the model computes with the old values
    flat.halves.round()
    assert model.weight.flatten().tolist() == [1, 1 + 2 * unit, 1 + unit, -1, 3]
    assert x[0] == 1 + 0.5 * unit


def test_a_model_in_half_has_the_coordinates_of_the_same_in_float32():
    full = Flat(Small())
    half = Flat(narrow(Small(), torch.bfloat16))
    assert half.entries == full.entries and half.n == full.n and half.parameters == full.parameters
    assert np.abs(half.values() - full.values()).max() <= 2.0**-9 * np.abs(full.values()).max()
    state = half.state_dict(full.values())
    assert all(torch.equal(state[name], value) for name, value in Small().state_dict().items())  # x, not its rounding
    Small().to(torch.bfloat16).load_state_dict(state)


def test_modules_with_running_statistics_stay_in_float32():
    model = narrow(Small(), torch.float16)
    kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {name for name, kind in kinds.items() if kind == torch.float32} == {
        "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
    }  # fmt: skip
    flat = Flat(model)
    x = vector(flat.n)
    x[:] = flat.values()
    flat.bind(x)
    model.norm.weight.data.fill_(2.0)  # in the memory of x
    assert set(x[[e.start for e in flat.entries if e.name == "norm.weight"]]) == {2.0}


def test_gradients_of_both_types_meet_in_g_and_do_not_pile_up():
    model = MixedNet()
    flat = Flat(model)
    x, g = vector(flat.n), vector(flat.n)
    x[:] = flat.values()
    flat.bind(x)
    flat.bind_gradients(g)
    for t in range(2):
        g[:] = 0
        loss_of(model, 0, t).backward()
        flat.halves.collect()
        assert np.array_equal(g, gradient(MixedNet)(0, t, x))


def test_two_half_precisions_in_one_model_are_refused():
    model = nn.Sequential(nn.Linear(3, 3).to(torch.bfloat16), nn.Linear(3, 3).half())
    message = r"^1\.weight has dtype torch\.float16 and 0\.weight torch\.bfloat16: .* choose one of them"
    with pytest.raises(ValueError, match=message):
        Flat(model)


def test_running_statistics_in_half_precision_are_refused():
    with pytest.raises(ValueError, match=r"^norm\.running_mean has dtype torch\.float16, .* the BatchNorm1d in fl"):
        Flat(Small().half())


@pytest.mark.parametrize("change", [
    lambda model: model.float(), lambda model: setattr(model.weight, "data", model.weight.data.clone()),
])  # fmt: skip
def test_what_no_longer_lies_among_the_rounded_numbers_is_named(change):
    model = nn.Linear(3, 3).half()
    flat = Flat(model)
    flat.bind(vector(flat.n))
    assert flat.strayed(vector(flat.n)) is None
    change(model)
    assert flat.strayed(vector(flat.n)) == "weight"


# The built-in training loop


@pytest.mark.parametrize("name", ["cifar7", "norms"])
def test_the_gradient_is_that_of_the_plain_model_with_rounded_parameters(name, one_thread):  # noqa: F811
    gradient_in_half, x = gradient_of(name, computing=Computing("bf16-true"), weight_decay=0.0), start(name)
    g = gradient_in_half(CpuOps(), 2, x.copy())
    model, dataset = build(name)
    narrow(model, torch.bfloat16)
    sampler = data.shard(SEED, RANK, 3, BATCH_SIZE, len(dataset.train))
    pictures, labels = next(dataset.train.stream(data.order(sampler, 2)))
    rng = data.step_rng(SEED, RANK, 2)
    inputs = torch.from_numpy(data.prepare(pictures, dataset, rng)).to(torch.bfloat16)
    torch.manual_seed(int(rng.integers(2**62)))
    loss = F.cross_entropy(model.train()(inputs).float(), torch.from_numpy(labels))
    loss.backward()
    assert gradient_in_half.loss == loss.item()
    flat = gradient_in_half.flat
    for entry, layer in zip(flat.entries, flat.layers, strict=False):  # what follows the layers is not trained
        parameter = model.get_parameter(entry.name)
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert np.array_equal(g[layer], expected.float().numpy().ravel()), entry.name


def test_weight_decay_is_of_x_and_not_of_its_rounding():
    x = start("mlp")
    without, decayed = (gradient_of("mlp", computing=Computing("bf16-true"), weight_decay=one) for one in (0, 0.5))
    g = without(CpuOps(), 2, x).copy()
    assert np.array_equal(decayed(CpuOps(), 2, x), g + np.float32(0.5) * x)


def test_part_of_the_gradient_is_that_slice_of_it():
    x, made = start("cifar7"), gradient_of("cifar7", computing=Computing("bf16-true"), weight_decay=0.0)
    whole = made(CpuOps(), 2, x).copy()
    part = slice(made.layers[2].start, made.layers[5].stop)
    g = made(CpuOps(), 2, x, part)
    assert np.array_equal(g[part], whole[part]) and g[part].any()
    assert not g[: part.start].any() and not g[part.stop :].any()


def test_the_evaluation_is_of_the_rounded_model():
    model, dataset = build("cifar7")
    computing = Computing("bf16-true")
    scores = evaluate.evaluate(computing.narrowed(model), dataset, samples=50, computing=computing)
    twin = build("cifar7")[0]
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).float())
    full = evaluate.evaluate(twin, dataset, samples=50)
    assert scores != full and scores.train_loss == pytest.approx(full.train_loss, rel=2.0**-6)


def test_float16_scales_its_loss_so_that_small_gradients_lose_no_digits():
    model, dataset = build("mlp")
    sampler = data.shard(SEED, RANK, 3, BATCH_SIZE, len(dataset.train))
    made = Gradient(model, dataset, sampler, rank=RANK, weight_decay=0.0, computing=Computing("fp16-true"))
    x, reference = start("mlp"), gradient_of("mlp", weight_decay=0.0)(CpuOps(), 2, start("mlp"))
    without = made(CpuOps(), 2, x).copy()
    made.loss_scale = vector(2)
    scaled = made(CpuOps(), 2, x)
    assert np.linalg.norm(scaled - reference) <= 24 * 2.0**-11 * np.linalg.norm(reference)
    lost, left = (np.modf(g * np.float32(2.0**24))[0].any() for g in (without, scaled))  # in units of the smallest
    assert left and not lost


# Loops of one's own


@pytest.mark.parametrize("make", [Half, MixedNet])
@pytest.mark.parametrize("rule", [
    EASGD(lr=LR, tau=2, beta=0.9), LocalSGD(lr=LR, tau=3), DiLoCo(lr=LR, tau=3, inner="sgd"),
], ids=["easgd", "local-sgd", "diloco"])  # fmt: skip
def test_the_optimizer_moves_x_in_float32_with_the_widened_gradient(make, rule):
    start = Flat(seeded(make, 0)).values()
    expected = threads.train(rule, 3, 8, gradient(make), start=start, block_bytes=BLOCK_BYTES)
    with Team.of(rule, 3, sgd, make) as team:
        team.run(8, step)
        assert np.array_equal(team.c, expected.c)
        for i in range(3):
            assert np.array_equal(team.x(i), expected.x[i])
            rounded = Flat(team.models[i]).values()
            assert all(
                np.array_equal(
                    rounded[entry.start : entry.stop],
                    torch.from_numpy(team.x(i)[entry.start : entry.stop]).to(parameter.dtype).float().numpy(),
                )
                for entry, parameter in zip(Flat(team.models[i]).entries, team.models[i].parameters(), strict=True)
            )


def test_steps_too_small_for_the_parameters_add_up():
    def slow(model):
        return torch.optim.SGD(model.parameters(), lr=2.0**-12)

    alone = Half()
    nn.init.ones_(alone.body[0].weight)
    optimizer = slow(alone)
    with Team.of(EASGD(tau=1, alpha=0.0), 1, slow, Half) as team:
        (model,) = team.models
        nn.init.ones_(model.body[0].weight)
        team.workers[0].x[: model.body[0].weight.numel()] = 1
        for one, its in ((model, team.optimizers[0][0]), (alone, optimizer)):
            for _ in range(2**6):
                one.body[0].weight.grad = torch.ones_like(one.body[0].weight)
                its.step()
        assert set(alone.body[0].weight.flatten().tolist()) == {1.0}
        assert set(model.body[0].weight.flatten().tolist()) == {1 - 2.0**-6}


@pytest.mark.parametrize("optimizer", [adamw, nesterov])
def test_the_state_of_the_optimizer_is_float32_and_comes_back_to_the_same_bits(optimizer):
    with Team.of(EASGD(tau=3), 1, optimizer, Half) as whole, Team.of(EASGD(tau=3), 1, optimizer, Half) as half:
        whole.run(8, step)
        half.run(4, step)
        state, center, expected = half.workers[0].state(), half.c, (whole.x(0), whole.c)
    (saved,) = state["optimizers"]
    kinds = {value.dtype for one in saved["state"].values() for value in one.values() if value is not None}
    assert kinds == {torch.float32}
    with Team.of(EASGD(tau=3), 1, optimizer, Half) as rest:
        (one,) = rest.workers
        one.restore(state)
        one.t = 4
        rest.center.vectors["c"][:] = center
        rest.run(4, lambda team, i, t: step(team, i, t + 4))
        assert np.array_equal(rest.x(0), expected[0]) and np.array_equal(rest.c, expected[1])


def test_state_that_the_optimizer_has_from_before_the_attach_goes_on_in_float32():
    def stepped(model):
        optimizer = nesterov(model)
        loss_of(model, 0, 0).backward()
        optimizer.step()
        assert {one["momentum_buffer"].dtype for one in optimizer.state.values()} == {torch.bfloat16}
        return optimizer

    with Team.of(EASGD(tau=1), 1, stepped, Half) as team:
        team.run(2, step)
        states = team.optimizers[0][0].state.values()
        assert {one["momentum_buffer"].dtype for one in states} == {torch.float32}


def test_between_steps_parameters_and_gradients_are_as_the_loop_made_them():
    with Team.of(EASGD(tau=1), 1, adamw, Half) as team:
        (model,), ((optimizer,),) = team.models, team.optimizers
        for t in range(3):
            loss_of(model, 0, t).backward()
            before = [parameter.grad for parameter in model.parameters()]
            optimizer.step()
            assert all(one.grad is its for one, its in zip(model.parameters(), before, strict=True))
            assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
            optimizer.zero_grad(set_to_none=t == 1)


def test_two_optimizers_that_step_in_turn_leave_the_rest_in_half():
    def two(model):
        return sgd(model.body[0]), sgd(model.body[2])

    with Team.of(EASGD(tau=1), 1, two, Half) as team:
        (model,), ((first, second),) = team.models, team.optimizers
        for t in range(2):
            for optimizer in (first, second):
                loss_of(model, 0, t).backward()
                optimizer.step()
        assert team.workers[0].t == 2


def test_what_the_loop_writes_to_parameters_is_not_lost():
    """Clipped weights, values loaded in mid-run, an average that follows the weights inside the model."""
    with Team.of(EASGD(tau=2, alpha=0.0), 1, sgd, MixedNet) as team:
        (model,), (one,) = team.models, team.workers
        places = {entry.name: slice(entry.start, entry.stop) for entry in Flat(model).entries}
        for t in range(3):
            step(team, 0, t)
            before = team.x(0)
            with torch.no_grad():
                model.body[0].weight.clamp_(-0.25, 0.25)  # numbers that bfloat16 has
            step_without_gradient(team)
            clipped = places["body.0.weight"]
            expected = np.where(np.abs(before[clipped]) > 0.25, np.copysign(np.float32(0.25), before[clipped]), 0)
            found = team.x(0)
            assert np.array_equal(found[clipped][expected != 0], expected[expected != 0]) and (expected != 0).any()
            # What is not written to keeps all its digits.
            assert np.array_equal(found[clipped][expected == 0], before[clipped][expected == 0])
            assert np.array_equal(found[places["body.2.weight"]], before[places["body.2.weight"]])
        state = {name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()}
        model.load_state_dict(state)
        x = one.state()["kept"]["x"]
        assert all(set(x[place].tolist()) == {0.5} for place in places.values())


def step_without_gradient(team: Team) -> None:
    for parameter in team.models[0].parameters():
        parameter.grad = None
    team.optimizers[0][0].step()


@pytest.mark.parametrize("optimizer", [adamw, nesterov])
def test_a_state_loaded_into_the_optimizer_between_steps_loses_no_digits(optimizer):
    with Team.of(EASGD(tau=3), 1, optimizer, Half) as plain, Team.of(EASGD(tau=3), 1, optimizer, Half) as team:
        plain.run(6, step)
        team.run(3, step)
        ((its,),) = team.optimizers
        its.load_state_dict(copy.deepcopy(its.state_dict()))
        team.run(3, lambda team, i, t: step(team, i, t + 3))
        assert np.array_equal(team.x(0), plain.x(0))


def test_a_step_that_a_grad_scaler_skips_leaves_everything_as_it_was():
    def fused(model):
        return torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    with Team.of(EASGD(tau=1), 1, fused, Half) as team:
        (model,), ((optimizer,),), before = team.models, team.optimizers, team.x(0)
        for t, factor in enumerate((torch.inf, 1.0)):
            optimizer.zero_grad()
            (scaler.scale(loss_of(model, 0, t)) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            assert team.workers[0].t == t and np.array_equal(team.x(0), before) == (t == 0)
            assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
        states = optimizer.state.values()
        assert {one[name].dtype for one in states for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}


class Failing(torch.optim.SGD):
    """Its second step ends by an exception."""

    calls = 0

    def step(self, closure=None):
        self.calls += 1
        if self.calls == 2:
            raise ArithmeticError
        return super().step(closure)


def test_after_an_exception_in_a_step_the_next_step_is_a_step():
    with Team.of(EASGD(tau=1, alpha=0.0), 1, lambda model: Failing(model.parameters(), lr=LR), Half) as team:
        for t in range(2):
            with pytest.raises(ArithmeticError) if t else contextlib.nullcontext():
                step(team, 0, t)
        team.workers[0].between_steps()  # where the loop asks for its next batch
        assert {one.dtype for one in team.models[0].parameters()} == {torch.bfloat16}
        before = team.x(0)
        step(team, 0, 2)
        assert team.workers[0].t == 2 and not np.array_equal(team.x(0), before)


class Derived(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


def test_a_step_within_the_step_of_a_derived_optimizer_is_the_same_step():
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # from here on torch calls the hooks for the base class too
    with (
        Team.of(EASGD(tau=1), 1, lambda model: Derived(model.parameters(), lr=LR), Half) as team,
        Team.of(EASGD(tau=1), 1, sgd, Half) as plain,
    ):
        (one,) = team.run(3, step).workers
        assert one.t == one._exchanges == 3
        assert np.array_equal(team.x(0), plain.run(3, step).x(0))


@pytest.mark.parametrize("set_to_none", [False, True])
def test_gradients_that_are_zeroed_within_a_step_stay_zero(set_to_none):
    class Zeroing(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.zero_grad(set_to_none)

    with Team.of(EASGD(tau=1), 1, lambda model: Zeroing(model.parameters(), lr=LR), Half) as team:
        step(team, 0, 0)
        grads = [one.grad for one in team.models[0].parameters()]
        assert all(one is None if set_to_none else not one.any() for one in grads)


def test_one_that_joins_computes_with_the_center_rounded():
    with Team.of(EASGD(tau=1), 1, sgd, Half) as team:
        team.center.vectors["c"][:] += 0.3
        team.workers[0].join(0)
        expected = torch.from_numpy(team.c[:35]).to(torch.bfloat16)
        assert torch.equal(team.models[0].body[0].weight.flatten(), expected)


def test_a_step_with_no_closure_said_is_a_step():
    with Team.of(EASGD(tau=1), 1, sgd, Half) as team:
        team.optimizers[0][0].step(None)
        assert team.workers[0].t == 1


def test_a_step_with_a_closure_is_refused():
    with Team.of(EASGD(tau=1), 1, sgd, Half) as team, pytest.raises(Refusal, match=r"^step\(closure\): parameters"):
        team.optimizers[0][0].step(lambda: loss_of(team.models[0], 0, 0))


def test_the_center_in_a_model_is_in_the_models_own_precision():
    with Team.of(EASGD(tau=1), 1, sgd, Half) as team:
        team.run(2, step)
        model = team.workers[0].center_model()
        assert {one.dtype for one in model.parameters()} == {torch.bfloat16}
        expected = torch.from_numpy(team.c[:35]).to(torch.bfloat16)
        assert torch.equal(model.body[0].weight.flatten(), expected)
