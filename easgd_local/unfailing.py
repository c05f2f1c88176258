"""Output that nobody may be reading any more: a pipe or a terminal that was closed must not end a run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any


class Unfailing:
    """A text stream that passes on to another one, if there is one, and from its first failure on to nobody: then calls
    `lost`, once.

    Characters that the other one cannot encode become question marks.
    """

    def __init__(self, stream: Any, lost: Callable[[], None] = lambda: None) -> None:
        self._stream, self._lost = stream, lost

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._attempt("write", text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._attempt("flush")

    def _attempt(self, name: str, *arguments: Any) -> None:
        if self._stream is None:
            return
        try:
            getattr(self._stream, name)(*arguments)
        except (OSError, ValueError):  # the latter if it was closed
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nobody:
                os.dup2(nobody.fileno(), self._stream.fileno())  # for what its buffer holds, and what others print
            self._stream = None
            self._lost()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
