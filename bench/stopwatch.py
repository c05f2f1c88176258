"""Runs `easgd-local` as its console script does, and writes down when it gets where: used by startup.py.

    python bench/stopwatch.py FILE train RULE ...

FILE becomes a JSON list of [mark, time.perf_counter()], in order; that clock is the same for all the processes of the
machine. Imports happen where and when the program itself makes them, so nothing is imported before the first mark.
"""

import time

MARKS = [("interpreter", time.perf_counter())]

import functools  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from typing import Any  # noqa: E402


def mark(name: str) -> None:
    """We are here, for the first or not the first time."""
    MARKS.append((name, time.perf_counter()))


def mark_after(owner: Any, function: str, name: str) -> None:
    """From now on every return of `owner.function` leaves a mark."""
    inner = getattr(owner, function)

    @functools.wraps(inner)
    def outer(*args: Any, **values: Any) -> Any:
        try:
            return inner(*args, **values)
        finally:
            mark(name)

    setattr(owner, function, outer)


def watch_preparation() -> None:
    """Called between the start of the fork server and the import that the program makes next."""
    mark("fork server started")
    from easgd_local import data, models, prepare

    mark("torch imported")
    mark_after(data, "load", "data loaded")
    mark_after(models, "check", "model built")
    mark_after(prepare, "prepare", "center and run folder made")


def watch_run() -> None:
    """From the views' imports to the first steps."""
    from easgd_local import launcher, metrics, summary

    mark_after(metrics.Metrics, "__init__", "views imported")
    mark_after(launcher.Launcher, "start", "child forked")
    mark_after(summary.Clock, "start", "go")
    poll, write = launcher.Launcher.poll, metrics.Metrics.write

    def watched_poll(self: Any, timeout_s: float) -> Any:
        told = poll(self, timeout_s)
        for one, message in told:
            if message[0] == "ready" and one.rank is not None:
                mark("worker ready")
        return told

    def watched_write(self: Any, kind: str, **values: Any) -> None:
        if kind == "center" and values["t"] == 0:
            mark("center evaluated")
        if kind == "worker" and values["t"] == 1:
            mark("first step")
        write(self, kind, **values)

    launcher.Launcher.poll, metrics.Metrics.write = watched_poll, watched_write  # type: ignore[method-assign]


def main() -> int:
    """The command line, watched."""
    file, words = sys.argv[1], sys.argv[2:]
    from easgd_local import cli, fork_server

    mark("command line imported")
    warm_up = fork_server.warm_up

    def watched_warm_up() -> None:
        warm_up()
        watch_preparation()
        watch_run()

    fork_server.warm_up = watched_warm_up
    code = cli.main(words)
    mark("report written")
    with open(file, "w", encoding="utf-8") as marks:
        json.dump(MARKS, marks)
    return code


if __name__ == "__main__":
    sys.exit(main())
