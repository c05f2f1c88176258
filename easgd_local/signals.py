"""Ctrl-C, SIGTERM and the loss of the terminal, answered in order."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def signals(handler: Any) -> Iterator[None]:
    """SIGINT, SIGTERM and, unless nohup has us ignore it, SIGHUP are answered by `handler` meanwhile (only the main
    thread can ask for that)."""

    def once(number: int, frame: FrameType | None) -> None:
        # 1. The shell passes the hangup on, 2. the shell ends and the kernel sends another: that is no second wish.
        signal.signal(number, signal.SIG_IGN)
        handler(number, frame)

    handlers = {signal.SIGINT: handler, signal.SIGTERM: handler}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        handlers[signal.SIGHUP] = once
    try:
        old = {number: signal.signal(number, answer) for number, answer in handlers.items()}
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
