"""How p workers with models of their own agree on one center: each proposes what it attaches, all must match."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import fields
from multiprocessing.reduction import send_handle

from easgd_local.attachment import Proposal
from easgd_local.center import Center
from easgd_local.flat import Entry
from easgd_local.launcher import Child, Launcher
from easgd_local.plan import Plan, Start

WAIT_S = 0.02


class WorkerFailed(Exception):
    """What a worker raised, in full; the cause of the `RuntimeError` that the user sees."""

    def __str__(self) -> str:
        return f"in a worker process:\n\n{self.args[0]}"


def gather(launcher: Launcher, workers: Sequence[Child]) -> list[Proposal]:
    """What each of the workers proposes, when all have attached; they wait for the answer.

    Raises `ValueError` for proposals that do not match and for mistakes that a worker reports, `RuntimeError` when a
    worker ends without attaching.
    """
    proposals: dict[int, Proposal] = {}
    while len(proposals) < len(workers):
        for one, message in launcher.poll(WAIT_S):
            assert one.rank is not None
            match message:
                case ("attach", proposal):
                    proposals[one.rank] = proposal
                case ("exit", cause):
                    raise failed(one, cause)
                case ("unattached",):
                    raise ValueError(
                        f"fn: was over in worker {one.rank} without worker.attach(model, optimizer, rule), so there "
                        f"is no center; attach a model in every worker."
                    )
    ordered = [proposals[rank] for rank in sorted(proposals)]
    for rank, proposal in enumerate(ordered):
        check_alike(ordered[0], proposal, rank)
    return ordered


def failed(one: Child, cause: str | None) -> Exception:
    """The exception to raise for a worker that ended too early."""
    if one.refused:
        return ValueError(f"worker {one.rank}: {one.failure}")
    why = (cause or "it exited").rstrip(".")
    error = RuntimeError(f"worker {one.rank} ended before the run had begun: {why}.")
    error.__cause__ = WorkerFailed(one.traceback) if one.traceback else None
    return error


def check_alike(first: Proposal, other: Proposal, rank: int) -> None:
    """`ValueError` that names the first difference between what two workers attach."""
    _check_models(first.entries, other.entries, rank)
    for entry, ours, theirs in zip(first.entries, first.dtypes, other.dtypes, strict=True):
        if ours != theirs:
            raise ValueError(
                f"model: {entry.name} is {ours} in worker 0 and {theirs} in worker {rank}; build the same model in "
                f"every worker."
            )
    for one in fields(Proposal):
        if one.name in ("entries", "dtypes", "naming"):
            continue
        theirs, ours = getattr(other, one.name), getattr(first, one.name)
        if theirs != ours:
            raise ValueError(
                f"{one.name}: worker 0 attached {ours} and worker {rank} {theirs}; every worker must attach the same."
            )


def _check_models(first: Sequence[Entry], other: Sequence[Entry], rank: int) -> None:
    remedy = "build the same model in every worker."
    names, theirs = [one.name for one in first], [one.name for one in other]
    if names != theirs:
        missing = next(iter(sorted(set(names) ^ set(theirs))), None)
        what = f"{missing} is only in one of them" if missing else "the same names come in another order, or trained"
        raise ValueError(f"model: worker {rank}'s differs from worker 0's ({what}); {remedy}")
    for ours, their in zip(first, other, strict=True):
        if ours != their:
            raise ValueError(
                f"model: {ours.name} has shape {ours.shape}, strides {ours.stride} in worker 0 and {their.shape}, "
                f"{their.stride} in worker {rank}; {remedy}"
            )


def admit(one: Child, center: Center, plan: Plan, start: Start, *, fills: bool = False) -> None:
    """Answers a worker that has attached: hands it the center and says where it takes up."""
    with contextlib.suppress(OSError):  # dead already: its exit is about to be told
        one.conn.send(("center", plan, start, fills))
        send_handle(one.conn, center.fd, one.pid)


def fill(launcher: Launcher, one: Child, center: Center, plan: Plan, start: Start) -> None:
    """Lets a worker write the values of its model to the center."""
    admit(one, center, plan, start, fills=True)
    while "filled" not in one.said:
        for other, message in launcher.poll(WAIT_S):
            if message[0] == "exit":
                raise failed(other, message[1])
