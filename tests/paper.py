"""The published listings, transcribed literally: sequential, plain NumPy, no regard for speed.

Vectors are NumPy arrays, float32 or float64; every operation rounds once in their type. `gradient(i, t, x)` is worker
i's stochastic gradient at its clock t and the point x. `order` lists the visits of one exchange as pairs (worker,
slice of coordinates).
"""

from __future__ import annotations

from collections import Counter
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


def easgd_sync(
    x: list[Vector], c: Vector, gradient: Gradient, *, eta: float, alpha: float, tau: int, steps: range
) -> None:
    """Synchronous EASGD: Zhang et al. 2015, equations 5 and 6 (arXiv:1412.6651). Changes x and c in place."""
    eta, alpha = c.dtype.type(eta), c.dtype.type(alpha)
    for t in steps:
        at = [xi.copy() for xi in x]
        if t % tau == 0:
            d = [alpha * (xi - c) for xi in x]  # all from the old x~
            for i in range(len(x)):
                c[:] = c + d[i]  # x~ <- (1 - β) x~ + β mean x^i, with β = pα
                x[i][:] = x[i] - d[i]
        for i in range(len(x)):
            x[i][:] = x[i] - eta * gradient(i, t, at[i])


def eamsgd_sync(
    x: list[Vector], v: list[Vector], c: Vector, gradient: Gradient, *,
    eta: float, alpha: float, delta: float, tau: int, steps: range,
) -> None:  # fmt: skip
    """Synchronous EAMSGD: Zhang et al. 2015, equation 7 (arXiv:1412.6651). Changes x, v and c in place."""
    eta, alpha, delta = (c.dtype.type(value) for value in (eta, alpha, delta))
    for t in steps:
        at = [xi.copy() for xi in x]
        if t % tau == 0:
            d = [alpha * (xi - c) for xi in x]
            for i in range(len(x)):
                c[:] = c + d[i]
                x[i][:] = x[i] - d[i]
        for i in range(len(x)):
            v[i][:] = delta * v[i] - eta * gradient(i, t, at[i] + delta * v[i])
            x[i][:] = x[i] + v[i]


def easgd_gauss_seidel(
    x: list[Vector], c: Vector, gradient: Gradient, *,
    eta: float, alpha: float, tau: int, steps: range, order: Order, first: str,
) -> None:  # fmt: skip
    """The two updates of EASGD, the second with the fresh value of the first. Changes x and c in place."""
    eta, alpha = c.dtype.type(eta), c.dtype.type(alpha)
    for t in steps:
        g = [gradient(i, t, xi.copy()) for i, xi in enumerate(x)]
        if t % tau:
            for i in range(len(x)):
                x[i][:] = x[i] - eta * g[i]
            continue
        for i, b in order:
            if first == "center":
                c[b] = c[b] + alpha * (x[i][b] - c[b])
                x[i][b] = x[i][b] - alpha * (x[i][b] - c[b]) - eta * g[i][b]
            else:
                x[i][b] = x[i][b] - alpha * (x[i][b] - c[b]) - eta * g[i][b]
                c[b] = c[b] + alpha * (x[i][b] - c[b])


def downpour(
    x: list[Vector], v: list[Vector], c: Vector, gradient: Gradient, *,
    eta: float, tau: int, steps: range, order: Order, z: Vector | None = None, a: Callable[[int], float] | None = None,
) -> None:  # fmt: skip
    """DOWNPOUR, ADOWNPOUR, MVADOWNPOUR: Zhang et al. 2015, section 5 (arXiv:1412.6651). Changes x, v, c, z in place.

    a(k) is the rate of the average at the center's k-th update: 1/(k + 1), or a constant.
    """
    one, eta, k = c.dtype.type(1), c.dtype.type(eta), Counter[tuple[int, int]]()
    for t in steps:
        if t % tau == 0:
            for i, b in order:
                c[b] = c[b] + v[i][b]
                x[i][b] = c[b]
                v[i][b] = 0
                if z is not None and a is not None:
                    k[b.start, b.stop] += 1
                    rate = c.dtype.type(a(k[b.start, b.stop]))
                    z[b] = (one - rate) * z[b] + rate * c[b]
        for i in range(len(x)):
            g = gradient(i, t, x[i].copy())
            x[i][:] = x[i] - eta * g
            v[i][:] = v[i] - eta * g


