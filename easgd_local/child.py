"""What a child process of the launcher does first, and how it talks back."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # which the launcher answers for all its children
_PR_SET_PDEATHSIG = 1

inside = False  # whether this process is a child of a launcher


class Refusal(ValueError):
    """A user's mistake that ends the whole run, whichever worker notices it: one sentence of what, value, rule, remedy.
    """


def enter(
    main: Callable[..., None], conn: Connection, log: Path, handles: int, args: tuple[Any, ...],
    environment: dict[str, str],
) -> None:  # fmt: skip
    """Runs `main(conn, fds, *args)` as a good child: its own process group, killed when the launcher dies, its output
    in `log`, its exceptions told to the launcher in full, the launcher's environment (the fork server's is older).

    `handles` file descriptors are received from the launcher first; the child starts work only with them in hand, so
    the launcher is sure to watch it by then.
    """
    global inside
    inside = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # as they are in a fork server that could not import `preload`
    os.setpgid(0, 0)
    _die_with_parent()
    _adopt(environment)
    _redirect_output(log)
    try:
        main(conn, [recv_handle(conn) for _ in range(handles)], *args)
    except (EOFError, ConnectionError):
        sys.exit(1)  # the launcher is gone
    except Exception as error:
        traceback.print_exc()
        conn.send(failure(error))
        sys.exit(1)


def _adopt(environment: dict[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


def answer(function: Callable[[], Any], conn: Connection, environment: dict[str, str]) -> None:
    """Sends (True, what the function returns) or (False, the exception that it raises)."""
    global inside
    inside = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _adopt(environment)
    try:
        conn.send((True, function()))
    except Exception as error:
        conn.send((False, error))


def failure(error: Exception) -> tuple[str, str, str, bool]:
    """What a child says of the exception that ends it: in a sentence, in full, and whether it is a refusal."""
    refused = isinstance(error, Refusal)
    text = str(error) if refused else f"{type(error).__name__}: {error}"
    return "failed", text, "".join(traceback.format_exception(error)), refused


def _die_with_parent() -> None:
    """Neither the fork server, which is our parent, nor the launcher, which is its parent, is outlived."""
    # 1. The parent dies, 2. we ask to die with it, too late: hence look once more who the parent is.
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    # The fork server lives as long as any of us (we inherit the pipe it watches), so the launcher is watched apart.
    threading.Thread(target=_watch_launcher, name="easgd-watch", daemon=True).start()


def _watch_launcher() -> None:
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    os.killpg(0, signal.SIGKILL)


def _redirect_output(log: Path) -> None:
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
