"""Rules over the user's optimizer: equal to the built-in rules and to sequential references, whatever the loop does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from easgd_local.attachment import plain_model
from easgd_local.child import Refusal
from easgd_local.faults import Fault
from easgd_local.flat import Flat
from easgd_local.rules.base import Rule
from easgd_local.rules.diloco import DiLoCo
from easgd_local.rules.downpour import ADownpour, Downpour, MVADownpour
from easgd_local.rules.easgd import EASGD
from easgd_local.rules.easgd_gs import EASGDGaussSeidel
from easgd_local.rules.easgd_sync import EASGDSync
from easgd_local.rules.localsgd import LocalSGD
from easgd_local.rules.sma import SMA
from easgd_local.turns import owner
from tests import threads
from tests.loop_threads import BLOCK_BYTES, Net, Team, loss_of, plain_step, seeded

LR = 2.0**-4  # a power of two: ηg is exact, so that torch's fused multiply-add rounds as two operations do
Bits = np.ndarray


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def nesterov(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)


class Orthogonal(torch.optim.Optimizer):
    """Like Muon: the step of a matrix is its gradient made orthogonal, so no coordinate has a step of its own."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                g = p.grad
                if g.ndim == 2:
                    u, _, vh = torch.linalg.svd(g, full_matrices=False)
                    g = u @ vh
                p.add_(g, alpha=-group["lr"])


def orthogonal(model: nn.Module) -> torch.optim.Optimizer:
    return Orthogonal(model.parameters(), 0.02)


def gradient(i: int, t: int, x: np.ndarray) -> np.ndarray:
    """g at x on the minibatch of (i, t), as the listings want it."""
    model = Net()
    flat = Flat(model)
    flat.bind(x.copy())
    loss_of(model, i, t).backward()
    g = np.zeros_like(x)
    for entry, parameter in zip(flat.entries, model.parameters(), strict=True):
        g[entry.start : entry.stop] = parameter.grad.numpy().ravel()
    return g


@pytest.mark.parametrize("workers, steps, rule", [
    (1, 5, EASGD(lr=LR, tau=1, alpha=0.5)),
    (3, 10, EASGD(lr=LR, tau=1, beta=0.9)),
    (3, 10, EASGD(lr=LR, tau=3, alpha=0.25)),
    (2, 9, EASGD(lr=LR, tau=2, rho=4.0)),
    (3, 10, EASGDSync(lr=LR, tau=3, alpha=0.25)),
    (3, 10, EASGDGaussSeidel(lr=LR, tau=3, alpha=0.25)),
    (3, 10, LocalSGD(lr=LR, tau=3)),
    (3, 10, DiLoCo(lr=LR, tau=3, inner="sgd")),
])  # fmt: skip
def test_over_sgd_a_rule_equals_the_built_in_one_on_the_same_batches(workers, steps, rule):
    start = Flat(seeded(Net, 0)).values()
    expected = threads.train(rule, workers, steps, gradient, start=start, block_bytes=BLOCK_BYTES)
    with Team.of(rule, workers, sgd) as team:
        team.run(steps)
        assert np.array_equal(team.c, expected.c)
        for i in range(workers):
            assert np.array_equal(team.x(i), expected.x[i])


