"""The center as a result: a plain state dict, and where the run that made it lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

FILE = "center.safetensors"


class CenterState(dict[str, Tensor]):
    """The center's state dict: name -> tensor on the CPU, for `model.load_state_dict(center)`.

    folder: the run folder.
    summary: what its summary.json holds.

    >>> import torch
    >>> center = CenterState({"weight": torch.zeros(1, 2), "bias": torch.ones(1)}, Path("runs/mine"))
    >>> torch.nn.Linear(2, 1).load_state_dict(center)
    <All keys matched successfully>
    """

    def __init__(self, tensors: dict[str, Tensor], folder: Path, summary: dict[str, Any] | None = None) -> None:
        super().__init__(tensors)
        self.folder, self.summary = folder, summary or {}


def load_center(path: str | Path) -> CenterState:
    """The center of a run that is over: `path` is the run's folder, or a safetensors file of it.

    Raises `ValueError` where there is none.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    try:
        summary = file.with_name("summary.json")
        return CenterState(load_file(file), file.parent, json.loads(summary.read_text()) if summary.exists() else None)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{file}: no center can be read there ({error}); give the folder of a run that has ended, or the file "
            f"{FILE} in it."
        ) from error
