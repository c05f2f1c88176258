"""What the rules of the elastic family share: the period τ and the moving rate α in its three spellings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from easgd_local.rules.base import hyperparameter
from easgd_local.rules.periodic import Periodic

BETA = 0.9  # the paper's experiments
PER = ("exchange", "step")


def _known(curvature: float | None) -> str:
    """The curvature, and where it comes from."""
    if curvature is None:
        return "h = 1 (assumed)"
    return f"h = {curvature:.3g} (the largest of one minibatch's loss at the start, estimated by Lanczos steps)"


@dataclass(frozen=True, kw_only=True)
class Elastic(Periodic):
    """Hyperparameters of elastic averaging: τ, and one of α, β, ρ.

    α = β/p, β = 0.9 by default, is what the authors' code does (Zhang et al. 2015, arXiv:1412.6651); `beta_per="step"`
    reads β as a rate per step instead, α = β/(τp). With ρ, α = ηρ, with the η that the learning rate starts from.
    """

    over_scratch: ClassVar[tuple[str, ...]] = ("d",)

    alpha: float | None = hyperparameter(None, "moving rate α; default β/p")
    beta: float | None = hyperparameter(
        None, f"β = pα; the default {BETA} holds when none of alpha, beta, rho is given"
    )
    rho: float | None = hyperparameter(None, "elasticity ρ = α/η, instead of alpha or beta; for admm its penalty")
    beta_per: str = hyperparameter("exchange", "what β is a rate of: exchange for α = β/p, step for α = β/(τp)")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {name: value for name in ("alpha", "beta", "rho") if (value := getattr(self, name)) is not None}
        if len(given) > 1:
            names = " and ".join(f"{name}={value}" for name, value in given.items())
            raise ValueError(f"{names}: each of them fixes the moving rate, so give only one (α = β/p = ηρ).")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(
                f"alpha={self.alpha}: the moving rate must lie in [0, 1]; leave it out for the default {BETA}/workers."
            )
        for name in ("beta", "rho"):
            if name in given and not 0 <= given[name] < float("inf"):
                raise ValueError(f"{name}={given[name]}: must be at least 0 (and finite); the default is beta={BETA}.")
        if self.beta_per not in PER:
            raise ValueError(f"beta_per={self.beta_per}: must be one of {', '.join(PER)}; choose one of them.")
        if self.beta_per == "step" and (self.alpha is not None or self.rho is not None):
            raise ValueError(
                "beta_per=step: says how α follows from β, but alpha or rho fixes α already; give beta instead of them."
            )

    def moving_rate(self, workers: int) -> float:
        """α with p workers; `ValueError` where β or ρ would put it outside [0, 1].

        >>> import easgd_local as easgd
        >>> easgd.EASGD(beta=0.8).moving_rate(4), easgd.EASGD(lr=0.5, rho=0.5).moving_rate(4)
        (0.2, 0.25)
        """
        if self.alpha is not None:
            return self.alpha
        if self.rho is not None:
            alpha, how, most = self.lr * self.rho, f"rho={self.rho}: α = ηρ", f"rho at most 1/lr = {1 / self.lr:g}"
        else:
            beta = BETA if self.beta is None else self.beta
            over, of = (self.tau, "τp") if self.beta_per == "step" else (1, "p")
            alpha, how = beta / (over * workers), f"beta={beta}: α = β/{of}"
            most = f"beta at most {of} = {over * workers}"
        if alpha > 1:
            raise ValueError(f"{how} = {alpha:.4g}, but the moving rate must lie in [0, 1]; choose {most}.")
        return alpha

    def lr_limit(self, curvature: float) -> float:
        """The largest stable η of a worker alone: 2/h, with Nesterov momentum 2(1 + δ)/((1 + 2δ)h)."""
        delta = getattr(self, "momentum", 0.0)
        return 2 * (1 + delta) / ((1 + 2 * delta) * curvature)

    def warnings(self, workers: int, curvature: float | None = None, turns: str = "") -> list[str]:
        """Sentences about α and η; `curvature` is an estimate of h at the start, 1 is assumed without one."""
        h = 1.0 if curvature is None else curvature
        most = self.lr_limit(h)
        no_alpha = self.lr * h >= 2 and self.moving_rate(workers) > 0  # lowering α would not help
        if no_alpha or (curvature is not None and self.lr > most):
            return [
                f"lr={self.lr} is {'beyond' if self.lr > most else 'at'} {most:.3g}, where steps of {self.name} begin "
                f"to grow at curvature {_known(curvature)}: if the loss does not settle, lower lr"
                f"{'' if curvature is None else ', or give a warmup'}."
            ]
        return self._alpha_warnings(workers, h, turns, _known(curvature))

    def _alpha_warnings(self, workers: int, h: float, turns: str, known: str) -> list[str]:
        """Sentences about an α that is too large at curvature h, which comes from where `known` says."""
        raise NotImplementedError

    def derived(self, workers: int) -> dict[str, float]:
        alpha = self.moving_rate(workers)
        return {"alpha": alpha, "beta": alpha * workers, "rho": alpha / self.lr}