class Reference:
    """The algorithm worker by worker and block by block in one thread, over torch's own optimizer."""

    def __init__(self, rule: Rule, workers: int, optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        self.models = [seeded(Net, 0) for _ in range(workers)]
        self.optimizers = [optimizer(model) for model in self.models]
        flats = [Flat(model) for model in self.models]
        self.x = [flat.values() for flat in flats]
        self.c, self.shared = self.x[0].copy(), {}
        for flat, x in zip(flats, self.x, strict=True):
            flat.bind(x)
        n, p = len(self.c), workers
        with Team.of(rule, workers, optimizer) as team:
            layout = team.center.layout
        self.blocks = [layout.block(b) for b in range(layout.blocks)]
        self.order = [[owner(b, s, p, layout.blocks) for s in range(p)] for b in range(layout.blocks)]
        self.y = [self.c.copy() for _ in range(p)]
        self.u, self.z, self.updates = np.zeros(n, np.float32), self.c.copy(), 0

    def step(self, i: int, t: int) -> None:
        self.optimizers[i].zero_grad()
        loss_of(self.models[i], i, t).backward()

    def move(self, i: int) -> None:
        self.optimizers[i].step()


@pytest.mark.parametrize("optimizer", [sgd, adamw, nesterov, orthogonal])
@pytest.mark.parametrize("tau", [1, 3])
def test_easgd_over_any_optimizer_equals_the_sequential_algorithm(optimizer, tau):
    workers, steps, alpha = 3, 8, np.float32(0.3)
    ref = Reference(EASGD(tau=tau, alpha=0.3), workers, optimizer)
    for t in range(steps):
        for i in range(workers):
            ref.step(i, t)  # g at the x before the pull
        if t % tau == 0:
            for block, order in zip(ref.blocks, ref.order, strict=True):
                for i in order:
                    d = alpha * (ref.x[i][block] - ref.c[block])
                    ref.c[block] += d
                    ref.x[i][block] -= d
        for i in range(workers):
            ref.move(i)
    with Team.of(EASGD(tau=tau, alpha=0.3), workers, optimizer) as team:
        team.run(steps)
        assert np.array_equal(team.c, ref.c)
        assert all(np.array_equal(team.x(i), ref.x[i]) for i in range(workers))


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("rule", [Downpour(tau=2), ADownpour(tau=1), MVADownpour(tau=2, average_rate=0.25)])
def test_downpour_pushes_what_the_optimizer_has_moved_since_the_last_exchange(rule, optimizer):
    workers, steps = 3, 6
    ref = Reference(rule, workers, optimizer)
    for t in range(1, steps + 1):
        for i in range(workers):
            ref.step(i, t - 1)
            ref.move(i)
        if t % rule.tau == 0:
            for block, order in zip(ref.blocks, ref.order, strict=True):
                for k, i in enumerate(order):
                    ref.c[block] += ref.x[i][block] - ref.y[i][block]
                    ref.x[i][block] = ref.y[i][block] = ref.c[block]
                    update = (t // rule.tau - 1) * workers + k + 1
                    a = np.float32(rule.rate(update)) if rule.reported == "z" else np.float32(0)
                    ref.z[block] = (np.float32(1) - a) * ref.z[block] + a * ref.c[block]
    with Team.of(rule, workers, optimizer) as team:
        team.run(steps)
        assert np.array_equal(team.center.vectors["c"], ref.c)
        assert np.array_equal(team.c, ref.z if rule.reported == "z" else ref.c)


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_sma_moves_the_center_by_the_sum_of_the_differences_with_momentum(optimizer):
    workers, steps, rule = 3, 6, SMA(tau=2, center_momentum=0.5)
    ref = Reference(rule, workers, optimizer)
    for t in range(steps):
        for i in range(workers):
            ref.step(i, t)
        if t % 2 == 0:
            ds = [np.float32(1 / 3) * (x - ref.c) for x in ref.x]
            s = np.zeros_like(ref.c)
            for d, x in zip(ds, ref.x, strict=True):
                s += d
                x -= d
            ref.u[:] = np.float32(0.5) * ref.u + s
            ref.c += ref.u
        for i in range(workers):
            ref.move(i)
    with Team.of(rule, workers, optimizer) as team:
        team.run(steps)
        assert np.array_equal(team.c, ref.c)
        assert all(np.array_equal(team.x(i), ref.x[i]) for i in range(workers))


@pytest.mark.parametrize("rule", [LocalSGD(tau=3), DiLoCo(tau=3)])
def test_a_rule_that_replaces_x_does_so_right_after_the_step_that_ends_the_period(rule):
    with Team.of(rule, 3, adamw) as team:
        team.run(3)
        assert all(np.array_equal(team.x(i), team.c) for i in range(3))
        team.run(1)
        assert not any(np.array_equal(team.x(i), team.c) for i in range(3))


# What loops do


def test_gradients_accumulated_over_several_batches_are_one_step():
    def accumulate(team, i, t):
        team.optimizers[i][0].zero_grad()
        for part in range(3):
            (loss_of(team.models[i], i, 3 * t + part) / 3).backward()
        nn.utils.clip_grad_norm_(team.models[i].parameters(), 0.5)
        team.optimizers[i][0].step()

    with Team.of(EASGD(tau=2), 2, adamw) as team:
        team.run(5, accumulate)
        assert [one.t for one in team.workers] == [5, 5]
        assert [one._exchanges for one in team.workers] == [3, 3]


def test_with_several_optimizers_a_step_is_made_when_each_has_stepped():
    def two(model):
        body = model.body
        return torch.optim.SGD(body[0].parameters(), lr=0.1), torch.optim.AdamW(body[2].parameters(), lr=0.01)

    def step(team, i, t):
        one, other = team.optimizers[i]
        one.zero_grad()
        other.zero_grad()
        loss_of(team.models[i], i, t).backward()
        one.step()
        assert team.workers[i].t == t
        one.step()  # a discriminator that steps more often
        assert team.workers[i].t == t
        other.step()
        assert team.workers[i].t == t + 1

    with Team.of(EASGD(tau=1), 2, two) as team:
        team.run(4, step)
        assert [one._exchanges for one in team.workers] == [4, 4]


@pytest.mark.parametrize("fused", [False, True], ids=["the scaler skips", "the optimizer skips"])
def test_a_step_that_a_grad_scaler_skips_is_no_step(fused):
    scalers = {}

    def step(team, i, t):
        scaler = scalers.setdefault(i, torch.amp.GradScaler("cpu", init_scale=4.0))
        optimizer = team.optimizers[i][0]
        optimizer.zero_grad()
        loss = loss_of(team.models[i], i, t) * (float("inf") if t in (1, 2) else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    def make(model):
        return torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)

    with Team.of(EASGD(tau=2), 2, make) as team:
        before = [team.x(i) for i in range(2)]
        team.run(3, step)
        assert [one.t for one in team.workers] == [1, 1]
        assert [one._exchanges for one in team.workers] == [1, 1]
        assert all(np.isfinite(team.x(i)).all() and not np.array_equal(team.x(i), before[i]) for i in range(2))
        team.run(6, step)
        assert [one.t for one in team.workers] == [5, 5]


def test_an_optimizer_that_calls_a_closure_makes_one_step():
    def step(team, i, t):
        optimizer = team.optimizers[i][0]

        def closure():
            optimizer.zero_grad()
            loss = loss_of(team.models[i], i, t)
            loss.backward()
            return loss

        optimizer.step(closure)

    with Team.of(EASGD(tau=2), 2, lambda model: torch.optim.LBFGS(model.parameters(), max_iter=3)) as team:
        team.run(4, step)
        assert [one.t for one in team.workers] == [4, 4]


@pytest.mark.parametrize("state, kept", [("local", True), ("reset", False)])
def test_the_optimizers_state_stays_over_an_exchange_or_is_forgotten(state, kept):
    with Team.of(LocalSGD(tau=2), 2, adamw, optimizer_state=state) as team:
        team.run(2)
        assert bool(team.optimizers[0][0].state) is kept
        team.run(1)
        assert len(team.optimizers[0][0].state) == 4


def test_parameter_groups_keep_step_sizes_of_their_own():
    def groups(model):
        still, moving = {"params": model.body[0].parameters(), "lr": 0.0}, {"params": model.body[2].parameters()}
        return torch.optim.SGD([still, moving], lr=0.1)

    with Team.of(EASGD(tau=1, alpha=0.0), 1, groups) as team:
        before = team.models[0].body[0].weight.detach().clone()
        team.run(3)
        assert torch.equal(team.models[0].body[0].weight, before)


# The model


class Everything(nn.Module):
    """BatchNorm, tied weights, a frozen layer, an unused head, a mask that is not finite, a count."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)
        self.norm = nn.BatchNorm1d(5)
        self.again = nn.Linear(5, 5)
        self.again.weight = self.inner.weight
        self.frozen = nn.Linear(5, 3).requires_grad_(False)
        self.unused = nn.Linear(3, 2)
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.count += 1
        return self.frozen(self.again(self.norm(torch.tanh(self.inner(x)))))


def used(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


@pytest.mark.parametrize("rule", [EASGD(tau=2), LocalSGD(tau=2)])
def test_a_model_of_every_sort_trains_and_its_tensors_stay_the_same_objects(rule):
    with Team.of(rule, 2, used, Everything) as team:
        references = [dict(model.named_parameters(remove_duplicate=False)) for model in team.models]
        frozen = team.models[0].frozen.weight.clone()
        team.run(5)
        for model, tensors in zip(team.models, references, strict=True):
            assert all(one is tensors[name] for name, one in model.named_parameters(remove_duplicate=False))
            assert model.again.weight is model.inner.weight
        assert torch.equal(team.models[1].frozen.weight, frozen)
        center = team.workers[0].center_model()
        plain = Everything()
        plain.load_state_dict(center.state_dict(), strict=True)
        assert not team.posts[0] or all(post[1] != "nonfinite" for post in team.posts[0])


@pytest.mark.parametrize("buffers", ["average", "local"])
def test_batch_norm_statistics_are_averaged_or_left_alone(buffers):
    with Team.of(EASGD(tau=1), 2, used, Everything, buffers=buffers) as team:
        team.run(4)
        means = [team.models[i].norm.running_mean.clone() for i in range(2)]
        center = team.workers[0].center_model().norm.running_mean
        if buffers == "local":
            assert not torch.equal(means[0], means[1])
            assert torch.equal(center, means[0])  # worker 0's
        else:
            assert any(torch.equal(center, mean) for mean in means)  # the last visitor took the center's over
        assert [int(model.norm.num_batches_tracked) for model in team.models] == [4, 4]
        assert [int(model.count) for model in team.models] == [4, 4]


def test_an_evaluation_sees_weights_and_statistics_of_the_snapshot_not_of_the_center_as_it_is_now():
    with Team.of(EASGD(tau=1), 2, used, Everything) as team:
        team.run(3)
        team.center.take_whole_snapshot()
        snapshot = team.center.snapshot["c"].copy()
        team.center.vectors["c"][:] = 7.0  # workers that are ahead
        one = team.workers[0]
        seen = []
        object.__setattr__(one._attachment, "evaluate", lambda model: seen.append(one._flat.of(model).values()) or {})
        one._evaluate(3)
        assert np.array_equal(seen[0], snapshot)


def test_the_center_model_is_a_copy_in_evaluation_mode():
    with Team.of(EASGD(tau=1, alpha=0.5), 2, used, Everything) as team:
        team.run(3)
        before, center = team.x(0), team.workers[0].center_model()
        assert not center.training and team.models[0].training
        with torch.no_grad():
            for parameter in center.parameters():
                parameter.zero_()
        assert np.array_equal(team.x(0), before)


# What goes wrong


def test_values_that_are_not_finite_stay_out_of_the_center():
    with Team.of(EASGD(tau=2), 2, adamw, faults=(Fault("nan", 1, 2),)) as team:
        team.run(6)
        assert np.isfinite(team.c).all() and all(np.isfinite(team.x(i)).all() for i in range(2))
        assert [post[1] for post in team.posts[1] if post[0] == "event"] == ["nonfinite"]
        states = team.optimizers[1][0].state.values()
        assert states and all(torch.isfinite(value).all() for state in states for value in state.values())


def replace_module(model):
    model.body[2] = nn.Linear(7, 3)


def replace_data(model):
    model.body[0].weight.data = model.body[0].weight.data.clone()


def change_type(model):
    model.double()


@pytest.mark.parametrize("change, name", [(replace_module, "body.2.weight"), (replace_data, "body.0.weight"),
                                          (change_type, "body.0.weight")])  # fmt: skip
def test_parameters_replaced_after_attach_are_noticed_at_the_next_step(change, name):
    with Team.of(EASGD(tau=1), 1, sgd) as team:
        team.run(1)
        for parameter in team.models[0].parameters():
            parameter.grad = torch.zeros_like(parameter)
        change(team.models[0])
        with pytest.raises(Refusal, match=rf"^{name}: was replaced after attach.*or copy values in place"):
            team.optimizers[0][0].step()


def test_values_copied_in_place_are_no_replacement():
    with Team.of(EASGD(tau=1), 1, sgd) as team:
        team.run(1)
        team.models[0].load_state_dict(Net().state_dict())
        team.run(1)


def test_once_released_the_model_keeps_its_values_whatever_becomes_of_the_workers_memory():
    with Team.of(EASGD(tau=1), 1, sgd) as team:
        (one,), (model,) = team.run(2).workers, team.models
        values = Flat(model).values()
        one.release()
        one.x[:] = np.nan
        assert np.array_equal(Flat(model).values(), values)
        plain_step(team, 0, 2)
        assert one.t == 2 and not np.array_equal(Flat(model).values(), values)


# Between two steps


def test_k_steps_saved_and_restored_and_k_more_are_2k_steps():
    def dropping(model):
        return torch.optim.AdamW(model.parameters(), lr=0.01)

    with Team.of(EASGD(tau=3), 1, dropping) as whole, Team.of(EASGD(tau=3), 1, dropping) as half:
        whole.run(8)
        half.run(4)
        state, center, expected = half.workers[0].state(), half.c, (whole.x(0), whole.c)
    with Team.of(EASGD(tau=3), 1, dropping) as rest:
        one = rest.workers[0]
        one.restore(state)
        one.t = 4
        rest.center.vectors["c"][:] = center
        rest.run(4, lambda team, i, t: plain_step(team, i, t + 4))
        assert np.array_equal(rest.x(0), expected[0]) and np.array_equal(rest.c, expected[1])


# Models as people build them


def convolutional() -> nn.Module:
    body = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return nn.Sequential(*body).to(memory_format=torch.channels_last)


def normed() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(5, 7)), nn.Tanh(), spectral_norm(nn.Linear(7, 3)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(5, 6, num_layers=2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.cells(x[:, None])[0][:, 0])


class Checkpointed(Net):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)


class InHalf(Net):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.body(x).float()


class WithNothing(Net):
    def __init__(self) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(0, 3))


class Thawing(Net):
    """Its first layer is frozen for two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.body[0].requires_grad_(False)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 2:
            self.body[0].requires_grad_(True)
        return self.body(x)


MODELS = (convolutional, normed, Recurrent, Checkpointed, InHalf, WithNothing, Thawing)


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("rule", [EASGD(tau=2), Downpour(tau=2)], ids=["easgd", "downpour"])
def test_it_trains_as_without_attach_and_its_center_loads_into_the_plain_model(rule, make):
    inputs = torch.randn(6, 1, 8, 8) if make is convolutional else torch.randn(6, 5)

    def steps(model, count):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        yield optimizer
        for _ in range(count):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()

    alone = list(steps(plain := seeded(make, 0), 5)) and plain
    loops = {}

    def begin(model):
        loops[0] = steps(model, 5)
        return next(loops[0])

    alone_rule = replace(rule, alpha=0.0) if isinstance(rule, EASGD) else rule  # of one worker: both change nothing
    with Team.of(alone_rule, 1, begin, make, buffers="local") as team:
        assert list(loops[0]) == []
        (one,) = team.models
        assert [p.stride() for p in one.parameters()] == [p.stride() for p in alone.parameters()]
        for (name, value), expected in zip(one.named_parameters(), alone.parameters(), strict=True):
            assert torch.allclose(value, expected, rtol=0, atol=1e-6), name  # DOWNPOUR rounds x - y + y
        fresh = make()
        fresh.load_state_dict(team.workers[0].center_model().state_dict(), strict=True)


def test_a_step_that_is_recorded_in_a_cuda_graph_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with Team.of(EASGD(tau=1), 1, adamw) as team:
        monkeypatch.setattr(team.workers[0]._place, "device", torch.device("cuda"))
        loss_of(team.models[0], 0, 0).backward()
        with pytest.raises(Refusal, match=r"CUDA graph, .*; record forward and backward only"):
            team.optimizers[0][0].step()


@pytest.mark.parametrize("first", ["compile", "attach"])
def test_a_compiled_model_is_attached_before_or_after_under_its_own_names(first):
    model = Net()
    if first == "compile":
        compiled = torch.compile(model, backend="eager")
        assert next(name for name, _ in plain_model(compiled).named_parameters()) == "body.0.weight"
    with Team.of(EASGD(tau=1), 1, adamw, lambda: model) as team:
        if first == "attach":
            compiled = torch.compile(model, backend="eager")
        for t in range(3):
            team.optimizers[0][0].zero_grad()
            loss_of(compiled, 0, t).backward()
            team.optimizers[0][0].step()
        assert team.workers[0].t == 3 and team.workers[0]._exchanges == 3
        Net().load_state_dict(team.workers[0].center_model().state_dict(), strict=True)
