"""The published listings, transcribed literally: sequential, plain NumPy, no regard for speed.

Vectors are NumPy arrays, float32 or float64; every operation rounds once in their type. `gradient(i, t, x)` is worker
i's stochastic gradient at its clock t and the point x. `order` lists the visits of one exchange as pairs (worker,
slice of coordinates).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Vector = np.ndarray
Gradient = Callable[[int, int, Vector], Vector]
Order = Sequence[tuple[int, slice]]


def round_robin(workers: int, blocks: Sequence[slice]) -> list[tuple[int, slice]]:
    """One round of the Latin square: the blocks form p groups, and group g serves workers g, g - 1, ... (mod p)."""
    q = len(blocks) // workers
    return [((b // q - place) % workers, block) for b, block in enumerate(blocks) for place in range(workers)]


def easgd(
    x: list[Vector], c: Vector, gradient: Gradient, *, eta: float, alpha: float, tau: int, steps: range, order: Order
) -> None:
    """Asynchronous EASGD: Zhang et al. 2015, Algorithm 1 (arXiv:1412.6651). Changes x and c in place."""
    eta, alpha = c.dtype.type(eta), c.dtype.type(alpha)
    for t in steps:
        at = [xi.copy() for xi in x]  # 1. x <- x^i
        if t % tau == 0:  # 2. if τ divides t^i
            for i, b in order:
                d = alpha * (x[i][b] - c[b])
                x[i][b] = x[i][b] - d  # x^i <- x^i - α(x - x~)
                c[b] = c[b] + d  # x~ <- x~ + α(x - x~)
        for i in range(len(x)):
            x[i][:] = x[i] - eta * gradient(i, t, at[i])  # 3. x^i <- x^i - η g(x);  4. t^i <- t^i + 1


def eamsgd(
    x: list[Vector], v: list[Vector], c: Vector, gradient: Gradient, *,
    eta: float, alpha: float, delta: float, tau: int, steps: range, order: Order,
) -> None:  # fmt: skip
    """Asynchronous EAMSGD: Zhang et al. 2015, Algorithm 2 (arXiv:1412.6651). Changes x, v and c in place."""
    eta, alpha, delta = (c.dtype.type(value) for value in (eta, alpha, delta))
    for t in steps:
        at = [xi.copy() for xi in x]
        if t % tau == 0:
            for i, b in order:
                d = alpha * (x[i][b] - c[b])
                x[i][b] = x[i][b] - d
                c[b] = c[b] + d
        for i in range(len(x)):
            v[i][:] = delta * v[i] - eta * gradient(i, t, at[i] + delta * v[i])  # v <- δv - η g(x + δv)
            x[i][:] = x[i] + v[i]


def sgd(x: Vector, gradient: Gradient, *, eta: float, steps: range) -> None:
    """Stochastic gradient descent. Changes x in place."""
    eta = x.dtype.type(eta)
    for t in steps:
        x[:] = x - eta * gradient(0, t, x.copy())


def msgd(x: Vector, v: Vector, gradient: Gradient, *, eta: float, delta: float, steps: range) -> None:
    """SGD with Nesterov momentum, as Zhang et al. 2015 write it (arXiv:1412.6651). Changes x and v in place."""
    eta, delta = x.dtype.type(eta), x.dtype.type(delta)
    for t in steps:
        v[:] = delta * v - eta * gradient(0, t, x + delta * v)
        x[:] = x + v
