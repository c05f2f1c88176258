"""What the rules of the elastic family share: the period τ and the moving rate α in its three spellings."""

from __future__ import annotations

from dataclasses import dataclass

from easgd_local.rules.base import Rule, hyperparameter

BETA = 0.9  # the paper's experiments


@dataclass(frozen=True, kw_only=True)
class Elastic(Rule):
    """Hyperparameters of elastic averaging: τ, and one of α, β, ρ with α = β/p = ηρ (default β = 0.9).

    Source of the default and of α = β/p: Zhang et al. 2015 (arXiv:1412.6651) and its authors' code.
    """

    tau: int = hyperparameter(10, "communication period τ, in steps of the worker's clock")
    alpha: float | None = hyperparameter(None, "moving rate α; default β/p")
    beta: float | None = hyperparameter(
        None, f"β = pα; the default {BETA} holds when none of alpha, beta, rho is given"
    )
    rho: float | None = hyperparameter(None, "elasticity ρ = α/η, instead of alpha or beta")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau < 1:
            raise ValueError(
                f"tau={self.tau}: a worker visits the center every tau steps, so tau must be at least 1; "
                f"for no communication use alpha=0."
            )
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

    @property
    def period(self) -> int:
        return self.tau

    def due(self, t: int) -> bool:
        """Whether τ divides t."""
        return t % self.tau == 0

    def moving_rate(self, workers: int) -> float:
        """α with p workers; `ValueError` where β or ρ would put it outside [0, 1]."""
        if self.alpha is not None:
            return self.alpha
        if self.rho is not None:
            alpha, how, most = self.lr * self.rho, f"rho={self.rho}: α = ηρ", f"rho at most 1/lr = {1 / self.lr:g}"
        else:
            beta = BETA if self.beta is None else self.beta
            alpha, how, most = beta / workers, f"beta={beta}: α = β/p", f"beta at most p = {workers}"
        if alpha > 1:
            raise ValueError(f"{how} = {alpha:.4g}, but the moving rate must lie in [0, 1]; choose {most}.")
        return alpha

    def warnings(self, workers: int) -> list[str]:
        alpha, eta_h = self.moving_rate(workers), self.lr
        limit = (4 - 2 * eta_h) / (4 - eta_h) if eta_h < 2 else 0.0
        if alpha <= limit:
            return []
        return [
            f"alpha={alpha:.4g} is beyond the stability bound (4 - 2ηh)/(4 - ηh) = {limit:.4g} of the round robin at "
            f"lr={self.lr} and curvature h = 1 (Zhang et al. 2015, section 4): expect oscillation; lower alpha or lr."
        ]

    def derived(self, workers: int) -> dict[str, float]:
        alpha = self.moving_rate(workers)
        return {"alpha": alpha, "beta": alpha * workers, "rho": alpha / self.lr}
