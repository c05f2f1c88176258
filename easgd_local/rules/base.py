"""What every rule is: a frozen dataclass of its hyperparameters with one method, `step`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, get_args, get_type_hints

if TYPE_CHECKING:
    from easgd_local.backend.cpu import CpuOps, Vector


class WorkerView(Protocol):
    """What a rule may touch of its worker. Vectors have n floats; blocks are slices of them."""

    rank: int
    workers: int
    t: int
    ops: CpuOps
    x: Vector
    c: Vector
    d: Vector
    v: Vector
    y: Vector

    @property
    def lr(self) -> float:
        """η at the present t."""

    def turns(self) -> Iterator[slice]:
        """One exchange with the center: `for b in w.turns():` holds block b of the shared vectors in each pass."""

    def grad(self, at: Vector | None = None) -> Vector:
        """g, the stochastic gradient of loss + (λ/2)‖·‖² at `at` (default x); read-only, valid until the next call."""


def hyperparameter(default: Any, help: str) -> Any:
    """A field of a rule, with the sentence that the command line shows for it."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An algorithm: hyperparameters and one `step`.

    State is named vectors of n floats. `shared` ones live at the center, block by block under the same turns as c;
    `local` ones at each worker, zero at the start, and in checkpoints; `scratch` ones at each worker, not kept.
    """

    name: ClassVar[str]
    shared: ClassVar[tuple[str, ...]] = ()
    local: ClassVar[tuple[str, ...]] = ()
    scratch: ClassVar[tuple[str, ...]] = ()
    sequential: ClassVar[bool] = False  # whether it is defined for one worker only

    lr: float = hyperparameter(0.05, "step size η")

    def __post_init__(self) -> None:
        make_plain(self)
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr={self.lr}: the step size must be positive and finite; try 0.05.")

    @property
    def period(self) -> int:
        """Steps of the worker's clock from one exchange to the next."""
        return 1

    def step(self, w: WorkerView) -> None:
        """One iteration of the algorithm, at clock w.t; the worker advances the clock afterwards."""
        raise NotImplementedError

    def warnings(self, workers: int) -> list[str]:
        """Sentences about hyperparameters that are legal but unwise with p workers."""
        return []

    def derived(self, workers: int) -> dict[str, float]:
        """Hyperparameters that follow from the given ones with p workers, for config.json and the report."""
        return {}


def check_momentum(momentum: float) -> None:
    """`ValueError` unless 0 ≤ δ < 1."""
    if not 0 <= momentum < 1:
        raise ValueError(
            f"momentum={momentum}: δ must be at least 0 and below 1, or velocities grow without bound; try 0.9."
        )


PLAIN: dict[Any, tuple[Any, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: ((str, PathLike), "a word"),
}


def plain_type(hint: Any) -> Any:
    """int, float, bool or str: what a field with this annotation holds when it is not None."""
    kinds = get_args(hint) or (hint,)
    return next((one for one in (bool, int, float) if one in kinds), str)


def make_plain(values: Any) -> None:
    """Makes the values of a frozen dataclass Python's own int, float and str; `ValueError` for what is none."""
    hints = get_type_hints(type(values))
    for one in fields(values):
        kinds, value = get_args(hints[one.name]) or (hints[one.name],), getattr(values, one.name)
        kind = next((kind for kind in PLAIN if kind in kinds), None)
        if kind is None or (value is None and type(None) in kinds):
            continue
        allowed, wanted = PLAIN[kind]
        if isinstance(value, bool) or not isinstance(value, allowed):
            raise ValueError(f"{one.name}={value!r}: must be {wanted}, not {type(value).__name__}; write it as one.")
        object.__setattr__(values, one.name, kind(value))
