"""The folder of a run: claimed complete or not at all, held by one process at a time, its configuration read back."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from easgd_local import hardware
from easgd_local.config import Config
from easgd_local.whole_file import whole_file

T = TypeVar("T")


def claim(out: str | None, name: str, config: dict[str, Any], effective: dict[str, Any]) -> Path:
    """Creates the run folder, complete or not at all: `out`, or one in runs/ with the time and `name`.

    Raises `ValueError` if that cannot be.
    """
    folder = Path("runs" if out is None else out)
    try:
        with contextlib.ExitStack() as undo:
            if out is None:
                folder = _new_name(folder, f"{time.strftime('%Y%m%d-%H%M%S')}-{name}", undo)
            elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise ValueError(
                    f"out={folder}: exists already and is not an empty folder; choose another, or continue the run in "
                    f"it with --resume {folder}."
                )
            _make(folder / "logs", undo)
            write_config(folder, config, effective)
            undo.pop_all()
    except OSError as error:
        where = "" if error.filename in (None, str(folder)) else f"{error.filename}: "
        raise ValueError(
            f"out={folder}: cannot be created ({where}{error.strerror}); choose with --out a place that you "
            f"may write to."
        ) from error
    return folder


def _new_name(parent: Path, name: str, undo: contextlib.ExitStack) -> Path:
    """A folder of its own in `parent`, also when several runs begin in the same second."""
    _make(parent, undo)
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        with contextlib.suppress(FileExistsError):
            (parent / (name + suffix)).mkdir()
            undo.callback((parent / (name + suffix)).rmdir)
            return parent / (name + suffix)
    raise ValueError(f"out={parent / name}: a thousand runs of this name exist already; choose another with --out.")


def _make(folder: Path, undo: contextlib.ExitStack) -> None:
    for one in (*reversed(folder.parents), folder):
        if not one.is_dir():
            one.mkdir()
            undo.callback(one.rmdir)


def write_config(folder: Path, config: dict[str, Any], effective: dict[str, Any]) -> None:
    """Writes config.json: the whole of it, or it stays as it was; `ValueError` where one may not write."""
    text = {
        "config": config,
        "effective": effective,
        "versions": hardware.versions(),
        "hardware": hardware.describe(),
    }
    try:
        with whole_file(folder / "config.json") as part:
            part.write_text(json.dumps(text, indent=1) + "\n")
    except OSError as error:
        raise ValueError(
            f"{folder}: cannot be written to ({error.strerror}); make room, or choose a place that you may write to."
        ) from error


def lock(folder: Path, undo: contextlib.ExitStack) -> int:
    """Holds the run folder against a second process; the lock goes with the descriptor, also when we are killed."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ValueError(
            f"resume={folder}: no such run ({error.strerror}); name the folder of an earlier run."
        ) from error
    undo.callback(os.close, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"resume={folder}: this run is still in progress; wait for its end, or stop it (Ctrl-C writes a "
            f"checkpoint)."
        ) from error
    return fd


def saved_config(folder: Path, asked: str = "resume") -> Config:
    """The configuration of an earlier run of the built-in loop; `ValueError` if the folder, given as the argument
    `asked`, holds none."""
    return _read(folder, Config.from_json, asked)


def saved_values(folder: Path, asked: str = "resume") -> dict[str, Any]:
    """The configuration of an earlier run, as JSON holds it; `ValueError` if the folder holds none."""
    return _read(folder, dict, asked)


def saved_summary(folder: Path) -> dict[str, Any]:
    """What an earlier run says of its end; {} where it came to none, or what it says is damaged."""
    try:
        found = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def saved_pictures(folder: Path, asked: str) -> Pictures:
    """What an earlier run of the built-in loop was about; `ValueError` if the folder holds none."""
    return _read(folder, Pictures.of, asked, "effective")


@dataclass(frozen=True)
class Pictures:
    """What a network sees and says: (C, h, w) of its input, the factor of its pixels, the number of classes."""

    shape: tuple[int, int, int]
    scale: float
    classes: int

    @classmethod
    def of(cls, effective: dict[str, Any]) -> Pictures:
        channels, height, width = map(int, effective["input_shape"])
        return cls((channels, height, width), float(effective["scale"]), int(effective["classes"]))


def _read(folder: Path, made: Callable[[Any], T], asked: str, part: str = "config") -> T:
    path = folder / "config.json"
    try:
        return made(json.loads(path.read_text())[part])
    except OSError as error:
        raise ValueError(
            f"{asked}={folder}: no run is there ({path.name}: {error.strerror}); name the folder of an earlier run."
        ) from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"{asked}={folder}: its {path.name} is damaged or was written by another version ({type(error).__name__}: "
            f"{error}); restore it, or start a new run."
        ) from error
