"""What a loop attaches: the objects, what all workers must agree on, and what cannot be attached."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from easgd_local.batches import Positions
from easgd_local.child import Refusal
from easgd_local.flat import Entry, Naming
from easgd_local.rules.base import Rule
from easgd_local.rules.eamsgd import EAMSGD
from easgd_local.rules.eamsgd_sync import EAMSGDSync
from easgd_local.rules.local import Local
from easgd_local.stepping import owned

BUFFERS = ("average", "recalibrate", "local")
OPTIMIZER_STATES = ("local", "reset")
Evaluation = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class Proposal:
    """What a worker attaches: all workers must propose the same. `naming` is not compared."""

    rule: Rule
    turns: str
    buffers: str
    evaluates: bool
    evaluate_every: int
    block_bytes: int
    optimizer_state: str
    model: str
    entries: tuple[Entry, ...]
    n: int
    parameters: int
    dtypes: tuple[str, ...]  # of the entries' tensors
    t: int
    naming: Naming

    @property
    def dtype(self) -> str:
        """The half precision of some of the parameters, or float32."""
        return next((one for one in self.dtypes if one != "float32"), "float32")

    @property
    def own_vectors(self) -> tuple[str, ...]:
        """Names of the vectors of n floats at each worker, beside the model's own gradients and optimizers. `halves`
        are parameters of 2 bytes, and gradients of 4 while an optimizer steps, reckoned as one."""
        halves = () if self.dtype == "float32" else ("halves",)
        return ("x", *halves, *self.rule.over_local, *self.rule.over_scratch)


@dataclass(frozen=True)
class Attachment:
    """The objects of the user's loop that a worker looks after."""

    model: nn.Module
    optimizers: tuple[Optimizer, ...]
    optimizer_state: str
    evaluate: Evaluation | None
    calibrate_on: Iterable[Any] | None
    stateful: tuple[Any, ...]
    positions: Positions
    generator: torch.Generator


def plain_model(model: nn.Module) -> nn.Module:
    """The module itself, without what torch.compile or a data-parallel wrapper has put around it."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DataParallel", "DistributedDataParallel"):
            inner = model.module
        if inner is None:
            return model
        model = inner


def fitted(rule: Rule, optimizer: Optimizer) -> Rule:
    """The rule with the optimizer's step size; `Refusal` where the two do not go together."""
    if not isinstance(rule, Rule):
        raise Refusal(f"rule={rule!r}: must be a rule with its hyperparameters, such as EASGD(tau=10, beta=0.9).")
    if not rule.attachable:
        raise Refusal(
            f"rule={rule.name}: makes the steps itself, so it cannot be laid over an optimizer; attach EASGD, "
            f"Downpour, LocalSGD, SMA or DiLoCo, or train with it by easgd_local.train."
        )
    group = optimizer.param_groups[0]
    usual: Any = type(rule)()
    lr = float(group["lr"]) or float(group.get("initial_lr", 0)) or usual.lr  # a warm-up may begin at 0
    if isinstance(rule, Local) and rule.inner != usual.inner:
        raise Refusal(
            f"inner={rule.inner}: the local optimizer is the {type(optimizer).__name__} that is attached; leave "
            "inner out."
        )
    if rule.lr not in (lr, usual.lr):
        raise Refusal(
            f"lr={rule.lr} in the rule and {lr} in the optimizer: the step size is the optimizer's; leave lr out of "
            f"the rule."
        )
    if isinstance(rule, EAMSGD | EAMSGDSync):
        theirs = group.get("momentum") if isinstance(optimizer, SGD) and group.get("nesterov") else None
        if theirs != rule.momentum:
            raise Refusal(
                f"rule={rule.name} with momentum={rule.momentum} over {type(optimizer).__name__} with Nesterov "
                f"momentum {theirs}: the momentum is the optimizer's; use torch.optim.SGD(momentum={rule.momentum}, "
                f"nesterov=True), or the rule easgd, which goes with every optimizer."
            )
    with refusing():
        return replace(rule, lr=lr)


def checked_model(model: Any, device: torch.device) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise Refusal(f"model={type(model).__name__}: must be a torch.nn.Module; attach(model, optimizer, rule).")
    for name, parameter in model.named_parameters():
        if parameter.device != device:
            raise Refusal(
                f"{name} is on {parameter.device} and this worker computes on {device}; write model.to(worker.device) "
                f"before the optimizer is made and the model attached."
            )
    return model


def check_optimizers(model: nn.Module, optimizers: tuple[Any, ...]) -> None:
    if not optimizers:
        raise Refusal("optimizer: there is none; attach(model, optimizer, rule) needs at least one.")
    for one in optimizers:
        if not isinstance(one, Optimizer):
            raise Refusal(
                f"optimizer={type(one).__name__}: must be a torch.optim.Optimizer, whose steps can be seen; derive it "
                f"from that class."
            )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    theirs = owned(optimizers)
    if foreign := theirs - names.keys():
        raise Refusal(
            f"optimizer: {len(foreign)} of its {len(theirs)} parameters do not belong to the model, so what it moves "
            f"would not be exchanged; make it with model.parameters() of the very model that is attached."
        )


def checked_stateful(stateful: Any) -> tuple[Any, ...]:
    stateful = stateful if isinstance(stateful, list | tuple) else (stateful,)
    for one in stateful:
        if not (hasattr(one, "state_dict") and hasattr(one, "load_state_dict")):
            raise Refusal(
                f"stateful: {type(one).__name__} has no state_dict and load_state_dict, so it cannot be in a "
                f"checkpoint; leave it out."
            )
    return tuple(stateful)


def check_words(
    rule: Rule, turns: str | None, buffers: str, optimizer_state: str, evaluate_every: int, calibrate_on: Any
) -> None:
    for name, value, choices in (
        ("turns", turns, (None, *rule.orders)), ("buffers", buffers, BUFFERS),
        ("optimizer_state", optimizer_state, OPTIMIZER_STATES),
    ):  # fmt: skip
        if value not in choices:
            raise Refusal(
                f"{name}={value}: with the rule {rule.name} it must be one of "
                f"{', '.join(map(str, filter(None, choices)))}; choose one of them."
            )
    if (buffers == "recalibrate") != (calibrate_on is not None):
        raise Refusal(
            f"buffers={buffers} {'with' if calibrate_on is not None else 'without'} calibrate_on: the batches to "
            f"compute statistics on belong to buffers=recalibrate, which needs them; give both or neither."
        )
    if isinstance(evaluate_every, bool) or not isinstance(evaluate_every, int) or evaluate_every < 0:
        raise Refusal(f"evaluate_every={evaluate_every!r}: must be a whole number of steps; 0 for only at the end.")


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """A `ValueError` in here is a mistake that ends the run."""
    try:
        yield
    except ValueError as error:
        raise Refusal(str(error)) from error
