"""Starts the processes of a run, watches over them, cleans up.

Never touches CUDA. A worker's death is its exit, observed through a pidfd and reaped, never a time-out: a supervisor
that guesses would pass the turn of a worker that still writes.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import select
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import send_handle
from pathlib import Path
from types import TracebackType
from typing import Any

from easgd_local import child, fork_server, linux

DESCENDANTS_S = 2.0  # how long to wait for the killed descendants of a dead child


@dataclass(eq=False)
class Child:
    """A process of the run: a worker (rank is its number) or a helper (rank is None)."""

    name: str
    rank: int | None
    pid: int
    conn: Connection
    pidfd: int
    process: ForkServerProcess | None = None  # None for one that somebody else has started
    failure: str | None = None  # what it said before it exited with an exception
    traceback: str = ""  # and in full
    refused: bool = False  # whether that was a mistake that ends the whole run
    said: set[str] = field(default_factory=set)  # kinds of messages it has sent

    def tell(self, word: Any) -> None:
        """Says something to it, if it is not dead already: then its exit is about to be told."""
        with contextlib.suppress(OSError):
            self.conn.send(word)


Message = tuple[Any, ...]


class Launcher:
    """The children of a run. A context manager: on leaving it every child is dead and reaped."""

    def __init__(self, logs: Path) -> None:
        self._logs, self._children = logs, list[Child]()
        self._poll = select.poll()

    @property
    def alive(self) -> list[Child]:
        """The children whose exit has not been observed yet."""
        return list(self._children)

    def start(
        self, name: str, main: Callable[..., None], fds: list[int], args: tuple[Any, ...], rank: int | None = None
    ) -> Child:
        """Runs `main(conn, fds, *args)` in a new process that gets duplicates of `fds`; its output goes to the logs."""
        ours, theirs = mp.Pipe()
        log = self._logs / f"{name}.log"
        process = fork_server.context().Process(
            target=child.enter, name=f"easgd-{name}", daemon=False,
            args=(main, theirs, log, len(fds), args, dict(os.environ)),
        )  # fmt: skip
        try:
            with fork_server.starting():
                process.start()
            assert process.pid is not None
            theirs.close()
            # The child waits for these descriptors before it does anything, so it cannot have exited unobserved.
            pidfd = linux.pidfd_open(process.pid)
            new = Child(name, rank, process.pid, ours, pidfd, process)
            self._watch(new)
        except BaseException:  # Ctrl-C, perhaps: nobody watches over it yet
            if process.pid is not None:
                process.kill()
                process.join()
            raise
        with contextlib.suppress(OSError):  # dead already: `poll` will say so
            for fd in fds:
                send_handle(ours, fd, process.pid)
        return new

    def _watch(self, new: Child) -> None:
        self._children.append(new)
        self._poll.register(new.pidfd, select.POLLIN)
        self._poll.register(new.conn, select.POLLIN)

    def poll(self, timeout_s: float) -> list[tuple[Child, Message]]:
        """What the children say, waiting at most `timeout_s` for the first word; an exit is told as ("exit", cause)."""
        ready = {fd for fd, _ in self._poll.poll(max(0, round(timeout_s * 1000)))}
        told: list[tuple[Child, Message]] = []
        for one in self.alive:
            exited = one.pidfd in ready
            if exited or one.conn.fileno() in ready:
                told += [(one, message) for message in _drain(one)]
            if exited or "gone" in one.said:
                told.append((one, ("exit", self._bury(one))))
        return told

    def kill(self, one: Child) -> None:
        """Ends a child at once; `poll` tells of its exit, when its descendants are gone too."""
        with contextlib.suppress(ProcessLookupError):
            linux.pidfd_send_signal(one.pidfd, signal.SIGKILL)

    def kill_all(self, children: Iterable[Child]) -> None:
        """Ends these children at once."""
        for one in children:
            self.kill(one)

    def close(self) -> None:
        """Kills what still runs and reaps it."""
        self.kill_all(self._children)
        for one in self.alive:
            self._bury(one)

    def _bury(self, one: Child) -> str | None:
        """Reaps an exited child, ends its descendants, and says why it died: None for a proper end."""
        assert one.process is not None
        one.process.join()
        _end_group(one.pid)
        code = one.process.exitcode
        one.process.close()
        self._poll.unregister(one.pidfd)
        self._poll.unregister(one.conn)
        os.close(one.pidfd)
        one.conn.close()
        self._children.remove(one)
        return _cause(one, code)

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _drain(one: Child) -> list[Message]:
    messages = []
    with contextlib.suppress(EOFError, OSError):  # it died, perhaps in the middle of a word
        while one.conn.poll():
            message = one.conn.recv()
            one.said.add(message[0])
            if message[0] == "failed":
                _, one.failure, one.traceback, one.refused = message
            else:
                messages.append(message)
    return messages


def _cause(one: Child, code: int | None) -> str | None:
    if code == 0:
        return None
    if one.failure:
        return one.failure
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " (often the kernel's out-of-memory killer; see dmesg)" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"
    return f"exited with code {code}"


def _end_group(group: int) -> None:
    """Kills the descendants that a dead child left behind and waits for them: they may hold what the child held."""
    deadline = time.monotonic() + DESCENDANTS_S
    try:
        os.killpg(group, signal.SIGKILL)
        while any_alive(group) and time.monotonic() < deadline:
            time.sleep(1e-3)
    except ProcessLookupError:
        return


def any_alive(group: int) -> bool:
    """Whether a process of the group still runs (a zombie holds nothing any more)."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(pgrp) == group and state not in "ZX":
                    return True
    return False
