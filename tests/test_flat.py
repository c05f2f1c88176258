"""A model as one vector: views both ways, gradients, alignment, and what is refused."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from easgd_local.backend.cpu import vector
from easgd_local.flat import ALIGNMENT, Flat


class Small(nn.Module):
    """Odd shapes, tied weights, a frozen layer, BatchNorm, an unused head, a scalar, and buffers of every sort."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner = nn.Linear(5, 7)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.norm = nn.BatchNorm1d(7)
        self.outer = nn.Linear(7, 5, bias=False)
        self.again = nn.Linear(7, 5, bias=False)
        self.again.weight = self.outer.weight
        self.unused = nn.Linear(3, 11)
        self.scale = nn.Parameter(torch.tensor(1.25))
        self.register_buffer("table", torch.arange(3))
        self.register_buffer("passing", torch.full((2, 3), 0.5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.frozen(torch.tanh(self.inner(x))))
        return self.scale * (self.outer(h) + 2 * self.again(h * h))


TRAINED = "scale inner.weight inner.bias norm.weight norm.bias outer.weight unused.weight unused.bias".split()
FROZEN = ["frozen.weight", "frozen.bias"]
BUFFERS = ["norm.running_mean", "norm.running_var"]
LENGTHS = [1, 35, 7, 7, 7, 35, 33, 11, 49, 7, 7, 7]


def bound() -> tuple[Small, Flat, np.ndarray]:
    model = Small()
    flat = Flat(model)
    x = vector(flat.n)
    x[:] = flat.values()
    flat.bind(x)
    return model, flat, x


def inputs() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(5).standard_normal((13, 5), np.float32))


def gaps(flat: Flat) -> np.ndarray:
    """Where the vector belongs to no entry."""
    free = np.ones(flat.n, bool)
    for entry in flat.entries:
        free[entry.start : entry.stop] = False
    return free


# The entries


def test_trained_come_first_then_frozen_then_buffers_and_tied_weights_once():
    flat = Flat(Small())
    assert [entry.name for entry in flat.entries] == TRAINED + FROZEN + BUFFERS
    assert [entry.stop - entry.start for entry in flat.entries] == LENGTHS
    assert [entry.is_buffer for entry in flat.entries] == [False] * 10 + [True] * 2
    assert [entry.shape for entry in flat.entries[:2]] == [(), (7, 5)]


def test_entries_start_at_64_byte_lines_without_overlap():
    flat = Flat(Small())
    assert ALIGNMENT == 16 and flat.n % 16 == 0 and all(entry.start % 16 == 0 for entry in flat.entries)
    for before, after in pairwise(flat.entries):
        assert before.stop <= after.start < before.stop + 16
    assert flat.entries[-1].stop <= flat.n < flat.entries[-1].stop + 16


def test_the_parts_end_where_their_entries_end():
    flat = Flat(Small())
    by_name = {entry.name: entry for entry in flat.entries}
    assert flat.trainable == by_name["unused.bias"].stop
    assert flat.buffers == slice(by_name["norm.running_mean"].start, flat.n)
    assert flat.parameters == sum(LENGTHS[:10]) == sum(p.numel() for p in Small().parameters())


def test_a_model_without_buffers_has_an_empty_part_for_them():
    flat = Flat(nn.Linear(3, 3))
    assert flat.buffers == slice(flat.n, flat.n) and flat.n == 32


# Binding


def test_binding_the_models_own_values_changes_nothing():
    plain, (model, flat, x) = Small(), bound()
    assert np.array_equal(flat.values(), x)
    for (name, mine), (other, theirs) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        assert name == other and torch.equal(mine, theirs)


def test_writing_the_vector_changes_the_model():
    model, flat, x = bound()
    x[:] = np.arange(flat.n)
    for entry in flat.entries:
        tensor = {**dict(model.named_parameters()), **dict(model.named_buffers())}[entry.name]
        assert np.array_equal(tensor.detach().numpy().ravel(), np.arange(entry.start, entry.stop))
        assert tensor.shape == entry.shape
    assert model.again.weight is model.outer.weight


