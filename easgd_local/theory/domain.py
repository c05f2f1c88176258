"""The domains of the formulas: each argument as float64, or one sentence with value, rule and remedy."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Grid = npt.ArrayLike
Array = npt.NDArray[np.float64]


def checked(name: str, value: Grid, allowed: Callable[[Array], Any], rule: str) -> Array:
    """The value as an array of float64; `ValueError` with its first element that is not allowed. NaN never is."""
    array = np.asarray(value, dtype=np.float64)
    wrong = ~np.asarray(allowed(array), dtype=bool)
    if wrong.any():
        raise ValueError(f"{name}={array[wrong].flat[0]:g}: {rule}.")
    return array


def step_size(value: Grid) -> Array:
    """η, positive."""
    rule = "the step size η must be positive and finite; try 0.1"
    return checked("lr", value, lambda lr: (lr > 0) & np.isfinite(lr), rule)


def step_size_or_none(value: Grid) -> Array:
    """η, 0 included: the edge of a stability map."""
    rule = "the step size η must be at least 0 and finite; try 0.1"
    return checked("lr", value, lambda lr: (lr >= 0) & np.isfinite(lr), rule)


def curvature_of(value: Grid) -> Array:
    """h, positive."""
    rule = "the curvature h must be positive and finite, else there is no minimum; try 1"
    return checked("curvature", value, lambda h: (h > 0) & np.isfinite(h), rule)


def deviation(value: Grid) -> Array:
    """σ, 0 included."""
    rule = "the noise's standard deviation σ must be at least 0 and finite; try 1"
    return checked("sigma", value, lambda sigma: (sigma >= 0) & np.isfinite(sigma), rule)


def share(value: Grid) -> Array:
    """α of an exchange between two, in [0, 1]."""
    rule = "in an exchange between one worker and the center the moving rate α must lie in [0, 1]; try 0.9/workers"
    return checked("alpha", value, lambda alpha: (alpha >= 0) & (alpha <= 1), rule)


def rate(value: Grid) -> Array:
    """α of a rendezvous, at least 0."""
    rule = "the moving rate α must be at least 0 and finite; try 0.9/workers"
    return checked("alpha", value, lambda alpha: (alpha >= 0) & np.isfinite(alpha), rule)


def finite(name: str, value: Grid) -> Array:
    """Any finite number."""
    return checked(name, value, np.isfinite, "must be a finite number; give one")


def penalty(value: Grid) -> Array:
    """ρ, 0 included."""
    rule = "ADMM's penalty ρ must be at least 0 and finite; try 1"
    return checked("rho", value, lambda rho: (rho >= 0) & np.isfinite(rho), rule)


def count(value: Any) -> int:
    """p of one matrix: a whole number, at least 1."""
    try:
        workers = operator.index(value)
    except TypeError:
        raise ValueError(f"workers={value}: the number of workers must be one whole number; try 4.") from None
    if workers < 1:
        raise ValueError(f"workers={workers}: there must be at least 1 worker; try 4.")
    return workers


def counts(value: Grid, *, endless: bool = False) -> Array:
    """p over a grid: whole numbers, at least 1; infinity where the limit p -> ∞ is known."""
    rule = f"the number of workers must be whole and at least 1{' (or infinite)' if endless else ''}; try 4"
    return checked("workers", value, lambda p: (p >= 1) & (p == np.floor(p)) & (endless | np.isfinite(p)), rule)


def clock(value: Grid, *, start: int = 0, endless: bool = True) -> Array:
    """t: whole numbers from `start`; infinity where the limit is known."""
    rule = f"the time t must be a whole number of steps, at least {start}{' (or infinite)' if endless else ''}; try 100"
    return checked("t", value, lambda t: (t >= start) & (t == np.floor(t)) & (endless | (t < math.inf)), rule)
