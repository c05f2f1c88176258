"""From a rule to its listing in tests/paper.py: what a run of it must compute, worked out in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from easgd_local.rules.admm import ADMM
from easgd_local.rules.apam import APAM
from easgd_local.rules.asgd import ASGD, MVASGD
from easgd_local.rules.base import Rule
from easgd_local.rules.diloco import DiLoCo
from easgd_local.rules.downpour import ADownpour, Downpour, MVADownpour
from easgd_local.rules.eamsgd import EAMSGD
from easgd_local.rules.eamsgd_sync import EAMSGDSync
from easgd_local.rules.easgd import EASGD
from easgd_local.rules.easgd_gs import EASGDGaussSeidel
from easgd_local.rules.easgd_sync import EASGDSync
from easgd_local.rules.local import Local
from easgd_local.rules.localsgd import LocalSGD
from easgd_local.rules.mdownpour import MDownpour
from easgd_local.rules.msgd import MSGD
from easgd_local.rules.passm import PASSM, PASSMPlus
from easgd_local.rules.sgd import SGD
from easgd_local.rules.sma import SMA
from tests import paper
from tests.paper import Vector


class State(dict[str, Vector]):
    """The vectors at the end by name: c, z, ... of the center, and x0, x1, ... of the workers."""


def compute(
    rule: Rule, start: Vector, workers: int, steps: int, gradient: paper.Gradient, blocks: Sequence[slice],
    own: Sequence[slice] = (),
) -> State:  # fmt: skip
    """The end of a run of `steps` steps from `start`, whose float type everything has.

    `blocks` are those of the center, visited in the strict order; own[i] is what worker i owns of a divided model.
    """
    c, x = start.copy(), [start.copy() for _ in range(workers)]
    each = [np.zeros_like(start) for _ in range(workers)]
    shared = {name: start.copy() if name in rule.copies else np.zeros_like(start) for name in rule.shared}
    order, span = paper.round_robin(workers, blocks), range(steps)
    match rule:
        case EASGD():
            paper.easgd(
                x, c, gradient, eta=rule.lr, alpha=rule.moving_rate(workers), tau=rule.tau, steps=span, order=order
            )
        case EAMSGD():
            paper.eamsgd(
                x, each, c, gradient, eta=rule.lr, alpha=rule.moving_rate(workers), delta=rule.momentum,
                tau=rule.tau, steps=span, order=order,
            )  # fmt: skip
        case EASGDSync():
            paper.easgd_sync(x, c, gradient, eta=rule.lr, alpha=rule.moving_rate(workers), tau=rule.tau, steps=span)
        case EAMSGDSync():
            paper.eamsgd_sync(
                x, each, c, gradient, eta=rule.lr, alpha=rule.moving_rate(workers), delta=rule.momentum,
                tau=rule.tau, steps=span,
            )  # fmt: skip
        case EASGDGaussSeidel():
            paper.easgd_gauss_seidel(
                x, c, gradient, eta=rule.lr, alpha=rule.moving_rate(workers), tau=rule.tau, steps=span, order=order,
                first=rule.first,
            )  # fmt: skip
        case MVADownpour() | ADownpour():
            a = average_of(rule.average_rate if isinstance(rule, MVADownpour) else None)
            paper.downpour(x, each, c, gradient, eta=rule.lr, tau=rule.tau, steps=span, order=order, z=shared["z"], a=a)
        case Downpour():
            paper.downpour(x, each, c, gradient, eta=rule.lr, tau=rule.tau, steps=span, order=order)
        case MDownpour():
            paper.mdownpour(x, shared["v"], c, gradient, eta=rule.lr, delta=rule.momentum, steps=span, order=order)
        case ADMM():
            paper.admm_incremental(x, each, c, gradient, eta=rule.lr, rho=rule.rho, steps=span, order=order)
        case APAM():
            paper.apam(
                x, shared["m"], shared["v"], shared["vhat"], c, gradient, eta=rule.lr, beta1=rule.beta1,
                beta2=rule.beta2, epsilon=rule.epsilon, delay=rule.delay, steps=span, order=order,
            )  # fmt: skip
        case PASSMPlus():
            paper.passm_plus(
                x, each, c, gradient, eta=rule.lr, mu=rule.momentum, own=own, full_steps=rule.full_steps, steps=span,
                order=order,
            )  # fmt: skip
        case PASSM():
            paper.passm(x, each, c, gradient, eta=rule.lr, mu=rule.momentum, own=own, steps=span, order=order)
        case LocalSGD():
            paper.localsgd(x, c, mover(rule, x, each, gradient), tau=rule.tau, steps=span)
        case SMA():
            move = mover(rule, x, each, gradient)
            paper.sma(x, shared["u"], shared["s"], c, move, mu=rule.center_momentum, tau=rule.tau, steps=span)
        case DiLoCo():
            move = mover(rule, x, each, gradient)
            paper.diloco(
                x,
                shared["u"],
                shared["s"],
                c,
                move,
                eta=rule.outer_lr,
                mu=rule.outer_momentum,
                tau=rule.tau,
                steps=span,
            )
        case MVASGD() | ASGD():
            a = average_of(rule.average_rate if isinstance(rule, MVASGD) else None)
            paper.sgd(c, gradient, eta=rule.lr, steps=span, z=shared["z"], a=a)
            x = [c]
        case SGD():
            paper.sgd(c, gradient, eta=rule.lr, steps=span)
            x = [c]
        case MSGD():
            paper.msgd(c, each[0], gradient, eta=rule.lr, delta=rule.momentum, steps=span)
            x = [c]
        case _:
            raise AssertionError(f"no listing for {rule.name}")
    return State({"c": c} | shared | {f"x{i}": xi for i, xi in enumerate(x)})


def average_of(constant: float | None) -> Callable[[int], float]:
    """a(k): 1/(k + 1), or the constant."""
    return lambda k: 1 / (k + 1) if constant is None else constant


def mover(rule: Local, x: list[Vector], v: list[Vector], gradient: paper.Gradient) -> paper.Move:
    """One step of the local optimizers that are our own: sgd and msgd."""
    eta, delta = x[0].dtype.type(rule.lr), x[0].dtype.type(rule.momentum)

    def sgd(i: int, t: int) -> None:
        x[i][:] = x[i] - eta * gradient(i, t, x[i].copy())

    def msgd(i: int, t: int) -> None:
        v[i][:] = delta * v[i] - eta * gradient(i, t, x[i] + delta * v[i])
        x[i][:] = x[i] + v[i]

    return {"sgd": sgd, "msgd": msgd}[rule.inner]
