"""What every rule is: a frozen dataclass of its hyperparameters with one method, `step`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, get_args, get_type_hints

if TYPE_CHECKING:
    from easgd_local.backend.cpu import CpuOps, Vector


class ClosingView(Protocol):
    """What a rule may touch when it ends a round, in a worker or, in place of one that is gone, in the launcher.
    Vectors have n floats; blocks are slices of them."""

    @property
    def workers(self) -> int:
        """p."""

    @property
    def ops(self) -> CpuOps:
        """The operations on vectors; on a GPU those of `backend.cuda`, which has the same."""

    def __getattr__(self, name: str) -> Vector:
        """A vector by its letter: c, and those that the rule declares; in the launcher only those at the center."""


class ExchangeView(ClosingView, Protocol):
    """What a rule may touch of its worker in an exchange; x is a vector too."""

    @property
    def rank(self) -> int:
        """i, from 0."""

    @property
    def t(self) -> int:
        """The worker's own clock."""

    @property
    def update(self) -> int:
        """In a pass of the loop over `turns`: the number, from 1, of this update of the block by anybody."""

    def turns(self) -> Iterator[slice]:
        """One exchange with the center: `for b in w.turns():` holds block b of the shared vectors in each pass."""

    def open(self, y: Vector) -> None:
        """In a pass of the loop over `turns`: y <- 0 if this is the first visit to the block in this round."""

    def read(self) -> Iterator[slice]:
        """The blocks, to be read only: for synchronous rules, between two rounds."""


class WorkerView(ExchangeView, Protocol):
    """What a rule may touch of its worker: in a whole step."""

    @property
    def lr(self) -> float:
        """η at the present t."""

    @property
    def own(self) -> slice:
        """The coordinates that this worker alone writes, for rules that divide the model (PASSM)."""

    def grad(self, at: Vector | None = None, only: slice | None = None) -> Vector:
        """g, the stochastic gradient of loss + (λ/2)‖·‖² at `at` (default x); read-only, valid until the next call.

        With `only`, these coordinates of it, and zero elsewhere.
        """

    def optimize(self, g: Vector) -> None:
        """One step of the rule's local torch optimizer from x with g, at the present η."""


def hyperparameter(default: Any, help: str) -> Any:
    """A field of a rule, with the sentence that the command line shows for it."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An algorithm: hyperparameters and one `step`.

    State is named vectors of n floats. `shared` ones live at the center, block by block under the same turns as c, and
    `allotted` ones too, one for each worker; `local` ones live at each worker; all of these are in checkpoints;
    `scratch` ones are not. All start at zero, but those in `copies` as copies of c.
    """

    name: ClassVar[str]
    shared: ClassVar[tuple[str, ...]] = ()
    allotted: ClassVar[tuple[str, ...]] = ()
    copies: ClassVar[tuple[str, ...]] = ()
    reported: ClassVar[str] = "c"  # the shared vector that is evaluated and exported
    orders: ClassVar[tuple[str, ...]] = ("strict", "free")  # the orders of turns it is defined for, the default first
    sequential: ClassVar[bool] = False  # whether it is defined for one worker only
    divides: ClassVar[bool] = False  # whether each worker owns some layers of the model
    counts: ClassVar[bool] = False  # whether an exchange depends on the number of the update

    # For rules that can be laid over somebody else's optimizer, whose steps then take the place of the rule's own:
    replaces: ClassVar[bool] = False  # whether an exchange replaces x, so that g is taken after it
    over_local: ClassVar[tuple[str, ...]] = ()  # the vectors that `meet` keeps: copies of x at the start
    over_scratch: ClassVar[tuple[str, ...]] = ()  # and those that it only uses

    lr: float = hyperparameter(0.2, "step size η")  # the defaults of all rules were found by bench/tune.py

    def __post_init__(self) -> None:
        make_plain(self)
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr={self.lr}: the step size must be positive and finite; try 0.05.")

    @property
    def local(self) -> tuple[str, ...]:
        """Names of the local vectors."""
        return ()

    @property
    def scratch(self) -> tuple[str, ...]:
        """Names of the scratch vectors."""
        return ()

    @property
    def optimizer(self) -> str:
        """Name of the local torch optimizer; "" for rules without."""
        return ""

    @property
    def decoupled(self) -> bool:
        """Whether weight decay is the local optimizer's own and not part of g."""
        return False

    @property
    def period(self) -> int:
        """Steps of the worker's clock from one exchange to the next."""
        return 1

    def step(self, w: WorkerView) -> None:
        """One iteration of the algorithm, at clock w.t; the worker advances the clock afterwards."""
        raise NotImplementedError

    @property
    def attachable(self) -> bool:
        """Whether `meet` is all that the rule adds to the steps of an optimizer."""
        return False

    def meet(self, w: ExchangeView) -> Vector | None:
        """The exchange, if it is due at clock w.t; returns d, still to be subtracted from x, or None."""
        raise NotImplementedError

    def begin(self, w: WorkerView) -> None:
        """Sets the local vectors of a worker that takes up, or is reloaded, from the center: x = c, the others zero."""

    def close(self, w: ClosingView, b: slice) -> None:
        """Ends a round for block b, after the last worker's visit; by that worker, or by the launcher in its place."""

    @property
    def closes(self) -> bool:
        """Whether it ends rounds."""
        return type(self).close is not Rule.close

    def warnings(self, workers: int, curvature: float | None = None, turns: str = "") -> list[str]:
        """Sentences about hyperparameters that are legal but unwise with p workers in this order of turns (default: the
        rule's own); `curvature` is an estimate of the largest h at the start, if there is one."""
        return []

    def derived(self, workers: int) -> dict[str, float]:
        """Hyperparameters that follow from the given ones with p workers, for config.json and the report."""
        return {}


