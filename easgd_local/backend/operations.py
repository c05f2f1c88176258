"""The list of operations that rules are written in: what each does with its vectors. `cpu` defines them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Operation:
    """How an operation uses its vectors, in the order of its arguments: r reads, w writes, u reads and writes, s reads
    and writes seldom (where another one is not finite, so that a reader at the same time is no worse off).

    Then come `scalars` numbers, and with `optional` one more vector that is read, or absent. One that is `guarded`
    counts what is not finite and keeps it from the center.
    """

    roles: str
    scalars: int = 0
    optional: bool = False
    guarded: bool = False

    @cached_property
    def vectors(self) -> int:
        """How many it has, without an optional one."""
        return len(self.roles)

    @cached_property
    def required(self) -> int:
        """How many arguments it has, without an optional one."""
        return len(self.roles) + self.scalars

    @cached_property
    def reads(self) -> list[int]:
        """The numbers of the vectors that it reads, those that it writes seldom among them."""
        return [number for number, role in enumerate(self.roles) if role != "w"]

    @cached_property
    def writes(self) -> list[int]:
        """The numbers of the vectors that it writes, but seldom."""
        return [number for number, role in enumerate(self.roles) if role in "uw"]


OPERATIONS = {
    "pull": Operation("suw", 1, guarded=True),
    "pull_center_first": Operation("suw", 1, guarded=True),
    "pull_worker_first": Operation("uuwr", 2, guarded=True),
    "difference": Operation("wsr", 1, guarded=True),
    "push": Operation("uwu", guarded=True),
    "nesterov_at_center": Operation("uuwr", 2, guarded=True),
    "amsgrad": Operation("uuuuwr", 4, guarded=True),
    "admm": Operation("uuuur", 3, guarded=True),
    "heavy_ball": Operation("uur", 2, guarded=True),
    "nesterov_ball": Operation("uur", 2, guarded=True),
    "average": Operation("ur", 1),
    "add": Operation("ur"),
    "subtract": Operation("ur"),
    "copy": Operation("wr"),
    "fill": Operation("w", 1),
    "accumulate": Operation("uur", 1),
    "lookahead": Operation("wrr", 1),
    "add_decay": Operation("ur", 1),
    "descend": Operation("ur", 1, optional=True),
    "nesterov": Operation("uur", 2, optional=True),
}
