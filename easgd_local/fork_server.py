"""The fork server: from it come all children of a run, and it imports torch once for all of them."""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import select
import shutil
import signal
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.context import ForkServerContext
from typing import Any

from easgd_local import child, linux

OWNER = "EASGD_FORK_SERVER_OWNER"  # variable of its environment: who started it, and the folder where its socket lies
EXIT_S = 2.0  # how long a process may take to exit after its files are closed
LONGEST_TMPDIR = 75  # bytes: a socket's path has at most 107, of which Python's names below that folder take 32
_starting = threading.Lock()  # of threads that start children at the same time
_made: dict[int, str] = {}  # a process that has made that folder itself -> the folder; a forked one has made none


def warm_up(*further: str) -> None:
    """Starts the fork server, which imports torch, and these modules, once for all children; returns at once.

    `ValueError` on a system that lacks what a run needs.
    """
    linux.check()
    context().set_forkserver_preload(["easgd_local.preload", *further])
    with starting():
        forkserver.ensure_running()


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Around the start of a child, and of the fork server, should it not run (any more).

    Children run functions of this package and need nothing of the user's script, so they do not import it: one without
    `if __name__ == "__main__":` would start its training again in every child. The fork server is told its owner, and
    no signal reaches it before it can ignore that (`preload`).
    """
    with _starting:
        resource_tracker.ensure_running()  # whose start, if it came later, would unblock them
        main, folder = sys.modules["__main__"], _folder()
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, child.SIGNALS)
        sys.modules["__main__"] = types.ModuleType("__main__")
        if folder:
            os.environ[OWNER] = f"{os.getpid()} {folder}"
        try:
            yield
        finally:
            os.environ.pop(OWNER, None)
            sys.modules["__main__"] = main
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)


def _folder() -> str:
    """The temporary folder of this process's multiprocessing, where the fork server's socket will lie; "" if it is not
    known to be this process's own: children of Python's multiprocessing inherit their parent's."""
    if not mp.current_process()._config.get("tempdir"):  # type: ignore[attr-defined]
        chosen = tempfile.tempdir
        if len(os.fsencode(tempfile.gettempdir())) > LONGEST_TMPDIR:
            tempfile.tempdir = "/tmp"
        try:
            _made[os.getpid()] = util.get_temp_dir()
        finally:
            tempfile.tempdir = chosen
    return _made.get(os.getpid(), "")


def clear_away() -> None:
    """In the fork server, at its end: removes that folder if its owner was killed, and so could not do it itself."""
    owner, _, folder = os.environ.get(OWNER, "").partition(" ")
    if not owner:
        return  # the folder is somebody else's
    # 1. Its files are closed, 2. we see that and end, 3. it is dead: hence a while to wait for that.
    if os.getppid() == int(owner) and not select.select([linux.pidfd_open(int(owner))], [], [], EXIT_S)[0]:
        return  # it lives, and we have failed
    shutil.rmtree(folder, ignore_errors=True)


def context() -> ForkServerContext:
    return mp.get_context("forkserver")


def ask(function: Callable[[], Any]) -> Any:
    """What `function` returns in a new process, which may start CUDA; its exceptions are raised here.

    Raises `ChildDied` if the process ends without an answer.
    """
    ours, theirs = mp.Pipe()
    process = context().Process(
        target=child.answer, args=(function, theirs, dict(os.environ)), name="easgd-ask", daemon=True
    )  # fmt: skip
    try:
        with starting():
            process.start()
        theirs.close()
        good, answer = ours.recv()
    except EOFError:
        process.join()
        raise ChildDied(f"exit code {process.exitcode}") from None
    finally:
        if process.pid is not None:
            process.kill()
            process.join()
            process.close()
        ours.close()
    if not good:
        raise answer
    return answer


class ChildDied(RuntimeError):
    """A process ended before it answered; the text says how."""
