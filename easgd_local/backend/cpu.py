"""The operations of the rules on float32 vectors in main memory: this file is their definition.

Every arithmetic operation rounds once to float32 (no fused multiply-add), in the order the formula shows, so that
another backend can agree bit for bit. Vectors are worked through in pieces that stay in the cache. What is written
comes first in the arguments, except in the pulls, which follow the paper: x meets c.
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


quiet = np.errstate(invalid="ignore", over="ignore")  # not finite: found and dealt with, not warned about


class CpuOps:
    """The operations, with the count of non-finite elements that they kept from the center (read and reset by the
    worker).

    Where what a worker would bring to the center is not finite it contributes nothing there and takes the center's
    value; operations that do so are marked "guarded".
    """

    def __init__(self) -> None:
        self.nonfinite = 0
        self._scratch = vector(PIECE)
        self._scratch2 = vector(PIECE)

    # What moves the center

    @quiet
    def pull(self, x: Vector, c: Vector, d: Vector, alpha: float) -> None:
        """d <- α(x - c);  c <- c + d.  Guarded: d <- 0, x <- c."""
        for x_, c_, d_ in _pieces(x, c, d):
            self._difference(x_, c_, d_, np.float32(alpha))
            np.add(c_, d_, out=c_)

    @quiet
    def pull_center_first(self, x: Vector, c: Vector, d: Vector, alpha: float) -> None:
        """c <- c + α(x - c);  d <- α(x - c), with the new c.  Guarded: d <- 0, x <- c."""
        for x_, c_, d_ in _pieces(x, c, d):
            self._difference(x_, c_, d_, np.float32(alpha))
            np.add(c_, d_, out=c_)
            self._difference(x_, c_, d_, np.float32(alpha))

    @quiet
    def pull_worker_first(self, x: Vector, c: Vector, d: Vector, g: Vector, lr: float, alpha: float) -> None:
        """x <- (x - α(x - c)) - ηg;  c <- c + α(x - c), with the new x; d is overwritten.  Guarded: x <- c."""
        for x_, c_, d_, g_ in _pieces(x, c, d, g):
            self._difference(x_, c_, d_, np.float32(alpha))
            np.subtract(x_, d_, out=x_)
            np.subtract(x_, self._times(np.float32(lr), g_), out=x_)
            self._difference(x_, c_, d_, np.float32(alpha))
            np.add(c_, d_, out=c_)

    @quiet
    def difference(self, d: Vector, x: Vector, c: Vector, alpha: float) -> None:
        """d <- α(x - c).  Guarded: d <- 0, x <- c."""
        for d_, x_, c_ in _pieces(d, x, c):
            self._difference(x_, c_, d_, np.float32(alpha))

    @quiet
    def push(self, c: Vector, x: Vector, v: Vector) -> None:
        """c <- c + v;  x <- c;  v <- 0.  Guarded: c stays."""
        for c_, x_, v_ in _pieces(c, x, v):
            if not _all_finite(v_):
                bad = ~np.isfinite(v_)
                v_[bad] = 0
                self.nonfinite += int(np.count_nonzero(bad))
            np.add(c_, v_, out=c_)
            np.copyto(x_, c_)
            v_.fill(0)

    @quiet
    def nesterov_at_center(self, c: Vector, v: Vector, x: Vector, g: Vector, lr: float, momentum: float) -> None:
        """v <- δv - ηg;  c <- (c - ηg) + δv;  x <- c.  Guarded: v and c stay."""
        eta, delta = np.float32(lr), np.float32(momentum)
        for c_, v_, x_, g_ in _pieces(c, v, x, g):
            refused = self._refused(g_, c_, v_)
            step = self._times(eta, g_)
            np.multiply(v_, delta, out=v_)
            np.subtract(v_, step, out=v_)
            np.subtract(c_, step, out=c_)
            np.add(c_, self._times(delta, v_), out=c_)
            _put_back(refused, c_, v_)
            np.copyto(x_, c_)

    @quiet
    def amsgrad(
        self, c: Vector, m: Vector, v: Vector, vhat: Vector, x: Vector, g: Vector,
        lr: float, beta1: float, beta2: float, epsilon: float,
    ) -> None:  # fmt: skip
        """m <- β₁m + (1 - β₁)g;  v <- β₂v + ((1 - β₂)g)g;  v̂ <- max(v̂, v);  c <- c - (ηm)/(√v̂ + ε);  x <- c.

        Guarded: all but x stay.
        """
        eta, eps = np.float32(lr), np.float32(epsilon)
        b1, b2 = np.float32(beta1), np.float32(beta2)
        a1, a2 = np.float32(1) - b1, np.float32(1) - b2
        for c_, m_, v_, vhat_, x_, g_ in _pieces(c, m, v, vhat, x, g):
            square, step = self._times(a2, g_), self._scratch2[: len(c_)]
            np.multiply(square, g_, out=square)
            refused = self._refused(square, c_, m_, v_, vhat_)
            np.multiply(v_, b2, out=v_)
            np.add(v_, square, out=v_)
            np.multiply(m_, b1, out=m_)
            np.add(m_, self._times(a1, g_), out=m_)
            np.maximum(vhat_, v_, out=vhat_)
            np.sqrt(vhat_, out=step)
            np.add(step, eps, out=step)
            np.divide(self._times(eta, m_), step, out=step)
            np.subtract(c_, step, out=c_)
            _put_back(refused, c_, m_, v_, vhat_)
            np.copyto(x_, c_)

    @quiet
    def admm(
        self, x: Vector, c: Vector, multiplier: Vector, y: Vector, g: Vector, lr: float, rho: float, workers: int
    ) -> None:
        """λ <- λ - (x - c);  x <- ((x - ηg) + ηρ(λ + c))/(1 + ηρ);  c <- c + ((x - λ) - y)/p;  y <- x - λ.

        Guarded: c and y stay, x <- c, λ <- x - y.
        """
        eta = np.float32(lr)
        weight = eta * np.float32(rho)
        total, share = np.float32(1) + weight, np.float32(workers)
        for x_, c_, l_, y_, g_ in _pieces(x, c, multiplier, y, g):
            piece = self._scratch2[: len(x_)]
            np.subtract(x_, c_, out=piece)
            np.subtract(l_, piece, out=l_)
            np.subtract(x_, self._times(eta, g_), out=x_)
            np.add(l_, c_, out=piece)
            np.add(x_, self._times(weight, piece), out=x_)
            np.divide(x_, total, out=x_)
            np.subtract(x_, l_, out=piece)
            if not _all_finite(piece):
                bad = ~np.isfinite(piece)
                self.nonfinite += int(np.count_nonzero(bad))
                x_[bad] = c_[bad]
                l_[bad] = x_[bad] - y_[bad]
                piece[bad] = y_[bad]
            np.subtract(piece, y_, out=y_)  # the change of the contribution, for a moment
            np.divide(y_, share, out=y_)
            np.add(c_, y_, out=c_)
            np.copyto(y_, piece)

    @quiet
    def heavy_ball(self, c: Vector, v: Vector, g: Vector, lr: float, momentum: float) -> None:
        """v <- δv + g;  c <- c - ηv.  Guarded: v and c stay."""
        eta, delta = np.float32(lr), np.float32(momentum)
        for c_, v_, g_ in _pieces(c, v, g):
            refused = self._refused(g_, c_, v_)
            np.multiply(v_, delta, out=v_)
            np.add(v_, g_, out=v_)
            np.subtract(c_, self._times(eta, v_), out=c_)
            _put_back(refused, c_, v_)

    @quiet
    def nesterov_ball(self, c: Vector, v: Vector, g: Vector, lr: float, momentum: float) -> None:
        """v <- δv + g;  c <- c - η(g + δv), Nesterov's momentum as torch.optim.SGD has it.  Guarded: v and c stay."""
        eta, delta = np.float32(lr), np.float32(momentum)
        for c_, v_, g_ in _pieces(c, v, g):
            refused = self._refused(g_, c_, v_)
            np.multiply(v_, delta, out=v_)
            np.add(v_, g_, out=v_)
            ahead = self._times(delta, v_)
            np.add(g_, ahead, out=ahead)
            np.multiply(ahead, eta, out=ahead)
            np.subtract(c_, ahead, out=c_)
            _put_back(refused, c_, v_)

    def average(self, z: Vector, c: Vector, a: float) -> None:
        """z <- (1 - a)z + ac."""
        new = np.float32(a)
        old = np.float32(1) - new
        for z_, c_ in _pieces(z, c):
            np.multiply(z_, old, out=z_)
            np.add(z_, self._times(new, c_), out=z_)

    def add(self, y: Vector, x: Vector) -> None:
        """y <- y + x."""
        np.add(y, x, out=y)

    # What moves a worker

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

    def accumulate(self, x: Vector, v: Vector, g: Vector, lr: float) -> None:
        """x <- x - ηg;  v <- v - ηg."""
        eta = np.float32(lr)
        for x_, v_, g_ in _pieces(x, v, g):
            step = self._times(eta, g_)
            np.subtract(x_, step, out=x_)
            np.subtract(v_, step, out=v_)

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

    def subtract(self, y: Vector, x: Vector) -> None:
        """y <- y - x."""
        np.subtract(y, x, out=y)

    def copy(self, y: Vector, x: Vector) -> None:
        """y <- x."""
        np.copyto(y, x)

    def fill(self, y: Vector, value: float) -> None:
        """y <- value, everywhere."""
        y.fill(value)

    def _times(self, a: np.float32, x: Vector) -> Vector:
        return np.multiply(x, a, out=self._scratch[: len(x)])

    def _difference(self, x: Vector, c: Vector, d: Vector, alpha: np.float32) -> None:
        np.subtract(x, c, out=d)
        np.multiply(d, alpha, out=d)
        if not _all_finite(d):
            bad = ~np.isfinite(d)
            d[bad] = 0
            x[bad] = c[bad]
            self.nonfinite += int(np.count_nonzero(bad))

    def _refused(self, contribution: Vector, *vectors: Vector) -> Refused:
        """Where the contribution is not finite, counted, and what the vectors hold there; None if it is finite."""
        if _all_finite(contribution):
            return None
        bad = ~np.isfinite(contribution)
        self.nonfinite += int(np.count_nonzero(bad))
        return bad, [vector[bad] for vector in vectors]


Refused = tuple[NDArray[np.bool_], list[Vector]] | None


def _put_back(refused: Refused, *vectors: Vector) -> None:
    if refused is not None:
        bad, values = refused
        for vector, value in zip(vectors, values, strict=True):
            vector[bad] = value


def _all_finite(x: Vector) -> bool:
    # NaN is neither below nor above anything, and it wins in max and in min.
    return bool(np.maximum.reduce(x) < np.inf and np.minimum.reduce(x) > -np.inf)


def _pieces(*vectors: Vector) -> Iterator[tuple[Vector, ...]]:
    n = len(vectors[0])
    for start in range(0, n, PIECE):
        yield tuple(vector[start : start + PIECE] for vector in vectors)
