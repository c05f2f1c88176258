"""Problems small enough for thousands of workers in one process: a noisy quadratic, logistic regression, the digits.

A gradient is a pure function of (seed, rank, t, x), whoever asks for it in whatever order.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from easgd_local.backend.cpu import Vector

DRAWN = 4096  # numbers that are drawn together, or those of one step if they are more
MOST_LAYERS = 256  # into which a problem without layers is cut, for the rules that divide the model
SAMPLES, WEIGHT_DECAY, HIDDEN = 2000, 1e-2, 32


class Problem(Protocol):
    """What is minimised: n coordinates in layers, a start, a stochastic gradient, and the error of a point."""

    n: int
    layers: list[slice]
    start: Vector
    measure: str  # what `error` is, with its unit

    def gradient(self, rank: int, t: int, x: Vector) -> Vector: ...
    def error(self, x: Vector) -> float: ...


class Draws:
    """The random numbers of worker i's step t, `size` of them: drawn for some steps at a time and kept until used."""

    def __init__(self, seed: int, size: int, draw: Callable[[np.random.Generator, tuple[int, int]], Any]) -> None:
        self._seed, self._draw, self._shape = seed, draw, (max(1, DRAWN // size), size)
        self._kept: dict[int, tuple[int, Any]] = {}

    def __call__(self, rank: int, t: int) -> Any:
        chunk, place = divmod(t, self._shape[0])
        kept, numbers = self._kept.get(rank, (-1, None))
        if kept != chunk:
            numbers = self._draw(np.random.default_rng([self._seed, rank, chunk, 0]), self._shape)
            self._kept[rank] = chunk, numbers
        return numbers[place]


class Quadratic:
    """f(x) = ½ Σ h x², h spread evenly in the logarithm from 1/condition to 1; gradients hx + σξ, ξ standard normal.

    Starts at x = ±1, signs by the seed. The error is f, which is 0 at the minimum.
    """

    measure = "excess loss ½ Σ h c²"

    def __init__(self, seed: int, *, dimension: int, condition: float, sigma: float) -> None:
        self.n, self.layers = dimension, _runs(dimension)
        self._h = np.geomspace(1 / condition, 1, dimension).astype(np.float32)
        self._noise = Draws(seed, dimension, lambda rng, shape: np.float32(sigma) * rng.standard_normal(shape, "f"))
        self.start = np.random.default_rng([seed, 2]).choice([-1, 1], dimension).astype(np.float32)

    def gradient(self, rank: int, t: int, x: Vector) -> Vector:
        """hx + σξ."""
        return self._h * x + self._noise(rank, t)

    def error(self, x: Vector) -> float:
        """½ Σ h x², in float64."""
        return float(0.5 * np.sum(self._h * x.astype(np.float64) ** 2))


class Logistic:
    """f(x) = mean over 2000 samples of log(1 + exp(-y aᵀx)) + (λ/2)‖x‖², λ = 0.01, minibatches drawn from them all.

    a: normal, with deviations from 1/√condition to 1; y = ±1 by a plane through 0 with normal noise of deviation
    `sigma` beside it. Starts at 0. The error is f less its minimum, which Newton's method finds.
    """

    measure = "excess training loss"

    def __init__(self, seed: int, *, dimension: int, condition: float, sigma: float, batch_size: int) -> None:
        rng = np.random.default_rng([seed, 3])
        self.n, self.layers, self.start = dimension, _runs(dimension), np.zeros(dimension, np.float32)
        samples = rng.standard_normal((SAMPLES, dimension)) * np.geomspace(condition**-0.5, 1, dimension)
        side = samples @ rng.standard_normal(dimension) + sigma * rng.standard_normal(SAMPLES)
        self._signed = (samples * np.sign(side)[:, None]).astype(np.float32)  # y a
        self._drawn = Draws(seed, batch_size, lambda rng, shape: rng.integers(SAMPLES, size=shape))
        self._least = self._loss(self._minimum())

    def gradient(self, rank: int, t: int, x: Vector) -> Vector:
        """Of the loss on a minibatch."""
        signed = self._signed[self._drawn(rank, t)]
        return -(_sigmoid(-(signed @ x)) @ signed) / np.float32(len(signed)) + np.float32(WEIGHT_DECAY) * x

    def error(self, x: Vector) -> float:
        """f(x) less the minimum of f."""
        return self._loss(x) - self._least

    def _loss(self, x: NDArray[Any]) -> float:
        x = x.astype(np.float64)
        return float(np.logaddexp(0, -(self._signed @ x)).mean() + WEIGHT_DECAY / 2 * x @ x)

    def _minimum(self) -> NDArray[np.float64]:
        x, a = np.zeros(self.n), self._signed.astype(np.float64)
        for _ in range(50):
            s = _sigmoid(-(a @ x))
            slope = WEIGHT_DECAY * x - a.T @ s / SAMPLES
            step = np.linalg.solve((a * (s * (1 - s))[:, None]).T @ a / SAMPLES + WEIGHT_DECAY * np.eye(self.n), slope)
            x -= step
            if np.abs(step).max() < 1e-9:  # Newton's error squares at each step
                break
        return x


class Digits:
    """A network 64 - 32 - 10 with tanh on the bundled digits; cross-entropy over minibatches drawn from them all.

    The error is the mean loss over the 1437 training pictures.
    """

    measure = "training loss"

    def __init__(self, seed: int, *, batch_size: int) -> None:
        from easgd_local import data

        digits = data.load("digits")
        pictures, self._labels = digits.train.read(np.arange(len(digits.train)))
        self._pictures = (pictures.reshape(len(pictures), -1) * np.float32(digits.scale)).astype(np.float32)
        self._shapes = ((self._pictures.shape[1], HIDDEN), (HIDDEN,), (HIDDEN, 10), (10,))
        edges = np.cumsum([0, *(int(np.prod(shape)) for shape in self._shapes)])
        self.layers = [slice(int(start), int(stop)) for start, stop in pairwise(edges)]
        self.n = int(edges[-1])
        rng, self.start = np.random.default_rng([seed, 4]), np.zeros(self.n, np.float32)
        for weights in self._views(self.start)[::2]:
            weights[:] = rng.standard_normal(weights.shape) / np.sqrt(len(weights))
        self._drawn = Draws(seed, batch_size, lambda rng, shape: rng.integers(len(self._labels), size=shape))

    def gradient(self, rank: int, t: int, x: Vector) -> Vector:
        """Of the mean cross-entropy on a minibatch, by hand."""
        chosen = self._drawn(rank, t)
        pictures, (_, _, out, _), g = self._pictures[chosen], self._views(x), np.empty(self.n, np.float32)
        hidden, scores = self._forward(pictures, x)
        wrong = np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))
        wrong[np.arange(len(chosen)), self._labels[chosen]] -= 1
        wrong /= np.float32(len(chosen))
        back = (wrong @ out.T) * (1 - hidden**2)
        parts = (pictures.T @ back, back.sum(axis=0), hidden.T @ wrong, wrong.sum(axis=0))
        for place, part in zip(self._views(g), parts, strict=True):
            place[:] = part
        return g

    def error(self, x: Vector) -> float:
        """Mean cross-entropy over all training pictures."""
        scores = self._forward(self._pictures, x)[1].astype(np.float64)
        right = scores[np.arange(len(scores)), self._labels]
        return float((np.logaddexp.reduce(scores, axis=1) - right).mean())

    def _forward(self, pictures: NDArray[np.float32], x: Vector) -> tuple[NDArray[Any], NDArray[Any]]:
        into, bias, out, bias_out = self._views(x)
        hidden = np.tanh(pictures @ into + bias)
        return hidden, hidden @ out + bias_out

    def _views(self, x: Vector) -> list[NDArray[np.float32]]:
        return [x[layer].reshape(shape) for layer, shape in zip(self.layers, self._shapes, strict=True)]


