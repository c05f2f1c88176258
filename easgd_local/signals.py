"""Ctrl-C and SIGTERM, answered in order."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def signals(handler: Any) -> Iterator[None]:
    """SIGINT and SIGTERM are answered by `handler` meanwhile (only the main thread can ask for that)."""
    try:
        old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
