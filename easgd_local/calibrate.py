"""BatchNorm statistics computed anew, for weights that no training step has seen, such as the center's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any]) -> None:
    """Replaces the running statistics of every BatchNorm of `model` by the mean of those of `batches`, in place.

    A batch is what the model takes, or a tuple or list that begins with it, as a DataLoader gives. Nothing but the
    statistics changes: dropout is off meanwhile, and afterwards each module is in the mode in which it was. As
    torch.optim.swa_utils.update_bn does (Izmailov et al. 2018, arXiv:1803.05407), which leaves dropout on.

    Raises `ValueError` when there is no batch.

    >>> import torch
    >>> norm = torch.nn.BatchNorm1d(1)
    >>> recalibrate(norm, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
    >>> norm.running_mean, norm.running_var
    (tensor([4.]), tensor([2.]))
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    if not norms:
        return
    modes, momenta = {module: module.training for module in model.modules()}, [norm.momentum for norm in norms]
    device, count = next(model.parameters()).device, 0
    model.eval()
    try:
        for batch in batches:
            for norm in norms if not count else ():
                norm.reset_running_stats()
                norm.momentum = None  # a plain average over the batches to come
                norm.train()
            inputs: Tensor = batch[0] if isinstance(batch, tuple | list) else batch
            model(inputs.to(device))
            count += 1
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if not count:
        raise ValueError("batches: there is none, and statistics of nothing do not exist; give at least one batch.")