def check_period(tau: int) -> None:
    """`ValueError` unless τ ≥ 1."""
    if tau < 1:
        raise ValueError(
            f"tau={tau}: a worker visits the center every tau steps, so tau must be at least 1; for no communication "
            f"use the rule easgd with alpha=0."
        )


def check_momentum(momentum: float) -> None:
    """`ValueError` unless 0 ≤ δ < 1."""
    if not 0 <= momentum < 1:
        raise ValueError(
            f"momentum={momentum}: δ must be at least 0 and below 1, or velocities grow without bound; try 0.9."
        )


def check_average(rate: float) -> None:
    """`ValueError` unless 0 < a ≤ 1."""
    if not 0 < rate <= 1:
        raise ValueError(
            f"average_rate={rate}: the moving average takes this share of each new value, so it must lie in (0, 1]; "
            f"the paper's is 0.001."
        )


PLAIN: dict[Any, tuple[Any, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: ((str, PathLike), "a word"),
}


def hints_of(kind: Any) -> dict[str, Any]:
    """The annotations of a dataclass by field; read-only. To work them out takes longer than all else of a rule."""
    return _hints(kind)


_hints = functools.cache(get_type_hints)  # which type checkers hold to be for instances that can be hashed


def plain_type(hint: Any) -> Any:
    """int, float, bool or str: what a field with this annotation holds when it is not None."""
    kinds = get_args(hint) or (hint,)
    return next((one for one in (bool, int, float) if one in kinds), str)


def make_plain(values: Any) -> None:
    """Makes the values of a frozen dataclass Python's own int, float and str; `ValueError` for what is none."""
    hints = hints_of(type(values))
    for one in fields(values):
        kinds, value = get_args(hints[one.name]) or (hints[one.name],), getattr(values, one.name)
        kind = next((kind for kind in PLAIN if kind in kinds), None)
        if kind is None or (value is None and type(None) in kinds):
            continue
        allowed, wanted = PLAIN[kind]
        if isinstance(value, bool) or not isinstance(value, allowed):
            raise ValueError(f"{one.name}={value!r}: must be {wanted}, not {type(value).__name__}; write it as one.")
        object.__setattr__(values, one.name, kind(value))
