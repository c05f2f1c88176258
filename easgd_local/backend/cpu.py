"""The operations of the rules on float32 vectors in main memory: this file is their definition.

Every arithmetic operation rounds once to float32 (no fused multiply-add), in the order the formula shows, so that
another backend can agree bit for bit. Vectors are worked through in pieces that stay in the cache. What is written
comes first in the arguments, except in `pull`, which follows the paper: x meets c.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]

PIECE = 32 * 1024  # floats: 128 KiB, so that the three or four pieces in hand stay in the second-level cache


def vector(n: int) -> Vector:
    """n zeros that start on a page.

    Matrix libraries choose their code by the address's alignment, so a fixed one is part of being reproducible.
    """
    return np.frombuffer(mmap.mmap(-1, max(4 * n, 1)), np.float32, n)


class CpuOps:
    """The operations, with the count of non-finite elements that `pull` has met (read and reset by the worker)."""

    def __init__(self) -> None:
        self.nonfinite = 0
        self._scratch = vector(PIECE)

    def pull(self, x: Vector, c: Vector, d: Vector, alpha: float) -> None:
        """d <- α(x - c);  c <- c + d.

        Where d is not finite the worker contributes nothing and takes the center's value: d <- 0, x <- c, counted.
        """
        a = np.float32(alpha)
        with np.errstate(invalid="ignore", over="ignore"):
            for x_, c_, d_ in _pieces(x, c, d):
                np.subtract(x_, c_, out=d_)
                np.multiply(d_, a, out=d_)
                # NaN is neither below nor above anything, and it wins in max and in min.
                if not (np.maximum.reduce(d_) < np.inf and np.minimum.reduce(d_) > -np.inf):
                    self._reload(x_, c_, d_)
                np.add(c_, d_, out=c_)

    def _reload(self, x: Vector, c: Vector, d: Vector) -> None:
        bad = ~np.isfinite(d)
        d[bad] = 0
        x[bad] = c[bad]
        self.nonfinite += int(np.count_nonzero(bad))

    def descend(self, x: Vector, g: Vector, lr: float, d: Vector | None = None) -> None:
        """x <- (x - d) - ηg;  without d: x <- x - ηg."""
        eta = np.float32(lr)
        for x_, g_, d_ in _pieces(x, g, x if d is None else d):
            if d is not None:
                np.subtract(x_, d_, out=x_)
            np.subtract(x_, self._times(eta, g_), out=x_)

    def nesterov(self, x: Vector, v: Vector, g: Vector, lr: float, momentum: float, d: Vector | None = None) -> None:
        """v <- δv - ηg;  x <- (x - d) + v;  without d: x <- x + v."""
        eta, delta = np.float32(lr), np.float32(momentum)
        for x_, v_, g_, d_ in _pieces(x, v, g, x if d is None else d):
            np.multiply(v_, delta, out=v_)
            np.subtract(v_, self._times(eta, g_), out=v_)
            if d is not None:
                np.subtract(x_, d_, out=x_)
            np.add(x_, v_, out=x_)

    def lookahead(self, y: Vector, x: Vector, v: Vector, momentum: float) -> None:
        """y <- x + δv."""
        delta = np.float32(momentum)
        for y_, x_, v_ in _pieces(y, x, v):
            np.add(x_, self._times(delta, v_), out=y_)

    def add_decay(self, g: Vector, x: Vector, weight_decay: float) -> None:
        """g <- g + λx, the gradient of (λ/2)‖x‖²."""
        lam = np.float32(weight_decay)
        for g_, x_ in _pieces(g, x):
            np.add(g_, self._times(lam, x_), out=g_)

    def copy(self, y: Vector, x: Vector) -> None:
        """y <- x."""
        np.copyto(y, x)

    def fill(self, y: Vector, value: float) -> None:
        """y <- value, everywhere."""
        y.fill(value)

    def _times(self, a: np.float32, x: Vector) -> Vector:
        return np.multiply(x, a, out=self._scratch[: len(x)])


def _pieces(*vectors: Vector) -> Iterator[tuple[Vector, ...]]:
    n = len(vectors[0])
    for start in range(0, n, PIECE):
        yield tuple(vector[start : start + PIECE] for vector in vectors)
