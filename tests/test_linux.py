"""The calls of Linux by their numbers do what Python's own do, where it has them, and nothing else here uses those."""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from easgd_local import fork_server, linux

ROOT = Path(__file__).parents[1]
LACKING = re.compile(r"\b(os\.(memfd_create|MFD_\w+|pidfd_\w+)|signal\.pidfd_\w+|fcntl\.F_(ADD_SEALS|SEAL_\w+))\b")


def test_the_memory_has_no_name_is_closed_at_an_exec_and_its_size_can_be_sealed():
    fd = linux.memfd_create("some")
    try:
        assert os.readlink(f"/proc/self/fd/{fd}") == "/memfd:some (deleted)" and not os.get_inheritable(fd)
        os.posix_fallocate(fd, 0, 100)
        linux.seal_size(fd)
        for size_bytes in (99, 101):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size_bytes)
        assert os.pwrite(fd, b"x", 99) == 1
    finally:
        os.close(fd)


def test_a_process_is_killed_and_seen_to_exit_by_its_descriptor():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    fd = linux.pidfd_open(process.pid)
    try:
        assert not os.get_inheritable(fd)
        assert not select.select([fd], [], [], 0)[0]
        linux.pidfd_send_signal(fd, signal.SIGKILL)
        assert select.select([fd], [], [], 10)[0] == [fd]
        assert process.wait() == -signal.SIGKILL
        with pytest.raises(ProcessLookupError):
            linux.pidfd_send_signal(fd, signal.SIGKILL)
        with pytest.raises(ProcessLookupError):
            linux.pidfd_open(process.pid)
    finally:
        os.close(fd)


def test_a_system_without_the_calls_is_told_what_it_lacks_before_anything_is_started(monkeypatch):
    def missing(pid: int) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(linux, "pidfd_open", missing)
    with pytest.raises(ValueError, match=r"do not work here .*Function not impl.*; use Linux 5\.3 or newer"):
        fork_server.warm_up()


def test_nothing_uses_what_some_builds_of_python_lack():
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for folder in ("easgd_local", "bench", "examples")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for match in LACKING.finditer(path.read_text("utf-8"))
    ]
    assert not found, f"use easgd_local.linux: {found}"
