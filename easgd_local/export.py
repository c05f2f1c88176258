"""The center of a run as one file that plain torch loads, without this package."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from easgd_local import checkpoint, models
from easgd_local.centers import FILE, load_center
from easgd_local.config import Config
from easgd_local.data import Dataset
from easgd_local.flat import Flat
from easgd_local.prepare import load
from easgd_local.runfolder import saved_config, saved_values
from easgd_local.wording import count_text

SUFFIXES = (".pt", ".safetensors", ".pt2")


def export(run: str, to: str | None = None, step: int | None = None) -> Iterator[str]:
    """Writes the center of the run in folder `run`, as it was at its end, at the checkpoint of step `step`, or at
    the newest of these; says what it has written.

    to: the file, a state dict (.pt, .safetensors) or a program of torch.export with the network in it (.pt2); default
    center.pt in the run folder.

    Raises `ValueError` where that cannot be, `OSError` where the file cannot be written.
    """
    folder = Path(run)
    file = folder / "center.pt" if to is None else Path(to)
    values = saved_values(folder, "run")
    _check_file(file)
    chosen = _choose(folder, step)
    built_in = _BuiltIn.of(saved_config(folder, "run")) if "data" in values and _needs_model(chosen, file) else None
    if built_in is None and _needs_model(chosen, file):
        raise ValueError(
            f"run={run}: the model is a loop's own, which knows it alone; choose .pt or .safetensors at the end of a "
            f"run, and for one that was killed continue it with resume= and stop it by Ctrl-C."
        )
    if chosen.checkpoint is None:
        state: Mapping[str, Tensor] = load_center(folder)
    else:
        assert built_in is not None
        state = built_in.state_at(chosen.checkpoint)
    _write(file, state, built_in)
    numbers = sum(one.numel() for one in state.values() if one.is_floating_point())
    yield f"center   {run} at step {count_text(chosen.t)}, {numbers:,} numbers"
    yield f"file     {file}, {file.stat().st_size / 2**20:.2f} MiB"
    if file.suffix == ".pt2":
        assert built_in is not None
        sizes = ", ".join(map(str, built_in.dataset.input_shape))
        yield f"input    float32[b, {sizes}]: the middle of a picture, its pixels times {built_in.dataset.scale:g}"
        yield f"answers  float32[b, {len(built_in.dataset.classes)}]: {_names(built_in.dataset.classes)}"
    yield f"load     {_how_to_load(file)}"


@dataclass(frozen=True)
class _Chosen:
    """A moment of a run: its end, or a checkpoint."""

    t: int
    checkpoint: Path | None


def _choose(folder: Path, step: int | None) -> _Chosen:
    known = {int(path.name.removeprefix("step-")): path for path in checkpoint.steps(folder)}
    found = [_Chosen(t, path) for t, path in sorted(known.items())]
    summary = folder / "summary.json"
    if summary.exists() and (folder / FILE).exists():
        found.append(_Chosen(json.loads(summary.read_text())["steps"], None))
    if not found:
        raise ValueError(
            f"run={folder}: has no center yet, neither of its end nor in a checkpoint; wait for the end, or for a "
            f"checkpoint (--checkpoint-every)."
        )
    matching = [one for one in found if step in (None, one.t)]
    if not matching:
        others = ", ".join(dict.fromkeys(str(one.t) for one in found))
        raise ValueError(f"step={step}: the run in {folder} has its center of {others}; choose one of them.")
    return max(matching, key=lambda one: (one.t, one.checkpoint is None))


def _check_file(file: Path) -> None:
    if file.suffix not in SUFFIXES:
        raise ValueError(
            f"to={file}: the ending says what is written: .pt or .safetensors for the state dict, .pt2 for a program "
            f"of torch.export; choose one of them."
        )
    if file.exists():
        raise ValueError(f"to={file}: exists already; remove it, or choose another with --to.")
    if not file.parent.is_dir():
        raise ValueError(f"to={file}: there is no folder {file.parent}; make it, or choose another with --to.")


def _needs_model(chosen: _Chosen, file: Path) -> bool:
    return chosen.checkpoint is not None or file.suffix == ".pt2"


@dataclass(frozen=True)
class _BuiltIn:
    """A run of the built-in loop: its network, and the data that say how large it is."""

    config: Config
    dataset: Dataset
    model: torch.nn.Module

    @classmethod
    def of(cls, config: Config) -> _BuiltIn:
        dataset = load(config)
        shape, classes = dataset.input_shape, len(dataset.classes)
        return cls(config, dataset, models.build(config.model, shape=shape, classes=classes).eval())

    def state_at(self, folder: Path) -> dict[str, Tensor]:
        """The center of a checkpoint under the network's own names."""
        checkpoint.read(folder)
        vectors, flat = checkpoint.load_vectors(folder, FILE), Flat(self.model)
        values = vectors[self.config.rule.reported].astype(np.float32)
        values[flat.buffers] = vectors["c"][flat.buffers]
        return flat.state_dict(values)

    def program(self, state: Mapping[str, Tensor]) -> Any:
        """The network with these values in evaluation mode, for any number of pictures."""
        self.model.load_state_dict(state)
        pictures = torch.zeros(2, *self.dataset.input_shape)
        return torch.export.export(self.model, (pictures,), dynamic_shapes=({0: torch.export.Dim("b")},))


def _write(file: Path, state: Mapping[str, Tensor], built_in: _BuiltIn | None) -> None:
    """The whole file, or none."""
    fresh = file.with_name(f".{file.stem}.partial{file.suffix}")
    try:
        match file.suffix:
            case ".pt":
                torch.save(dict(state), fresh)
            case ".safetensors":
                safetensors.torch.save_file(dict(state), fresh)
            case ".pt2":
                assert built_in is not None
                torch.export.save(built_in.program(state), fresh)
        os.replace(fresh, file)
    finally:
        fresh.unlink(missing_ok=True)


def _how_to_load(file: Path) -> str:
    match file.suffix:
        case ".pt":
            return f"model.load_state_dict(torch.load({file.name!r}))"
        case ".safetensors":
            return f"model.load_state_dict(safetensors.torch.load_file({file.name!r}))"
    return f"torch.export.load({file.name!r}).module()(pictures)"


def _names(classes: Any) -> str:
    names = [str(one) for one in classes]
    return ", ".join(names if len(names) <= 10 else [*names[:9], "..."])
