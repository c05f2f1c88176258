"""The largest curvature of the training loss where a run starts, estimated by Lanczos steps on one minibatch."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from easgd_local.data import Dataset, Sampler, prepare, step_rng
from easgd_local.models import multiplications

LANCZOS_STEPS = 6  # within 1 % of the largest eigenvalue where networks start, see the tests
SAMPLES = 32
MULTIPLICATIONS = 6e8  # in a forward pass of the samples, at most: `cifar7` has 5e8, and the estimate takes a second


def start_curvature(model: nn.Module, dataset: Dataset, sampler: Sampler, weight_decay: float) -> float | None:
    """h at the model's values, to three digits: of the mean loss over the first samples of the sampler, plus λ.

    A minibatch is sharper than the whole set, and training itself may lead to where it is sharper or flatter. None
    for a model that is too large, cannot be copied, refuses the samples, has an operation without a second derivative,
    or no finite curvature above zero; and for one with BatchNorm, whose sharp start says nothing: shufflenet's would
    allow steps of 4.7e-5, and trains with 0.05. The model and torch's generator stay as they are.
    """
    with _one_thread(), torch.random.fork_rng(devices=[]):
        try:
            if _normalizes_batches(model) or not _is_cheap(model, dataset.input_shape):
                return None
            torch.manual_seed(sampler.seed)
            twin = copy.deepcopy(model).train()  # which may count or keep what it has seen
            loss = _first_loss(twin, dataset, sampler)
            h = largest_curvature(loss, [one for one in twin.parameters() if one.requires_grad]) + weight_decay
        except Exception:  # whatever a model raises: no estimate; what matters the run itself will tell
            return None
    return float(f"{h:.3g}") if math.isfinite(h) and h > 0 else None


def _first_loss(model: nn.Module, dataset: Dataset, sampler: Sampler) -> Tensor:
    [(images, labels)] = dataset.train.stream([sampler.indices(0)[:SAMPLES]])
    inputs = prepare(images, dataset, step_rng(sampler.seed, 0, 0))
    return F.cross_entropy(model(torch.from_numpy(inputs)), torch.from_numpy(labels))


def largest_curvature(loss: Tensor, parameters: list[nn.Parameter], steps: int = LANCZOS_STEPS) -> float:
    """The largest eigenvalue of the Hessian that shows in the Krylov space of the gradient: never above the true one.

        T = Vᵀ H V,   V an orthonormal basis of span(g, Hg, ..., H^{k-1} g),   k at most `steps`

    That is the space in which descent from here begins. A Hessian-vector product is one more backward pass. 0 where
    the gradient is zero.
    """
    g = _joined(torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True))

    def product(v: Tensor) -> Tensor:
        # Not grad_outputs: torch imports sympy for them, a quarter of a second.
        parts = torch.autograd.grad(g @ v.float(), parameters, retain_graph=True, materialize_grads=True)
        return _joined(parts).double()

    return _largest_ritz_value(product, g.detach().double(), steps)


def _largest_ritz_value(product: Callable[[Tensor], Tensor], v: Tensor, steps: int) -> float:
    size, steps = float(v.norm()), min(steps, v.numel())
    if not 0 < size < math.inf:
        return size
    basis, projected = [v / size], np.zeros((steps, steps))  # VᵀHV, its upper triangle
    for k in range(steps):
        w = product(basis[k])
        for _ in range(2):  # once is not enough in floating point
            for j, u in enumerate(basis):
                part = float(w @ u)
                projected[j, k] += part
                w = w - part * u
        left = float(w.norm())
        if k + 1 == steps or not left > 1e-6 * float(np.abs(projected).max()):  # the space is exhausted, to rounding
            break
        basis.append(w / left)
    used = projected[: len(basis), : len(basis)]
    return float(np.linalg.eigvalsh(used, UPLO="U")[-1]) if np.isfinite(used).all() else math.nan


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The cores are busy with processes that start, and the estimate shall not depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _normalizes_batches(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def _is_cheap(model: nn.Module, shape: tuple[int, int, int]) -> bool:
    weights = sum(one.numel() for one in model.parameters())
    return weights * SAMPLES <= MULTIPLICATIONS and multiplications(model, shape) * SAMPLES <= MULTIPLICATIONS
