"""Faults to inject into a run, so that what happens then can be tested and tried: never active unless asked for."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

KINDS = ("kill", "kill-in-exchange", "raise", "nan", "slow")


@dataclass(frozen=True)
class Fault:
    """At clock `t` worker `rank` suffers `kind`; `slow` multiplies the duration of every step from t on by `factor`."""

    kind: str
    rank: int
    t: int = 0
    factor: float = 10.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"fault kind={self.kind}: must be one of {', '.join(KINDS)}.")


def due(faults: tuple[Fault, ...], kind: str, rank: int, t: int) -> bool:
    """Whether a fault of that kind strikes worker `rank` at clock t."""
    return any(fault.kind == kind and fault.rank == rank and fault.t == t for fault in faults)


def slow_down(faults: tuple[Fault, ...], rank: int, t: int, step_s: float) -> None:
    """Sleeps as long as a step of `step_s` seconds would take longer."""
    for fault in faults:
        if fault.kind == "slow" and fault.rank == rank and t >= fault.t:
            time.sleep(step_s * (fault.factor - 1))


def kill() -> None:
    """Dies as a crashed or out-of-memory process does: at once, cleaning up nothing."""
    os.kill(os.getpid(), signal.SIGKILL)
