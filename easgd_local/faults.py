"""Faults to inject into a run, so that what happens then can be tested and tried: never active unless asked for."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

KINDS = ("kill", "kill-in-exchange", "raise", "nan", "pace")


@dataclass(frozen=True)
class Fault:
    """At clock `t` worker `rank` suffers `kind`.

    From t on, `pace` makes every step last at least `seconds`, waiting for turns not counted.
    """

    kind: str
    rank: int
    t: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"fault kind={self.kind}: must be one of {', '.join(KINDS)}.")


def due(faults: tuple[Fault, ...], kind: str, rank: int, t: int) -> bool:
    """Whether a fault of that kind strikes worker `rank` at clock t."""
    return any(fault.kind == kind and fault.rank == rank and fault.t == t for fault in faults)


def keep_pace(faults: tuple[Fault, ...], rank: int, t: int, step_s: float) -> None:
    """Sleeps after a step that took `step_s` for as long as a slower worker would still compute."""
    for fault in faults:
        if fault.kind == "pace" and fault.rank == rank and t >= fault.t:
            time.sleep(max(0.0, fault.seconds - step_s))


def kill() -> None:
    """Dies as a crashed or out-of-memory process does: at once, cleaning up nothing."""
    os.kill(os.getpid(), signal.SIGKILL)
