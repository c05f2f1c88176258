"""The event log of a run: `metrics.jsonl`, one JSON object a line, in the order of writing.

Every event has `kind`, `t` (worker steps completed) and `seconds` (of training: evaluation is not counted); the events
of a worker have its `rank` too. JSON has no NaN: on disk a value that is not finite is null and its name is in the
list `nonfinite`; `read` gives NaN again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from easgd_local.whole_file import whole_file

Event = dict[str, Any]
Listener = Callable[[Event], None]
NAME = "metrics.jsonl"


class Metrics:
    """The log, open for writing: appends each event, then hands it to the listeners; a context manager.

    An existing log is continued, after a last line torn by a kill has been dropped. With `resume_t` the events beyond
    that step are dropped as well: the resumed run writes them again, and the curves never run backwards.
    """

    def __init__(self, folder: str | Path, listeners: Iterable[Listener] = (), *, resume_t: int | None = None) -> None:
        self.path = Path(folder) / NAME
        self.listeners = list(listeners)
        if self.path.exists():
            _trim(self.path, math.inf if resume_t is None else resume_t)
        self._file = open(self.path, "a", encoding="ascii", newline="\n", buffering=1)

    def write(self, kind: str, *, t: int, seconds: float, rank: int | None = None, **values: Any) -> None:
        """Appends one event. A kill at any moment loses at most this line."""
        whose = {} if rank is None else {"rank": rank}
        event = _plain({"kind": kind, "t": t, "seconds": seconds, **whose, **values})
        self._file.write(json.dumps(finite(event), allow_nan=False) + "\n")
        self._file.flush()
        for listener in self.listeners:
            listener(event)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read(folder: str | Path) -> list[Event]:
    """The events of a run folder as they were written (infinities as NaN); none when there is no log yet."""
    path = Path(folder) / NAME
    return [event for _, event in _lines(path)] if path.exists() else []


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values fit for JSON: what is not finite becomes None, its name is listed under `nonfinite`."""
    plain = _plain(values)
    clean = {name: _nulled(value) for name, value in plain.items()}
    names = [name for name in plain if clean[name] != plain[name]]  # NaN and infinities differ from their None
    return {**clean, "nonfinite": names} if names else clean


def restored(values: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes `finite`: NaN for the listed names that are null."""
    names = values.get("nonfinite") or []
    kept = {name: value for name, value in values.items() if name != "nonfinite"}
    return {name: math.nan if value is None and name in names else value for name, value in kept.items()}


def _plain(value: Any) -> Any:
    """Python's own numbers, lists and dicts in place of NumPy's, torch's, tuples and paths."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # a NumPy or torch scalar or array
        return value.tolist()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _nulled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nulled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_nulled(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path: Path) -> list[tuple[bytes, Event]]:
    """Each complete line with its event. An object ends with its brace, so a torn line never parses."""
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    events = []
    for number, line in enumerate(lines, 1):
        try:
            events.append((line, restored(json.loads(line))))
        except ValueError:
            if number < len(lines):
                raise ValueError(
                    f"{path}: line {number} is no JSON object; only the last line of a log can be torn by a kill: "
                    f"restore the file or remove that line."
                ) from None
    return events


def _trim(path: Path, last_t: float) -> None:
    """Drops the torn last line and the events beyond `last_t`, as a whole: a kill leaves the old log or the new."""
    kept = b"".join(line + b"\n" for line, event in _lines(path) if (event.get("t") or 0) <= last_t)
    if kept != path.read_bytes():
        with whole_file(path) as part:
            part.write_bytes(kept)