def test_writing_the_model_changes_the_vector():
    model, flat, x = bound()
    with torch.no_grad():
        model.again.weight[4, 6] = -7  # the last element of the tied weights
        model.norm.running_var[0] = 9
        model.scale.fill_(11)
    by_name = {entry.name: entry for entry in flat.entries}
    assert x[by_name["outer.weight"].stop - 1] == -7
    assert x[by_name["norm.running_var"].start] == 9
    assert x[by_name["scale"].start] == 11


def test_the_running_statistics_move_within_the_vector():
    model, flat, x = bound()
    before, part = x.copy(), flat.buffers
    model(inputs())
    assert np.array_equal(before[: part.start], x[: part.start])
    assert not np.array_equal(before[part], x[part])
    assert model.norm.num_batches_tracked == 1


def test_binding_elsewhere_leaves_the_first_vector_alone():
    model, flat, x = bound()
    before, y = x.copy(), vector(flat.n)
    flat.bind(y)
    model.eval()
    assert not model(inputs()).any()  # zeros everywhere
    y[:] = 3
    assert np.array_equal(before, x)


def test_the_models_tensors_stay_the_same_objects():
    model = Small()
    before = [*model.parameters(), *model.buffers()]
    flat = Flat(model)
    flat.bind(vector(flat.n))
    assert all(one is other for one, other in zip(before, [*model.parameters(), *model.buffers()], strict=True))


def test_values_are_a_copy_with_zeros_in_the_gaps():
    _, flat, x = bound()
    values = flat.values()
    values[:] = 5
    assert not (x == 5).any()
    assert gaps(flat).any() and not flat.values()[gaps(flat)].any()


# Gradients


def gradients(model: Small) -> None:
    model(inputs()).square().sum().backward()


def test_gradients_land_in_g():
    plain, (model, flat, _) = Small(), bound()
    g = vector(flat.n)
    flat.bind_gradients(g)
    gradients(model)
    gradients(plain)
    expected = dict(plain.named_parameters())
    for entry in flat.entries[: len(TRAINED)]:
        grad = expected[entry.name].grad
        there = np.zeros(entry.stop - entry.start) if grad is None else grad.numpy().ravel()
        assert np.array_equal(g[entry.start : entry.stop], there), entry.name
        assert there.any() != entry.name.startswith("unused")  # the head that nothing depends on


def test_gradients_add_up_until_g_is_cleared():
    model, flat, _ = bound()
    model.eval()
    g = vector(flat.n)
    flat.bind_gradients(g)
    gradients(model)
    once = g.copy()
    gradients(model)
    assert np.array_equal(g, once + once)
    g[:] = 0
    gradients(model)
    assert np.array_equal(g, once)


def test_nothing_but_the_trained_entries_gets_a_gradient():
    model, flat, _ = bound()
    g = vector(flat.n)
    flat.bind_gradients(g)
    gradients(model)
    assert not g[flat.trainable :].any() and not g[gaps(flat)].any()
    assert all(p.grad is None for p in model.frozen.parameters())


def test_the_gaps_stay_zero_through_training():
    model, flat, x = bound()
    g = vector(flat.n)
    flat.bind_gradients(g)
    for _ in range(3):
        g[:] = 0
        gradients(model)
        x -= np.float32(0.01) * g
    assert not x[gaps(flat)].any()


# The state dict


def trained() -> tuple[Small, Flat, np.ndarray]:
    model, flat, x = bound()
    gradients(model)
    x += np.float32(0.5)
    x[gaps(flat)] = 0
    return model, flat, x


def test_the_state_dict_loads_into_a_plain_model_and_computes_the_same():
    model, flat, x = trained()
    plain = Small()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    plain.passing.copy_(model.passing)  # in no state dict, as it is not persistent
    plain.load_state_dict(flat.state_dict(x), strict=True)
    assert np.array_equal(Flat(plain).values(), x)
    assert torch.equal(plain.eval()(inputs()), model.eval()(inputs()))


def test_the_state_dict_names_tied_weights_under_both_names():
    _, flat, x = trained()
    state = flat.state_dict(x)
    assert list(state) == list(Small().state_dict())
    assert torch.equal(state["again.weight"], state["outer.weight"])