DEFAULTS = {"dimension": 32, "condition": 100.0, "sigma": 1.0, "batch_size": 16}
PROBLEMS: dict[str, tuple[Callable[..., Problem], tuple[str, ...]]] = {
    "quadratic": (Quadratic, ("dimension", "condition", "sigma")),
    "logistic": (Logistic, ("dimension", "condition", "sigma", "batch_size")),
    "digits": (Digits, ("batch_size",)),
}


def make_problem(name: str, *, seed: int = 0, **given: Any) -> Problem:
    """The problem of that name; `ValueError` for an unknown one, for a value that it has not, and for bad ones.

    given: dimension, condition and sigma of the quadratic and of logistic regression, batch_size of the latter and of
    the digits.
    """
    if name not in PROBLEMS:
        raise ValueError(f"problem={name}: must be one of {', '.join(PROBLEMS)}; choose one of them.")
    kind, own = PROBLEMS[name]
    for what, value in given.items():
        if what not in own:
            raise ValueError(f"{what}={value}: the problem {name} has no {what}, only {', '.join(own)}; leave it out.")
    values: dict[str, Any] = {what: given.get(what, DEFAULTS[what]) for what in own}
    for what, least in (("dimension", 1), ("batch_size", 1)):
        if values.get(what, least) < least:
            raise ValueError(f"{what}={values[what]}: must be at least {least}; the default is {DEFAULTS[what]}.")
    if seed < 0:
        raise ValueError(f"seed={seed}: must be at least 0; choose another one.")
    if not 1 <= values.get("condition", 1) <= 1e6:
        raise ValueError(
            f"condition={values['condition']:g}: the largest curvature over the smallest lies in [1, 10^6]; try 100."
        )
    if not 0 <= values.get("sigma", 0) < float("inf"):
        raise ValueError(f"sigma={values['sigma']:g}: a standard deviation must be at least 0 and finite; try 1.")
    return kind(seed, **values)


def _runs(n: int) -> list[slice]:
    """n coordinates cut into at most MOST_LAYERS runs."""
    edges = np.linspace(0, n, min(n, MOST_LAYERS) + 1).astype(int)
    return [slice(int(start), int(stop)) for start, stop in pairwise(edges)]


def _sigmoid(z: NDArray[Any]) -> NDArray[Any]:
    return np.exp(-np.logaddexp(0, -z))
