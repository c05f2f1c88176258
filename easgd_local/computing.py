"""How a model computes: device, precision, order of pictures in memory, and what torch is told of it."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from easgd_local.data import to_device
from easgd_local.halves import narrow

PRECISIONS = {  # the type of torch's autocast, and that of the parameters
    "fp32": (None, torch.float32),
    "bf16": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float32),
    "bf16-true": (None, torch.bfloat16),
    "fp16-true": (None, torch.float16),
}


@dataclass(frozen=True)
class Computing:
    """How a model computes: on the processor or a GPU (torch's name for it), the precision of forward and backward (one
    of PRECISIONS), and the order of a picture's elements in memory: channel by channel (torch's default), or with the
    channels of each pixel together. `compiled` by torch.compile; on a GPU `deterministic` algorithms only, `tf32` in
    matrix products and convolutions of float32, and the training pictures there."""

    precision: str = "fp32"
    channels_last: bool = False
    device: str = "cpu"
    compiled: bool = False
    deterministic: bool = True
    tf32: bool = False
    pictures_on_device: bool = False

    def context(self) -> contextlib.AbstractContextManager[object]:
        """bfloat16 or float16 where torch holds that to be safe, or the types of inputs and parameters."""
        kind, _ = PRECISIONS[self.precision]
        return contextlib.nullcontext() if kind is None else torch.autocast(self.device, kind)

    def inputs(self, pictures: np.ndarray | Tensor) -> Tensor:
        """[b, C, H, W] on the device, of the same values in the parameters' type: all layers keep the order in memory
        that they are given."""
        made = torch.from_numpy(pictures) if isinstance(pictures, np.ndarray) else pictures
        made = made.contiguous(memory_format=torch.channels_last) if self.channels_last else made
        made = made if made.device.type == self.device else to_device(made, torch.device(self.device))
        return made.to(self.parameter_type)

    def set_up(self) -> None:
        """Makes torch compute so in this process; before it starts CUDA."""
        if self.device == "cpu":
            return
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = self.tf32
        torch.backends.cudnn.benchmark = not self.deterministic
        if self.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may choose as it likes
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # which only helps to find mistakes

    @property
    def parameter_type(self) -> torch.dtype:
        """What the model's parameters are: x itself in float32, or x rounded."""
        return PRECISIONS[self.precision][1]

    @property
    def scales_loss(self) -> bool:
        """Whether the gradients of layers are float16, which has no small numbers."""
        return torch.float16 in PRECISIONS[self.precision]

    def narrowed(self, model: nn.Module) -> nn.Module:
        """The model itself, its parameters now of their type."""
        return model if self.parameter_type == torch.float32 else narrow(model, self.parameter_type)

    def model(self, model: nn.Module) -> nn.Module:
        """The model as it is called."""
        return torch.compile(model) if self.compiled else model  # type: ignore[return-value]


USUAL = Computing()