def test_the_state_dict_holds_the_given_vector_not_the_bound_one():
    _, flat, _ = trained()
    state = flat.state_dict(np.arange(flat.n, dtype=np.float32))
    by_name = {entry.name: entry for entry in flat.entries}
    for name in ("frozen.bias", "norm.running_mean", "again.weight"):
        entry = by_name[name.replace("again", "outer")]
        assert np.array_equal(state[name].numpy().ravel(), np.arange(entry.start, entry.stop))


def test_the_state_dict_is_of_copies():
    model, flat, x = trained()
    before = x.copy()
    for tensor in flat.state_dict(x).values():
        tensor.fill_(0)
    assert np.array_equal(x, before)
    assert model.table.tolist() == [0, 1, 2] and model.norm.num_batches_tracked == 1


def test_integer_buffers_are_not_in_the_vector_and_keep_their_values():
    model, flat, x = trained()
    x[:] = 77
    assert model.table.tolist() == [0, 1, 2] and model.table.dtype == torch.int64
    state = flat.state_dict(x)
    assert state["table"].tolist() == [0, 1, 2] and state["norm.num_batches_tracked"] == 1


def test_weights_in_another_memory_format_go_there_and_back():
    torch.manual_seed(1)
    model = nn.Conv2d(3, 5, 2).to(memory_format=torch.channels_last)
    plain, flat = model.weight.detach().clone(), Flat(model)
    x = flat.values()
    flat.bind(x)
    assert torch.equal(model.weight, plain)
    assert torch.equal(flat.state_dict(x)["weight"], plain)


# What is refused


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_another_dtype_is_refused_with_the_remedy(dtype):
    with pytest.raises(ValueError, match=rf"^0\.weight has dtype {dtype}: .* call model\.float\(\)"):
        Flat(nn.Sequential(nn.Linear(3, 3, dtype=dtype)))


def test_buffers_that_are_no_state_to_average_stay_out_of_the_vector():
    model = nn.Linear(3, 3)
    model.register_buffer("wide", torch.zeros(3, dtype=torch.float64))
    model.register_buffer("count", torch.zeros(3, dtype=torch.int64))
    model.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    model.register_buffer("passing", torch.ones(3), persistent=False)
    flat = Flat(model)
    assert [entry.name for entry in flat.entries] == ["weight", "bias"]
    state = flat.state_dict(flat.values())
    plain = model.state_dict()
    assert list(state) == list(plain) and all(torch.equal(state[name], plain[name]) for name in plain)


def test_channels_last_weights_stay_channels_last():
    model = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    before = model.weight.detach().clone()
    flat = Flat(model)
    x = vector(flat.n)
    np.copyto(x, flat.values())
    flat.bind(x)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.weight, before)
    state = flat.state_dict(x)["weight"]
    assert state.is_contiguous() and torch.equal(state, before)


def test_a_parameter_that_is_a_piece_of_something_larger_is_laid_out_without_gaps():
    model = nn.Linear(3, 5)
    model.weight = nn.Parameter(torch.arange(30.0).view(5, 6)[:, ::2])
    flat = Flat(model)
    assert flat.values()[:15].tolist() == model.weight.detach().flatten().tolist()


def test_what_no_longer_lies_in_the_vector_is_named():
    model, flat, x = bound()
    assert flat.strayed(x) is None
    model.norm.running_var = model.norm.running_var.clone()  # another buffer under the same name
    model.outer.weight.data = model.outer.weight.data.clone()
    assert flat.strayed(x) == "outer.weight"


def test_a_lazy_module_is_refused_before_it_has_a_shape():
    with pytest.raises(ValueError, match=r"weight has no shape yet .* run one batch through the model first"):
        Flat(nn.LazyLinear(3))


@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 3).requires_grad_(False), nn.Flatten])
def test_a_model_without_anything_to_train_is_refused(make):
    with pytest.raises(ValueError, match="no trainable parameter: nothing to train; set requires_grad"):
        Flat(make())