def mdownpour(
    x: list[Vector], v: Vector, c: Vector, gradient: Gradient, *, eta: float, delta: float, steps: range, order: Order
) -> None:
    """MDOWNPOUR: Zhang et al. 2015, section 5 (arXiv:1412.6651). Changes x, v and c in place."""
    eta, delta = c.dtype.type(eta), c.dtype.type(delta)
    for t in steps:
        g = [gradient(i, t, xi.copy()) for i, xi in enumerate(x)]
        for i, b in order:
            v[b] = delta * v[b] - eta * g[i][b]
            c[b] = c[b] - eta * g[i][b] + delta * v[b]
            x[i][b] = c[b]


def admm(
    x: list[Vector], multiplier: list[Vector], c: Vector, gradient: Gradient, *,
    eta: float, rho: float, steps: range, order: Order,
) -> None:  # fmt: skip
    """Asynchronous ADMM: Zhang et al. 2015, equations 8 to 11 (arXiv:1412.6651). Changes x, λ and c in place."""
    eta, rho = c.dtype.type(eta), c.dtype.type(rho)
    for t in steps:
        g = [gradient(i, t, xi.copy()) for i, xi in enumerate(x)]
        for i, b in order:
            multiplier[i][b] = multiplier[i][b] - (x[i][b] - c[b])
            x[i][b] = (x[i][b] - eta * g[i][b] + eta * rho * (multiplier[i][b] + c[b])) / (1 + eta * rho)
            c[b] = sum(xj[b] - lj[b] for xj, lj in zip(x, multiplier, strict=True)) / c.dtype.type(len(x))


def admm_incremental(
    x: list[Vector], multiplier: list[Vector], c: Vector, gradient: Gradient, *,
    eta: float, rho: float, steps: range, order: Order,
) -> None:  # fmt: skip
    """The same with the sum kept up to date by the change of the active worker's term."""
    eta, rho = c.dtype.type(eta), c.dtype.type(rho)
    one, p = c.dtype.type(1), c.dtype.type(len(x))
    for t in steps:
        g = [gradient(i, t, xi.copy()) for i, xi in enumerate(x)]
        for i, b in order:
            before = x[i][b] - multiplier[i][b]
            multiplier[i][b] = multiplier[i][b] - (x[i][b] - c[b])
            x[i][b] = (x[i][b] - eta * g[i][b] + (eta * rho) * (multiplier[i][b] + c[b])) / (one + eta * rho)
            c[b] = c[b] + ((x[i][b] - multiplier[i][b]) - before) / p


def apam(
    x: list[Vector], m: Vector, v: Vector, vhat: Vector, c: Vector, gradient: Gradient, *,
    eta: float, beta1: float, beta2: float, epsilon: float, delay: int, steps: range, order: Order,
) -> None:  # fmt: skip
    """APAM: Xu et al. 2020 (arXiv:2002.09095), with the bias correction and ε of the authors' code.

    Gradients are taken at the x of `delay` steps before. Changes all vectors in place.
    """
    f, k, past = c.dtype.type, Counter[tuple[int, int]](), [[xi.copy()] * (delay + 1) for xi in x]
    for t in steps:
        g = [gradient(i, t, past[i][0].copy()) for i in range(len(x))]
        for i, b in order:
            k[b.start, b.stop] += 1
            eta_k = f(eta * np.sqrt(1 - beta2 ** k[b.start, b.stop]) / (1 - beta1 ** k[b.start, b.stop]))
            m[b] = f(beta1) * m[b] + (f(1) - f(beta1)) * g[i][b]
            v[b] = f(beta2) * v[b] + (f(1) - f(beta2)) * g[i][b] * g[i][b]
            vhat[b] = np.maximum(vhat[b], v[b])
            c[b] = c[b] - eta_k * m[b] / (np.sqrt(vhat[b]) + f(epsilon))
            x[i][b] = c[b]
        for i in range(len(x)):
            past[i] = [*past[i][1:], x[i].copy()]


def passm(
    x: list[Vector], u: list[Vector], c: Vector, gradient: Gradient, *,
    eta: float, mu: float, own: Sequence[slice], steps: range, order: Order,
) -> None:  # fmt: skip
    """PASSM: Kungurtsev et al. 2021 (arXiv:1905.11845); own[i] is the block of worker i. Changes x, u, c in place."""
    eta, mu = c.dtype.type(eta), c.dtype.type(mu)
    for t in steps:
        g = [gradient(i, t, xi.copy()) for i, xi in enumerate(x)]
        for i, b in order:
            for j in range(max(b.start, own[i].start), min(b.stop, own[i].stop)):
                u[i][j] = mu * u[i][j] + g[i][j]
                c[j] = c[j] - eta * u[i][j]
            x[i][b] = c[b]


