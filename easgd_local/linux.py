"""Calls of Linux that Python offers only where it was built with new headers: many builds, uv's among them, lack some.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
from typing import Any

_MFD_CLOEXEC, _MFD_ALLOW_SEALING, _MFD_NOEXEC_SEAL = 1, 2, 8
_F_ADD_SEALS, _F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 1033, 1, 2, 4
_PIDFD_SEND_SIGNAL, _PIDFD_OPEN = 424, 434  # numbers of system calls, the same on all processors

_libc = ctypes.CDLL(None, use_errno=True)


def check() -> None:
    """`ValueError` on a system that lacks what a run needs."""
    try:
        os.close(memfd_create("easgd_check"))
        os.close(pidfd_open(os.getpid()))
    except (OSError, AttributeError) as error:
        raise ValueError(
            f"Linux {os.uname().release}: memfd_create and pidfd_open, for the center and to see workers die, do not "
            f"work here ({error}); use Linux 5.3 or newer with glibc 2.27 or newer, and a container that allows both."
        ) from error


def memfd_create(name: str) -> int:
    """A descriptor of memory without a place in the file system, of size 0, closed in programs that are executed."""
    flags = _MFD_CLOEXEC | _MFD_ALLOW_SEALING
    try:  # hardened systems refuse what could be executed
        return _called(_libc.memfd_create(name.encode(), flags | _MFD_NOEXEC_SEAL))
    except OSError as error:
        if error.errno != errno.EINVAL:  # which only means that it is older than 6.3
            raise
        return _called(_libc.memfd_create(name.encode(), flags))


def seal_size(fd: int) -> None:
    """The size of that memory stays what it is."""
    fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SEAL | _F_SEAL_SHRINK | _F_SEAL_GROW)


def pidfd_open(pid: int) -> int:
    """A descriptor of the process, readable when it has exited; closed in programs that are executed."""
    return _called(_libc.syscall(_PIDFD_OPEN, pid, 0))


def pidfd_send_signal(pidfd: int, number: signal.Signals) -> None:
    """As os.kill, but never to another process that has got the same number."""
    _called(_libc.syscall(_PIDFD_SEND_SIGNAL, pidfd, int(number), None, 0))


def _called(result: Any) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))  # of the kind that belongs to the code, such as ProcessLookupError
    return int(result)
