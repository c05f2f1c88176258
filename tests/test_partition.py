"""A model divided among workers, and gradients of a part of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from easgd_local import data, models
from easgd_local.backend.cpu import CpuOps, vector
from easgd_local.config import Config
from easgd_local.flat import Flat
from easgd_local.gradient import Gradient
from easgd_local.partition import overlap, partition
from easgd_local.prepare import prepare
from easgd_local.rules.passm import PASSM


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=60), st.integers(1, 60))
def test_every_part_of_any_list_of_layers_is_a_run_and_none_is_empty(sizes: list[int], parts: int) -> None:
    if parts > len(sizes):
        with pytest.raises(ValueError, match=f"workers={parts}: the model has {len(sizes)} parameter tensors"):
            partition(sizes, parts)
        return
    cut = partition(sizes, parts)
    assert len(cut) == parts and all(len(part) > 0 for part in cut)
    assert [layer for part in cut for layer in part] == list(range(len(sizes)))


@given(st.lists(st.integers(0, 100), min_size=5, max_size=9), st.integers(1, 5))
def test_no_other_cut_is_more_equal(sizes: list[int], parts: int) -> None:
    def squares(edges: Sequence[int]) -> int:
        return sum(sum(sizes[start:stop]) ** 2 for start, stop in pairwise((0, *edges, len(sizes))))

    made = squares([part.start for part in partition(sizes, parts)[1:]])
    assert made == min(map(squares, combinations(range(1, len(sizes)), parts - 1)))


def test_a_large_layer_is_not_joined_by_its_neighbours() -> None:
    """The tensors of cifar7 in four parts: the large second convolution is a part of its own."""
    sizes = [4800, 64, 204800, 128, 73728, 64, 147456, 256, 2560, 10]
    assert partition(sizes, 4) == [range(2), range(2, 3), range(3, 6), range(6, 10)]


def test_equal_layers_are_divided_equally() -> None:
    assert partition([5] * 12, 4) == [range(3), range(3, 6), range(6, 9), range(9, 12)]


@pytest.mark.parametrize(("one", "other", "expected"), [
    (slice(0, 5), slice(3, 9), slice(3, 5)), (slice(3, 9), slice(0, 5), slice(3, 5)),
    (slice(2, 4), slice(0, 9), slice(2, 4)), (slice(0, 3), slice(5, 9), slice(5, 5)),
    (slice(4, 4), slice(0, 9), slice(4, 4)),
])  # fmt: skip
def test_overlap_is_what_both_hold(one: slice, other: slice, expected: slice) -> None:
    assert overlap(one, other) == expected


def gradient_of(model: str, *, weight_decay: float = 0.01) -> tuple[Gradient, np.ndarray]:
    shape = (3, 32, 32) if model == "cifar7" else (1, 8, 8)
    dataset = data.make_synthetic(0, shape=shape, train_samples=64, test_samples=8)
    torch.manual_seed(3)
    net: nn.Module = models.build(model, shape=dataset.input_shape, classes=10)
    sampler = data.shard(0, 0, 1, 8, 64)
    made = Gradient(net, dataset, sampler, rank=0, weight_decay=weight_decay)
    x = vector(made.n)
    x[:] = Flat(net).values()
    return made, x


@pytest.mark.parametrize("model", ["mlp", "cifar7"])
@pytest.mark.parametrize("workers", [2, 3, 4])
def test_a_partial_gradient_is_the_slice_of_the_full_one(model: str, workers: int) -> None:
    gradient, x = gradient_of(model)
    full = gradient(CpuOps(), 5, x).copy()
    for part in partition([layer.stop - layer.start for layer in gradient.layers], workers):
        own = slice(gradient.layers[part[0]].start, gradient.layers[part[-1]].stop)
        partial = gradient(CpuOps(), 5, x, own)
        assert np.array_equal(partial[own], full[own])
        assert not partial[: own.start].any() and not partial[own.stop :].any()
    assert np.array_equal(gradient(CpuOps(), 5, x), full)  # everything trains again afterwards


def test_the_backward_pass_of_a_part_ends_below_its_first_layer() -> None:
    """Operations counted by torch: the later its layers, the less the backward pass of a part costs."""
    gradient, x = gradient_of("cifar7")
    costs = []
    parts = partition([layer.stop - layer.start for layer in gradient.layers], 4)
    for part in [range(len(gradient.layers)), *parts]:
        own = slice(gradient.layers[part[0]].start, gradient.layers[part[-1]].stop)
        with FlopCounterMode(display=False) as counter:
            gradient(CpuOps(), 0, x, own)
        costs.append(counter.get_total_flops())
    full, *partial = costs
    assert partial == sorted(partial, reverse=True)
    assert partial[0] < 0.8 * full  # the first part still lacks the gradients of the others' weights
    assert max(partial[2:]) < 0.4 * full  # the last ones need hardly more than the forward pass, a third of it all


def test_more_workers_than_layers_are_refused_before_anything_starts() -> None:
    with pytest.raises(ValueError, match=r"workers=7: the model has 6 parameter tensors .* at most 6 workers"):
        prepare(Config(rule=PASSM(), workers=7))
