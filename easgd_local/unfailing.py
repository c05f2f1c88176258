"""Output that nobody may be reading any more: a pipe or a terminal that was closed must not end a run."""

from __future__ import annotations

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
        except OSError:
            nobody = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nobody, self._stream.fileno())  # for what is still in the buffer, and what others print
            os.close(nobody)
            self._lost()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
