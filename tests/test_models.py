"""The networks: sizes of the paper, starts, and what a user is told about a misfit."""

import pytest
import torch
from torch import nn

from easgd_local import models


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def layers(model: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in model]


@pytest.mark.parametrize("name, shape, classes, parameters", [
    ("cifar7", (3, 28, 28), 10, 351_946),
    ("imagenet11", (3, 221, 221), 1000, 61_128_808),
])
def test_the_networks_have_exactly_the_parameters_of_the_paper(name, shape, classes, parameters):
    with torch.device("meta"):
        assert count(models.build(name, shape=shape, classes=classes)) == parameters


def test_rectifiers_stand_inside_and_dropout_before_the_last_layers():
    conv, full = ["Conv2d", "ReLU"], ["Linear", "ReLU", "Dropout"]
    assert layers(models.build("cifar7", shape=(3, 28, 28), classes=10)) == (
        [*conv, "MaxPool2d"] * 2 + conv + ["Flatten", *full, "Linear"])
    with torch.device("meta"):
        assert layers(models.build("imagenet11", shape=(3, 221, 221), classes=1000)) == (
            [*conv, "MaxPool2d"] * 2 + conv * 3 + ["MaxPool2d", "Flatten", *full, *full, "Linear"])


@pytest.mark.parametrize("name, shape, value", [("cifar7", (3, 28, 28), 0.0), ("imagenet11", (1, 110, 110), 0.1)])
def test_biases_start_at_the_papers_value_and_weights_do_not(name, shape, value):
    for key, parameter in models.build(name, shape=shape, classes=3).named_parameters():
        assert torch.equal(parameter, torch.full_like(parameter, value)) == key.endswith("bias")


@pytest.mark.parametrize("name, shape, classes", [
    ("mlp", (1, 8, 8), 10), ("mlp", (3, 5, 7), 3), ("cifar7", (3, 28, 28), 7), ("cifar7", (1, 33, 29), 2),
    ("resnet18", (3, 32, 32), 5),
])
def test_a_network_maps_pictures_to_scores(name, shape, classes):
    model = models.build(name, shape=shape, classes=classes)
    assert model(torch.zeros(2, *shape)).shape == (2, classes)


@pytest.mark.parametrize("name", models.NAMES)
def test_the_start_depends_on_torchs_seed_alone(name):
    shape = (3, 110, 110) if name == "imagenet11" else (3, 28, 28)
    starts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        starts.append(nn.utils.parameters_to_vector(models.build(name, shape=shape, classes=3).parameters()))
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_every_name_is_known_and_others_are_not():
    assert all(map(models.known, (*models.NAMES, "resnet18"))) and models.NAMES == ("mlp", "cifar7", "imagenet11")
    assert not models.known("resnet17") and not models.known("fasterrcnn_resnet50_fpn")


@pytest.mark.parametrize("name, near", [("cifar", "cifar7"), ("resnet_18", "resnet18")])
def test_an_unknown_name_is_answered_with_the_nearest_and_the_list(name, near):
    with pytest.raises(ValueError, match=f"'{name}' is not known, did you mean '{near}'.*mlp, cifar7.*list_models"):
        models.build(name, shape=(3, 28, 28), classes=10)


@pytest.mark.parametrize("name, shape, sentence", [
    ("cifar7", (3, 8, 8), "cifar7 has nothing left of a picture of 3 channels and 8 x 8 pixels.*28 x 28"),
    ("imagenet11", (3, 32, 32), "imagenet11 has nothing left.*221 x 221"),
    ("alexnet", (3, 32, 32), "AlexNet does not take pictures of 3 channels and 32 x 32 pixels.*another model"),
    ("resnet18", (1, 32, 32), "ResNet does not take pictures of 1 channel and 32"),
])
def test_pictures_of_the_wrong_size_are_refused_when_the_network_is_built(name, shape, sentence):
    with pytest.raises(ValueError, match=sentence):
        models.build(name, shape=shape, classes=10)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="classes=1: a classifier tells at least two"):
        models.build("mlp", shape=(1, 8, 8), classes=1)


def test_a_check_leaves_statistics_modes_and_randomness_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten())
    model[1].eval()
    model[1].running_mean += 1
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    models.check(model, (3, 5, 5))
    with pytest.raises(ValueError, match="Sequential does not take"):
        models.check(model, (2, 5, 5))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in model.modules()] == [True, True, False, True, True]


def test_a_network_without_a_row_of_scores_is_refused():
    with pytest.raises(ValueError, match=r"Conv2d returns Tensor\[1, 4, 3, 3\]: a classifier returns one tensor"):
        models.check(nn.Conv2d(3, 4, 3), (3, 5, 5))


@pytest.mark.parametrize("name, shape, batch_size, threads", [
    ("mlp", (1, 8, 8), 32, 1), ("mlp", (1, 8, 8), 4096, 8), ("cifar7", (3, 28, 28), 128, 8),
    ("cifar7", (3, 28, 28), 1, 8), ("resnet18", (3, 32, 32), 32, 8),
])  # fmt: skip
def test_a_minibatch_too_small_to_be_worth_dividing_gets_one_thread(name, shape, batch_size, threads):
    model = models.build(name, shape=shape, classes=10)
    assert models.worth_threads(model, shape, batch_size, 8) == threads
    assert models.worth_threads(model, shape, batch_size, 1) == models.worth_threads(model, shape, batch_size, 0) == 1
