"""The center of a run as one file that plain torch loads, without this package."""

from __future__ import annotations

import io
import json
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
from easgd_local.flat import Flat
from easgd_local.runfolder import Pictures, saved_config, saved_pictures, saved_values
from easgd_local.whole_file import whole_file
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
    chosen = _choose(folder, step)
    _check_file(file)
    network = None
    if chosen.checkpoint is not None or file.suffix == ".pt2":
        if "data" not in values:
            raise ValueError(
                f"run={run}: the model is a loop's own, which knows it alone; choose .pt or .safetensors at the end of "
                f"a run, and for one that was killed continue it with resume= and stop it by Ctrl-C."
            )
        network = _Network(saved_config(folder, "run"), saved_pictures(folder, "run"))
    if chosen.checkpoint is None:
        state: Mapping[str, Tensor] = load_center(folder)
    else:
        assert network is not None
        state = network.state_at(chosen.checkpoint)
    content = _content(file.suffix, state, network)
    _write(file, content)
    numbers = sum(one.numel() for one in state.values() if one.is_floating_point())
    yield f"center   {run} at step {count_text(chosen.t)}, {numbers:,} numbers"
    yield f"file     {file}, {len(content) / 2**20:.2f} MiB"
    if network is not None and file.suffix == ".pt2":
        sizes = ", ".join(map(str, network.pictures.shape))
        yield f"input    float32[b, {sizes}]: the middle of a picture, its pixels times {network.pictures.scale:g}"
        yield f"answers  float32[b, {network.pictures.classes}], a class each"
    yield f"load     {_how_to_load(file)}"


@dataclass(frozen=True)
class _Chosen:
    """A moment of a run: its end, or a checkpoint."""

    t: int
    checkpoint: Path | None


def _choose(folder: Path, step: int | None) -> _Chosen:
    known = {int(path.name.removeprefix("step-")): path for path in checkpoint.steps(folder)}
    found = [_Chosen(t, path) for t, path in sorted(known.items())]
    if (folder / "summary.json").exists() and (folder / FILE).exists():
        found.append(_Chosen(_steps_made(folder / "summary.json"), None))
    if not found:
        raise ValueError(
            f"run={folder}: has no center yet, neither of its end nor in a checkpoint; wait for the end, or for a "
            f"checkpoint (--checkpoint-every)."
        )
    matching = [one for one in found if step in (None, one.t)]
    if not matching:
        others = ", ".join(dict.fromkeys(str(one.t) for one in found))
        raise ValueError(f"step={step}: {folder} holds the center of step {others}; choose one of them.")
    return max(matching, key=lambda one: (one.t, one.checkpoint is None))


def _steps_made(summary: Path) -> int:
    try:
        return int(json.loads(summary.read_text())["steps"])
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"{summary}: is damaged ({type(error).__name__}: {error}); remove it to export a checkpoint."
        ) from error


def _check_file(file: Path) -> None:
    if file.suffix not in SUFFIXES:
        raise ValueError(
            f"to={file}: the ending says what is written: .pt or .safetensors for the state dict, .pt2 for a program "
            f"of torch.export; choose one of them."
        )
    if file.exists() or file.is_symlink():
        raise ValueError(f"to={file}: exists already; remove it, or choose another with --to.")
    if not file.parent.is_dir():
        raise ValueError(f"to={file}: there is no folder {file.parent}; make it, or choose another with --to.")


class _Network:
    """The network of a run of the built-in loop."""

    def __init__(self, config: Config, pictures: Pictures) -> None:
        self.pictures, self._reported = pictures, config.rule.reported
        self._model = models.build(config.model, shape=pictures.shape, classes=pictures.classes).eval()

    def state_at(self, folder: Path) -> dict[str, Tensor]:
        """The center of a checkpoint under the network's own names."""
        manifest, flat = checkpoint.read(folder), Flat(self._model)
        vectors = checkpoint.load_vectors(folder, FILE)
        if manifest.n != flat.n or not {"c", self._reported} <= vectors.keys():
            raise ValueError(
                f"{folder}: is of another network or rule than config.json says; restore that file of the run."
            )
        values = vectors[self._reported].astype(np.float32)
        values[flat.buffers] = vectors["c"][flat.buffers]
        return flat.state_dict(values)

    def program(self, state: Mapping[str, Tensor]) -> Any:
        """The network with these values in evaluation mode, for any number of pictures."""
        try:
            self._model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{FILE}: is of another network than config.json says; restore that file.") from error
        pictures = torch.zeros(2, *self.pictures.shape)
        return torch.export.export(self._model, (pictures,), dynamic_shapes=({0: torch.export.Dim("b")},))


def _content(suffix: str, state: Mapping[str, Tensor], network: _Network | None) -> bytes:
    if suffix == ".safetensors":
        return safetensors.torch.save(dict(state))
    file = io.BytesIO()  # torch itself does not say in so many words that a disk is full
    if suffix == ".pt":
        torch.save(dict(state), file)
    else:
        assert network is not None
        torch.export.save(network.program(state), file)
    return file.getvalue()


def _write(file: Path, content: bytes) -> None:
    """The whole file, or none."""
    try:
        with whole_file(file) as part:
            part.write_bytes(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error


def _how_to_load(file: Path) -> str:
    match file.suffix:
        case ".pt":
            return f"model.load_state_dict(torch.load({str(file)!r}))"
        case ".safetensors":
            return f"model.load_state_dict(safetensors.torch.load_file({str(file)!r}))"
    return f"torch.export.load({str(file)!r}).module()(pictures)"
