"""The networks: three of our own, and every torchvision classifier by its name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from difflib import get_close_matches

import torch
from torch import Tensor, nn

Shape = tuple[int, int, int]
"""(channels, height, width) as it reaches the network, after the crop."""

# Multiplications in a minibatch's forward pass (of 32: `mlp` 6e5, `cifar7` 5e8) where two threads begin to gain 10 to
# 20 % over one: on an idle Intel Xeon of two cores 0 % at 5e5, 8 % at 2e6, 18 % at 9e6, 80 % at 1.4e8.
DIVISIBLE = 5e6

AUXILIARY = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}
"""torchvision's networks with side outputs are built without them: a network returns one tensor, in training too."""


def build(name: str, *, shape: Shape, classes: int) -> nn.Module:
    """A fresh network `name` on the CPU: inputs float32[b, *shape], outputs float32[b, classes].

    One of NAMES, or any classifier of torchvision, without pretrained weights. Initial values come from torch's global
    generator, so seed it first.
    """
    if classes < 2:
        raise ValueError(f"classes={classes}: a classifier tells at least two apart; use data with more classes.")
    if name in OURS:
        return OURS[name](shape, classes)
    if not known(name):
        raise ValueError(_unknown(name))
    from torchvision.models import get_model

    model = get_model(name, weights=None, num_classes=classes, **AUXILIARY.get(name, {}))
    check(model, shape)
    return model


def known(name: str) -> bool:
    """Whether `build` has a network of this name."""
    return name in OURS or name in _torchvision_names()


def check(model: nn.Module, shape: Shape) -> None:
    """Raises ValueError unless `model` maps one picture of `shape` to one row of scores.

    A dry pass over a zero picture in evaluation mode: parameters, BatchNorm statistics and modes stay as they were.
    """
    modes = [(module, module.training) for module in model.modules()]
    weight = next(model.parameters())
    model.eval()
    try:
        with torch.no_grad():
            scores = model(torch.zeros((1, *shape), device=weight.device, dtype=weight.dtype))
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise ValueError(
            f"{type(model).__name__} does not take pictures of {_spelt(shape)}: "
            f"{str(error).strip().splitlines()[0].rstrip('.')}; use pictures of the size it was made for, "
            f"or another model."
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    if not isinstance(scores, torch.Tensor) or scores.ndim != 2:
        raise ValueError(
            f"{type(model).__name__} returns {type(scores).__name__}{list(getattr(scores, 'shape', ()))}: "
            f"a classifier returns one tensor of shape [batch, classes]; wrap the model so that it does."
        )


def mlp(shape: Shape, classes: int) -> nn.Module:
    """A small perceptron: linear 128, ReLU, linear 64, ReLU, linear; torch's default start."""
    channels, height, width = shape
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * height * width, 128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


def cifar7(shape: Shape, classes: int) -> nn.Module:
    """The 7-layer CIFAR network of Zhang et al. 2015 (arXiv:1412.6651, section 5): 351,946 parameters at (3, 28, 28)
    and 10 classes.

    Biases start at 0; weights as torch starts them, uniform in ±1/√fan_in, since the paper does not say.
    """

    def features(channels: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, 64, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(128, 64, 3),
            nn.ReLU(),
            nn.Flatten(),
        )

    length = _length("cifar7", features, shape, usual=28)
    model = nn.Sequential(
        *features(shape[0]), nn.Linear(length, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, classes)
    )
    return _start_biases(model, 0.0)


def imagenet11(shape: Shape, classes: int) -> nn.Module:
    """The 11-layer ImageNet network of Zhang et al. 2015 (arXiv:1412.6651, section 5): 61,128,808 parameters at
    (3, 221, 221) and 1000 classes.

    Biases start at 0.1; weights as torch starts them, uniform in ±1/√fan_in, since the paper does not say.
    """

    def features(channels: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, 96, 7, stride=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=3),
            nn.Conv2d(96, 256, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(256, 384, 3),
            nn.ReLU(),
            nn.Conv2d(384, 384, 2),
            nn.ReLU(),
            nn.Conv2d(384, 256, 2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )

    length = _length("imagenet11", features, shape, usual=221)
    model = nn.Sequential(
        *features(shape[0]),
        nn.Linear(length, 4096),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(4096, classes),
    )
    return _start_biases(model, 0.1)


OURS: dict[str, Callable[[Shape, int], nn.Module]] = {"mlp": mlp, "cifar7": cifar7, "imagenet11": imagenet11}
NAMES = tuple(OURS)


def _length(name: str, features: Callable[[int], nn.Sequential], shape: Shape, *, usual: int) -> int:
    """The number of features that `shape` leads to, computed on torch's meta device: no memory, no arithmetic."""
    with torch.device("meta"):
        try:
            return features(shape[0])(torch.empty(1, *shape)).numel()
        except RuntimeError as error:
            raise ValueError(
                f"{name} has nothing left of a picture of {_spelt(shape)}: its convolutions and poolings "
                f"are made for {usual} x {usual}; use larger pictures, or another model."
            ) from error


def _start_biases(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(value)
    return model


def _torchvision_names() -> list[str]:
    import torchvision.models

    return torchvision.models.list_models(module=torchvision.models)


def _unknown(name: str) -> str:
    near = get_close_matches(name, [*NAMES, *_torchvision_names()], n=1)
    return (
        f"model {name!r} is not known{f', did you mean {near[0]!r}' if near else ''}: ours are {', '.join(NAMES)}, "
        f"and any classifier of torchvision goes by its name; list those with torchvision.models.list_models("
        f"module=torchvision.models)."
    )


def _spelt(shape: Shape) -> str:
    channels, height, width = shape
    return f"{channels} channel{'s' * (channels != 1)} and {height} x {width} pixels"


def worth_threads(model: nn.Module, shape: Shape, batch_size: int, cores: int) -> int:
    """Threads for a worker that has so many cores: one for each, but one alone where a minibatch is so small that
    threads would wait for each other longer than they compute."""
    if cores < 2:
        return 1
    weights = sum(one.numel() for one in model.parameters())  # of large models enough is known without a forward pass
    large = batch_size * weights >= DIVISIBLE or batch_size * multiplications(model, shape) >= DIVISIBLE
    return cores if large else 1


def multiplications(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Those of weights in a forward pass of one picture: each weight matrix or kernel once for every place."""
    counted = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        nonlocal counted
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim >= 2 and isinstance(output, Tensor):
            counted += weight.numel() * output.numel() // weight.shape[0]

    twin = copy.deepcopy(model).eval()
    for module in twin.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        twin(torch.zeros(1, *shape))
    return counted
