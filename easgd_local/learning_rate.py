"""The step size as a function of the worker's own clock."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LearningRate:
    """η at clock t, from η_0 = `lr`, over a run of `steps` steps.

        constant  η_0
        step      η_0 · decay^⌊t/every⌋
        cosine    η_0 (1 + cos(πt/steps))/2             (Loshchilov, Hutter 2017, arXiv:1608.03983, without restarts)
        sqrt      η_0/√(t + 1)                          (the 1/√k of the papers' convergence theorems)

    In the first `warmup` steps the result is multiplied by (t + 1)/(warmup + 1).
    """

    shape: str
    lr: float
    steps: int
    warmup: int = 0
    every: int = 1
    decay: float = 0.1

    def __call__(self, t: int) -> float:
        """η at clock t."""
        return self.lr * min(1.0, (t + 1) / (self.warmup + 1)) * self._factor(t)

    def _factor(self, t: int) -> float:
        match self.shape:
            case "step":
                return float(self.decay ** (t // self.every))
            case "cosine":
                return (1 + math.cos(math.pi * t / self.steps)) / 2
            case "sqrt":
                return float(1 / math.sqrt(t + 1))
        assert self.shape == "constant", self.shape
        return 1.0
