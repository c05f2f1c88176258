"""Evaluation of the center: against a slow plain reference, and without any trace."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from easgd_local import data, evaluate, models
from easgd_local.computing import Computing
from easgd_local.data import Dataset
from easgd_local.evaluate import BATCH, Scores, evenly_spaced, recalibrate

EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These networks are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(train: int = 1203, test: int = 507, *, crop: int | None = 5) -> Dataset:
    """Pictures that are cropped and flipped in training, in numbers that are no multiples of the batch."""
    made = data.make_synthetic(3, shape=(2, 7, 8), classes=3, train_samples=train, test_samples=test)
    return replace(made, crop=crop, flip=True)


def network(dataset: Dataset) -> nn.Module:
    """One with all that behaves otherwise in training, and scores that are far from equal."""
    torch.manual_seed(1)
    channels, height, width = dataset.input_shape
    model = nn.Sequential(
        nn.BatchNorm2d(channels), nn.Flatten(), nn.Linear(channels * height * width, 31), nn.ReLU(), nn.Dropout(0.5),
        nn.BatchNorm1d(31), nn.Linear(31, 3),
    )  # fmt: skip
    with torch.no_grad():
        for buffer in (model[0].running_mean, model[5].running_mean):
            buffer.uniform_(-0.2, 0.2)
        model[6].weight.mul_(3)
    return model


def pictures(dataset: Dataset, split: str, indices: np.ndarray) -> torch.Tensor:
    """The central crop, scaled to [0, 1], in double precision, without the package's own preparation."""
    images = getattr(dataset, split).images[indices].astype(np.float64)
    if dataset.crop:
        top, left = (images.shape[2] - dataset.crop) // 2, (images.shape[3] - dataset.crop) // 2
        images = images[:, :, top : top + dataset.crop, left : left + dataset.crop]
    return torch.from_numpy(images / 255)


@torch.no_grad()
def reference(model: nn.Module, dataset: Dataset, split: str, indices: list[int]) -> tuple[float, float]:
    """Mean loss and fraction of wrong answers, one picture at a time, in double precision."""
    double = network(dataset).double()
    double.load_state_dict(model.state_dict())
    double.eval()
    losses, wrong = [], 0
    for index in indices:
        scores = double(pictures(dataset, split, np.array([index])))[0]
        label = getattr(dataset, split).labels[index]
        losses.append(float(torch.logsumexp(scores, 0) - scores[label]))
        wrong += int(scores.argmax()) != label
    return float(np.mean(losses)), wrong / len(indices)


def test_scores_equal_the_slow_reference() -> None:
    dataset = small()
    model = network(dataset)
    scores = evaluate.evaluate(model, dataset, samples=701)
    train_loss, _ = reference(model, dataset, "train", [k * 1203 // 701 for k in range(701)])
    test_loss, test_error = reference(model, dataset, "test", list(range(507)))
    # Up to BATCH losses are summed in float32, each sum rounding once; the scores take some dozen roundings.
    tolerance = (BATCH + 100) * EPS
    assert scores.train_loss == pytest.approx(train_loss, rel=tolerance)
    assert scores.test_loss == pytest.approx(test_loss, rel=tolerance)
    assert scores.test_error == test_error and 0.1 < test_error < 0.9  # neither a lucky nor a hopeless network


def test_all_training_samples_are_scored_when_more_are_asked_for() -> None:
    dataset = small(train=31, test=9)
    model = network(dataset)
    everything = evaluate.evaluate(model, dataset, samples=31)
    assert evaluate.evaluate(model, dataset, samples=10_000) == everything
    assert everything.train_loss == pytest.approx(reference(model, dataset, "train", list(range(31)))[0], rel=200 * EPS)


def test_an_evaluation_leaves_no_trace() -> None:
    dataset = small(train=31, test=9)
    model = network(dataset).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    first = evaluate.evaluate(model, dataset, samples=31)
    assert evaluate.evaluate(model, dataset, samples=31) == first
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_weight_decay_is_no_part_of_the_loss() -> None:
    """A network that answers the same for every picture: ln 3, however large its weights."""
    dataset = small(train=30, test=9, crop=None)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * 7 * 8, 3, bias=False))
    with torch.no_grad():
        model[1].weight.fill_(100.0)
    scores = evaluate.evaluate(model, dataset, samples=30)
    assert scores.train_loss == pytest.approx(np.log(3), rel=40 * EPS)


def test_bfloat16_scores_are_others_but_close() -> None:
    dataset = small()
    model = network(dataset)
    full, half = (evaluate.evaluate(model, dataset, samples=100, computing=Computing(one)) for one in ("fp32", "bf16"))
    assert full != half
    assert half.train_loss == pytest.approx(full.train_loss, rel=0.05)  # bfloat16 has 8 bits: 0.4 % a rounding
    assert half.test_error == pytest.approx(full.test_error, abs=0.05)


def test_scores_of_numbers_that_are_none_are_none() -> None:
    dataset = small(train=31, test=9)
    model = network(dataset)
    with torch.no_grad():
        model[6].weight.fill_(float("nan"))
    scores = evaluate.evaluate(model, dataset, samples=31)
    assert np.isnan(scores.train_loss) and np.isnan(scores.test_loss) and 0 <= scores.test_error <= 1


def test_scores_are_compared_by_value() -> None:
    assert Scores(1.0, 2.0, 0.5) == Scores(1.0, 2.0, 0.5) != Scores(1.0, 2.0, 0.25)


