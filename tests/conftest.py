"""What all tests share: a deadline guard against stray processes, and the small runs that many files look at."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import psutil
import pytest

import easgd_local as easgd
from easgd_local.config import Config
from easgd_local.fork_server import warm_up
from easgd_local.rules.eamsgd import EAMSGD
from easgd_local.training import train

# Files whose tests start processes: none runs beside another one of its group, and only those of "alone" look at the
# clock.
GROUPS = {
    "alone": {"cli", "doctor", "driver", "failures", "stream_turns"},
    "runs": {"export", "fork_server", "run"},
    "loops": {"compare", "compare_runs", "cuda_training", "launching", "simulate_rules", "theory_trainer"},
    "scripts": {"bench", "examples", "joining", "paper"},
}
HELPERS = ("multiprocessing.forkserver", "multiprocessing.resource_tracker")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under xdist one process takes the tests of a group one after the other, the rest goes wherever there is room.

    xdist's own groups (`--dist loadgroup`) are lost, without a word, where pytest is 9.2 and xdist 3.8.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Scheduling(config, log) if config.option.dist == "load" else None


def group_of(nodeid: str) -> str:
    """Tests of one group run in one process, in order."""
    name = Path(nodeid.partition("::")[0]).stem.removeprefix("test_")
    for group, names in GROUPS.items():
        if name in names:
            return group
    return name if name == "kernels" else nodeid  # its tests share what g++ and NVRTC have compiled


def children(pid: int | None = None) -> list[psutil.Process]:
    """The living descendants of a process, but for the helpers that Python's multiprocessing keeps."""
    found = []
    for process in psutil.Process(pid or os.getpid()).children(recursive=True):
        try:
            # The fork server's children keep its command line; being its child tells them apart.
            parent = process.parent()
            if (is_helper(process) and not (parent and is_helper(parent))) or process.status() == psutil.STATUS_ZOMBIE:
                continue
            found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def is_helper(process: psutil.Process) -> bool:
    return any(name in " ".join(process.cmdline()) for name in HELPERS)


def descriptors() -> set[str]:
    """What this process has open and a run might have left: pipes, sockets, shared memory, process descriptors."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(f"/proc/self/fd/{entry}")
            if not target.startswith("/") or "memfd" in target:
                found.add(f"{entry} {target}")
    return found


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether the condition comes true within the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture
def alone(request: pytest.FixtureRequest) -> None:
    """For fixtures that start processes."""
    name = request.node.nodeid
    assert group_of(name) in GROUPS, f"{name} starts processes: name its file among GROUPS in tests/conftest.py"
    warm_up("easgd_local.preload_loop")  # before a run starts the fork server without what loops need of it


@pytest.fixture
def nothing_left(alone: None) -> Iterator[None]:
    """Fails the test if it leaves a process or a descriptor behind."""
    before = descriptors()
    yield
    assert eventually(lambda: not children(), 5), f"processes left: {children()}"
    assert descriptors() <= before


@contextlib.contextmanager
def unpainted() -> Iterator[None]:
    """Pictures are saved as empty files, and the curves of a run are not even composed: few tests look at them."""
    curves = SimpleNamespace(savefig=lambda path, **_: Path(path).touch())
    with (
        mock.patch("matplotlib.figure.Figure.savefig", lambda self, path, **_: Path(path).touch()),
        mock.patch("easgd_local.report.figure", lambda *_: curves),
    ):
        yield


@pytest.fixture
def run(tmp_path: Path, alone: None) -> Callable[..., dict[str, Any]]:
    """A small training run: `run(steps=40, workers=2, ...)`; each call has a folder of its own.

    Unless it is to be `drawn`, its curves are an empty file.
    """
    count = iter(range(1000))

    def start(*, resume: str | None = None, drawn: bool = False, **values: Any) -> dict[str, Any]:
        usual = {"rule": EAMSGD(tau=3), "workers": 2, "steps": 40, "batch_size": 8, "eval_every": 0, "threads": 1}
        values = usual | values
        if resume is None:
            values.setdefault("out", str(tmp_path / f"run-{next(count)}"))
        else:
            values["out"] = resume
        with contextlib.nullcontext() if drawn else unpainted():
            return train(Config(**values), resume=resume)

    return start


@pytest.fixture
def launch(tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., easgd.CenterState]:
    """`launch(fn, *args, **options)` with two workers of one thread and no view; each call has a folder of its own."""
    monkeypatch.setenv("LAUNCHER", str(os.getpid()))
    count = iter(range(1000))

    def start(fn: Any, *args: Any, **options: Any) -> easgd.CenterState:
        usual: dict[str, Any] = {"workers": 2, "threads": 1, "view": False}
        if "resume" not in options:
            usual["out"] = str(tmp_path / f"loop-{next(count)}")
        with unpainted():
            return easgd.launch(fn, args=args, **(usual | options))

    return start