def passm_plus(
    x: list[Vector], u: list[Vector], c: Vector, gradient: Gradient, *,
    eta: float, mu: float, own: Sequence[slice], full_steps: int, steps: range, order: Order,
) -> None:  # fmt: skip
    """PASSM+: full steps at first, then partial and full ones in turn, with Nesterov's momentum (arXiv:1905.11845)."""
    eta, mu = c.dtype.type(eta), c.dtype.type(mu)
    for t in steps:
        full = t < full_steps or (t - full_steps) % 2 == 1
        g = [gradient(i, t, xi.copy()) for i, xi in enumerate(x)]
        for i, b in order:
            mine = b if full else own[i]
            for j in range(max(b.start, mine.start), min(b.stop, mine.stop)):
                u[i][j] = mu * u[i][j] + g[i][j]
                c[j] = c[j] - eta * (g[i][j] + mu * u[i][j])
            x[i][b] = c[b]


Move = Callable[[int, int], None]  # move(i, t): one step of worker i's local optimizer, changing its x in place


def localsgd(x: list[Vector], c: Vector, move: Move, *, tau: int, steps: range) -> None:
    """Local SGD: Stich 2019 (arXiv:1805.09767); the mean written as a sum of differences. Changes x and c in place."""
    p = c.dtype.type(1 / len(x))
    for t in steps:
        if t % tau == 0:
            d = [p * (xi - c) for xi in x]
            for di in d:
                c[:] = c + di
            for xi in x:
                xi[:] = c
        for i in range(len(x)):
            move(i, t)


def sma(x: list[Vector], u: Vector, s: Vector, c: Vector, move: Move, *, mu: float, tau: int, steps: range) -> None:
    """Synchronous model averaging: Koliousis et al. 2019, Algorithm 1 (arXiv:1901.02244); u is z - z_prev there."""
    alpha, mu = c.dtype.type(1 / len(x)), c.dtype.type(mu)
    for t in steps:
        d = [alpha * (xi - c) if t % tau == 0 else None for xi in x]
        if t % tau == 0:
            s[:] = 0
            for di in d:
                s[:] = s + di
            u[:] = mu * u + s
            c[:] = c + u
        for i in range(len(x)):
            move(i, t)
            if d[i] is not None:
                x[i][:] = x[i] - d[i]


def diloco(
    x: list[Vector], u: Vector, s: Vector, c: Vector, move: Move, *, eta: float, mu: float, tau: int, steps: range
) -> None:
    """DiLoCo: Douillard et al. 2023, Algorithm 1 (arXiv:2311.08105), with torch's form of Nesterov's momentum."""
    p, eta, mu = c.dtype.type(1 / len(x)), c.dtype.type(eta), c.dtype.type(mu)
    for t in steps:
        if t % tau == 0:
            s[:] = 0
            for xi in x:
                s[:] = s + p * (xi - c)
            u[:] = mu * u + s
            c[:] = c + eta * (s + mu * u)
            for xi in x:
                xi[:] = c
        for i in range(len(x)):
            move(i, t)


def sgd(
    x: Vector, gradient: Gradient, *, eta: float, steps: range, z: Vector | None = None,
    a: Callable[[int], float] | None = None,
) -> None:  # fmt: skip
    """Stochastic gradient descent, and ASGD or MVASGD with the average z. Changes x and z in place."""
    one, eta = x.dtype.type(1), x.dtype.type(eta)
    for k, t in enumerate(steps, start=1):
        x[:] = x - eta * gradient(0, t, x.copy())
        if z is not None and a is not None:
            rate = x.dtype.type(a(k))
            z[:] = (one - rate) * z + rate * x


def msgd(x: Vector, v: Vector, gradient: Gradient, *, eta: float, delta: float, steps: range) -> None:
    """SGD with Nesterov momentum, as Zhang et al. 2015 write it (arXiv:1412.6651). Changes x and v in place."""
    eta, delta = x.dtype.type(eta), x.dtype.type(delta)
    for t in steps:
        v[:] = delta * v - eta * gradient(0, t, x + delta * v)
        x[:] = x + v
