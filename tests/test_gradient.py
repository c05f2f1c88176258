"""The stochastic gradient: plain autograd to the bit, and a pure function of (seed, rank, t, x)."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from easgd_local import data, models
from easgd_local.backend.cpu import CpuOps, vector
from easgd_local.computing import USUAL, Computing
from easgd_local.data import Dataset
from easgd_local.flat import Flat
from easgd_local.gradient import Gradient

BATCH_SIZE, SEED, RANK, WORKERS = 7, 5, 1, 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As a worker has it here: sums are added up in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def pictures(channels: int = 3, side: int = 32, crop: int | None = 28) -> Dataset:
    """Cropped and flipped at random in training, so that the augmentation is part of what must be pure."""
    made = data.make_synthetic(0, shape=(channels, side, side), train_samples=101, test_samples=10)
    return replace(made, crop=crop, flip=True)


def norms(dataset: Dataset) -> nn.Module:
    """A network with BatchNorm, dropout, a frozen and an unused parameter."""
    channels, height, width = dataset.input_shape
    model = nn.Sequential(
        nn.Conv2d(channels, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3),
        nn.Linear(3 * (height - 2) * (width - 2), 10),
    )  # fmt: skip
    model[0].bias.requires_grad_(False)
    model.unused = nn.Parameter(torch.ones(5))  # not reached by the loss, and decayed like the others
    return model


def build(name: str) -> tuple[nn.Module, Dataset]:
    """A fresh network, always with the same start, and its pictures."""
    torch.manual_seed(42)
    if name == "norms":
        return norms(pictures(2, 8, 6)), pictures(2, 8, 6)
    dataset = pictures() if name == "cifar7" else pictures(1, 9, None)
    return models.build(name, shape=dataset.input_shape, classes=10), dataset


def gradient_of(
    name: str, *, weight_decay: float = 0.01, rank: int = RANK, computing: Computing = USUAL
) -> Gradient:
    model, dataset = build(name)
    sampler = data.shard(SEED, rank, WORKERS, BATCH_SIZE, len(dataset.train))
    return Gradient(model, dataset, sampler, rank=rank, weight_decay=weight_decay, computing=computing)


def start(name: str) -> np.ndarray:
    """The network's start, on a page as a worker's vectors are."""
    values = Flat(build(name)[0]).values()
    x = vector(len(values))
    x[:] = values
    return x


def bits(gradient: Gradient, t: int, x: np.ndarray) -> tuple[bytes, float, bytes]:
    """g, the loss and the refreshed buffers, of a call at a copy of x."""
    at = vector(len(x))
    at[:] = x
    g = gradient(CpuOps(), t, at).tobytes()
    return g, gradient.loss, at[gradient.buffers].tobytes()


NETWORKS = ("mlp", "cifar7", "norms")


def plain(name: str, t: int, weight_decay: float) -> tuple[nn.Module, float]:
    """The same network after loss.backward() on the minibatch of clock t, written out without Gradient."""
    model, dataset = build(name)
    order = np.concatenate([
        np.random.Generator(np.random.PCG64(np.random.SeedSequence(SEED, spawn_key=(0, epoch)))).permutation(101)
        for epoch in range(9)
    ])  # fmt: skip
    first = (t * WORKERS + RANK) * BATCH_SIZE
    chosen = order[first : first + BATCH_SIZE]
    rng = data.step_rng(SEED, RANK, t)
    inputs = torch.from_numpy(data.prepare(dataset.train.images[chosen], dataset, rng))
    torch.manual_seed(int(rng.integers(2**62)))
    loss = F.cross_entropy(model.train()(inputs), torch.from_numpy(dataset.train.labels[chosen]))
    loss.backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            raw = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = raw + np.float32(weight_decay) * parameter.detach()
    return model, loss.item()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("t", [0, 4, 30])  # with 101 samples and 21 a step, step 4 straddles two epochs
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_it_is_what_autograd_gives_to_the_bit(name: str, t: int, weight_decay: float) -> None:
    gradient, x = gradient_of(name, weight_decay=weight_decay), start(name)
    before = x.copy()
    g = gradient(CpuOps(), t, x)
    model, loss = plain(name, t, weight_decay)
    assert gradient.loss == loss
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    seen = np.zeros(len(g), bool)
    for entry in gradient.flat.entries:
        place = slice(entry.start, entry.stop)
        seen[place] = True
        tensor = buffers.get(entry.name, parameters.get(entry.name))
        expected = np.zeros(entry.stop - entry.start, np.float32)
        if entry.name in parameters and tensor.requires_grad:
            expected = tensor.grad.numpy().ravel()
        assert g[place].tobytes() == expected.tobytes(), entry.name
        assert x[place].tobytes() == tensor.detach().numpy().tobytes(), entry.name  # buffers too are refreshed alike
    assert not g[~seen].any()
    assert before[: gradient.flat.trainable].tobytes() == x[: gradient.flat.trainable].tobytes()


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_a_pure_function_of_the_clock_and_the_point(name: str) -> None:
    """In order, out of order, again, and in a fresh object: the same bits."""
    x = start(name)
    y = x + np.float32(0.125)
    fresh = {(t, which): bits(gradient_of(name), t, point) for t in (2, 3, 5) for which, point in (("x", x), ("y", y))}
    assert len({g for g, _, _ in fresh.values()}) == 6  # all of them differ
    one = gradient_of(name)
    for call in "2x 3x 5x 2x 2x 5y 3y 2y 3x 5y".split():
        t, which = int(call[0]), call[1]
        torch.rand(3)  # somebody else draws random numbers in between
        assert bits(one, t, x if which == "x" else y) == fresh[t, which], call


def test_dropout_differs_from_step_to_step_and_from_worker_to_worker() -> None:
    """With one and the same picture in every batch nothing else could."""
    found = []
    for rank, t in ((0, 0), (0, 1), (1, 0), (1, 1)):
        model, dataset = build("cifar7")
        one = data.MemorySplit(dataset.train.images[:1].repeat(101, 0), dataset.train.labels[:1].repeat(101))
        still = replace(dataset, train=one, crop=None, flip=False)
        model = models.build("cifar7", shape=still.input_shape, classes=10)
        torch.manual_seed(42)
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -0.05, 0.05)
        sampler = data.shard(SEED, rank, WORKERS, BATCH_SIZE, 101)
        gradient = Gradient(model, still, sampler, rank=rank, weight_decay=0.0)
        values = gradient.flat.values()
        found.append(bits(gradient, t, values))
    assert len({g for g, _, _ in found}) == 4


def test_workers_see_other_pictures() -> None:
    x = start("mlp")
    assert bits(gradient_of("mlp", rank=0), 2, x) != bits(gradient_of("mlp", rank=1), 2, x)


def test_another_vector_may_be_passed_at_every_call() -> None:
    """A rule asks at x and at x + δv in turn; each call uses what the vector holds then."""
    gradient, x = gradient_of("norms"), start("norms")
    y = vector(len(x))
    y[:] = x
    first = bytes(gradient(CpuOps(), 3, x))
    y[: gradient.flat.trainable] *= np.float32(1.5)
    there = bytes(gradient(CpuOps(), 3, y))
    x[gradient.buffers] = start("norms")[gradient.buffers]
    assert there != first and bytes(gradient(CpuOps(), 3, x)) == first
    x[: gradient.flat.trainable] *= np.float32(1.5)  # the same vector with other values
    x[gradient.buffers] = start("norms")[gradient.buffers]
    assert bytes(gradient(CpuOps(), 3, x)) == there


def test_streamed_pictures_give_the_same_bits() -> None:
    """The reading ahead starts anew at every jump of the clock, and ends when asked to."""

    class Stream(data.MemorySplit):
        opened = closed = 0

        def stream(self, order):  # type: ignore[no-untyped-def]
            Stream.opened += 1
            try:
                yield from super().stream(order)
            finally:
                Stream.closed += 1

    model, dataset = build("mlp")
    streamed = replace(dataset, train=Stream(dataset.train.images, dataset.train.labels))
    sampler = data.shard(SEED, RANK, WORKERS, BATCH_SIZE, 101)
    gradient = Gradient(model, streamed, sampler, rank=RANK, weight_decay=0.01)
    x = start("mlp")
    assert Stream.opened == 0
    for t, streams in ((3, 1), (4, 1), (5, 1), (4, 2), (9, 3)):
        assert bits(gradient, t, x) == bits(gradient_of("mlp"), t, x)
        assert (Stream.opened, Stream.closed) == (streams, streams - 1)
    gradient.close()
    assert Stream.closed == Stream.opened
    gradient.close()


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_is_close_but_not_the_same(name: str) -> None:
    x = start(name)
    full = np.frombuffer(bits(gradient_of(name), 2, x)[0], np.float32)
    half = np.frombuffer(bits(gradient_of(name, computing=Computing("bf16")), 2, x)[0], np.float32)
    assert half.dtype == np.float32 and not np.array_equal(full, half)
    # bfloat16 rounds to 8 bits, 2^-8 of a number; some dozen roundings in a row along forward and backward.
    assert np.linalg.norm(half - full) <= 24 * 2**-8 * np.linalg.norm(full)


@pytest.mark.parametrize("name", ["cifar7", "norms"])
def test_bfloat16_is_pure_as_well(name: str) -> None:
    x, one = start(name), gradient_of(name, computing=Computing("bf16"))
    assert [bits(one, t, x) for t in (5, 2, 5)] == [
        bits(gradient_of(name, computing=Computing("bf16")), t, x) for t in (5, 2, 5)
    ]


@pytest.mark.parametrize("name", ["cifar7", "norms"])
def test_the_order_of_elements_in_memory_changes_no_value_but_by_rounding(name: str) -> None:
    x, last = start(name), gradient_of(name, computing=Computing(channels_last=True))
    usual, other = (np.frombuffer(bits(one, 2, x)[0], np.float32) for one in (gradient_of(name), last))
    assert np.linalg.norm(other - usual) <= 1e-5 * np.linalg.norm(usual)
    assert bits(last, 2, x) == bits(last, 2, x)


def test_channels_last_is_an_order_in_memory_and_no_other_shape() -> None:
    pixels = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    usual, last = Computing().inputs(pixels), Computing(channels_last=True).inputs(pixels)
    assert usual.shape == last.shape == (2, 3, 4, 5)
    assert torch.equal(usual, last)
    assert last.is_contiguous(memory_format=torch.channels_last) and not last.is_contiguous()


def test_the_weight_decay_is_in_the_gradient_and_not_in_the_loss() -> None:
    x = start("mlp")
    without, with_decay = gradient_of("mlp", weight_decay=0.0), gradient_of("mlp", weight_decay=0.5)
    g, decayed = without(CpuOps(), 2, x).copy(), with_decay(CpuOps(), 2, x)
    assert without.loss == with_decay.loss
    assert np.array_equal(decayed, g + np.float32(0.5) * x)


def test_zero_is_zero_everywhere_and_does_not_last() -> None:
    gradient, x = gradient_of("norms"), start("norms")
    expected = bits(gradient, 3, x)
    loss = gradient.loss
    zero = gradient.zero(CpuOps())
    assert zero.shape == (gradient.n,) and not zero.any() and gradient.loss == loss
    assert bits(gradient, 3, x) == expected


def test_what_it_says_of_itself() -> None:
    gradient = gradient_of("norms")
    assert np.isnan(gradient.loss) and gradient.samples_per_step == BATCH_SIZE
    assert gradient.n == gradient.flat.n and gradient.buffers == gradient.flat.buffers
    assert gradient.flat.model.training