# Evenly spaced


@pytest.mark.parametrize("count, samples", [
    (1, 1), (1437, 10_000), (1437, 1437), (1023, 31), (10, 3), (50_000, 9_999),
])  # fmt: skip
def test_samples_are_evenly_spaced(count: int, samples: int) -> None:
    chosen = evenly_spaced(count, samples)
    assert chosen.dtype == np.int64 and len(chosen) == min(count, samples)
    assert chosen[0] == 0 and chosen[-1] < count
    gaps = np.diff([*chosen, count])  # around the end as well
    assert set(gaps) <= {count // len(chosen), -(-count // len(chosen))}


def test_many_samples_do_not_overflow() -> None:
    chosen = evenly_spaced(14_000_000, 3_000_000)  # the product is beyond 2^32
    assert chosen[-1] == 2_999_999 * 14_000_000 // 3_000_000


# Recalibration


def exact(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased variance of each channel over everything else, in double precision."""
    rows = values.double().transpose(0, 1).flatten(1)
    return rows.mean(1), rows.var(1, unbiased=True)


def close(found: torch.Tensor, expected: torch.Tensor, count: int) -> bool:
    """Within the rounding of float32 sums over `count` numbers of order one, added up in a tree or one by one."""
    return bool(((found.double() - expected).abs() <= count**0.5 * EPS * (1 + expected.abs())).all())


def first_norm(dataset: Dataset) -> nn.Module:
    """A network whose BatchNorm sees the pictures themselves."""
    channels, height, width = dataset.input_shape
    return nn.Sequential(nn.BatchNorm2d(channels, momentum=0.3), nn.Flatten(), nn.Linear(channels * height * width, 3))


@pytest.mark.parametrize("samples, train", [(241, 241), (241, 903), (BATCH, 1203)])
def test_the_statistics_of_one_batch_are_the_exact_ones(samples: int, train: int) -> None:
    dataset = small(train=train)
    model = first_norm(dataset)
    recalibrate(model, dataset, samples=samples)
    seen = pictures(dataset, "train", evenly_spaced(train, samples))
    mean, variance = exact(seen)
    assert close(model[0].running_mean, mean, seen[:, 0].numel())
    assert close(model[0].running_var, variance, seen[:, 0].numel())


def test_a_second_norm_sees_what_the_first_one_makes() -> None:
    dataset = small(train=241)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 3)
    )  # fmt: skip
    recalibrate(model, dataset, samples=241)
    x = pictures(dataset, "train", np.arange(241))
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
    normal = (x - mean) / (variance + model[0].eps).sqrt()
    inside = F.relu(F.conv2d(normal, model[1].weight.double(), model[1].bias.double()))
    mean, variance = exact(inside)
    assert close(model[3].running_mean, mean, 18 * inside[:, 0].numel())  # 18 products a convolution
    assert close(model[3].running_var, variance, 18 * inside[:, 0].numel())


@pytest.mark.parametrize("samples", [2 * BATCH, 1203, BATCH + 1])
def test_the_statistics_are_near_the_exact_ones_also_when_the_pictures_are_sorted_by_class(samples: int) -> None:
    """The variance of batch means is what is left out: 1/BATCH of the whole for batches drawn across the set."""
    dataset = small(train=1203)
    order = np.argsort(dataset.train.labels, kind="stable")
    dataset = replace(dataset, train=data.MemorySplit(dataset.train.images[order], dataset.train.labels[order]))
    model = first_norm(dataset)
    recalibrate(model, dataset, samples=samples)
    mean, variance = exact(pictures(dataset, "train", evenly_spaced(1203, samples)))
    assert torch.allclose(model[0].running_mean.double(), mean, rtol=4 / BATCH)
    assert torch.allclose(model[0].running_var.double(), variance, rtol=4 / BATCH)


def test_the_old_statistics_are_forgotten_and_the_momentum_stays() -> None:
    dataset = small(train=241)
    fresh, used = first_norm(dataset), first_norm(dataset)
    with torch.no_grad():
        used[0].running_mean.fill_(1e6)
        used[0].running_var.fill_(1e6)
        for _ in range(3):  # it has been trained before
            used(torch.ones(4, 2, 5, 5))
    for model in (fresh, used):
        recalibrate(model, dataset, samples=241)
        assert model[0].momentum == 0.3
    assert torch.equal(fresh[0].running_mean, used[0].running_mean)
    assert torch.equal(fresh[0].running_var, used[0].running_var)


def test_recalibration_leaves_parameters_alone_and_is_repeatable() -> None:
    dataset = small(train=241)
    model = network(dataset)
    before = [parameter.clone() for parameter in model.parameters()]
    recalibrate(model, dataset, samples=241)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    once = evaluate.evaluate(first_norm(dataset), dataset, samples=5)
    assert np.isfinite(once.test_loss)


def test_recalibration_does_not_depend_on_chance() -> None:
    """Behind a dropout layer as well: what is switched off at random in training is not part of the center."""
    dataset = small(train=241)
    found = []
    for seed in (1, 2):
        model = network(dataset)
        torch.manual_seed(seed)
        recalibrate(model, dataset, samples=241)
        found.append(model[5].running_var)
    assert torch.equal(*found)


def test_a_network_without_norms_is_recalibrated_to_itself() -> None:
    dataset = small(train=31, crop=None)
    model = models.build("mlp", shape=dataset.input_shape, classes=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recalibrate(model, dataset, samples=31)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
