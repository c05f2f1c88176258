"""The scale of the loss in float16, whose gradients would otherwise vanish below its smallest number.

The loss is multiplied by a scale before the backward pass and g divided by it afterwards. A g that is not finite counts
as 0 and halves the scale; 2000 finite ones in a row double it: the scheme of Micikevicius et al. 2018
(arXiv:1710.03740), with the numbers of torch.amp.GradScaler. All on the device, so that nobody waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

INITIAL, LARGEST, PATIENCE = 2.0**16, 2.0**24, 2000
STATE = "loss_scale"  # a vector of two floats: the scale, 0 for the initial one, and how many g in a row were finite


def scale_of(state: Tensor) -> Tensor:
    """What the loss is to be multiplied by."""
    return torch.where(state[0] == 0, torch.full_like(state[0], INITIAL), state[0])


@torch.no_grad()
def unscale(g: Tensor, scale: Tensor, state: Tensor) -> None:
    """After the backward pass of the scaled loss: g (float32[n]) <- g / scale, 0 where it is not finite; `state` goes
    on."""
    g.div_(scale)
    finite = torch.isfinite(g).all()
    g.masked_fill_(~finite, 0.0)
    row = torch.where(finite, state[1] + 1, torch.zeros_like(state[1]))
    grows = row >= PATIENCE
    grown = torch.where(grows, (2 * scale).clamp(max=LARGEST), scale)
    state[0] = torch.where(finite, grown, (scale / 2).clamp(min=1.0))
    state[1] = torch.where(grows, torch.zeros_like(row), row)
