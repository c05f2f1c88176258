"""Stability and moments of elastic averaging and ADMM on a quadratic, as plain NumPy functions; nothing runs at import.

The problem is F(x) = h x²/2 with gradients hx - b - ξ, ξ of mean 0 and variance σ²; offsets are from the minimum b/h.
All arguments but the number of workers of a matrix broadcast, so that a map over a grid is one call.
"""

from easgd_local.theory.drift import drift_matrix, momentum_alpha
from easgd_local.theory.moments import (
    center_mean,
    center_mse_limit,
    center_variance,
    cramer_rao_bound,
    double_average_variance,
)
from easgd_local.theory.stability import (
    admm_round_robin_matrix,
    admm_round_robin_radius,
    easgd_alpha_limit,
    easgd_is_stable,
    easgd_round_robin_matrix,
    easgd_round_robin_radius,
    easgd_stale_matrix,
    easgd_stale_radius,
    spectral_radius,
    trajectory,
)

__all__ = [
    "admm_round_robin_matrix",
    "admm_round_robin_radius",
    "center_mean",
    "center_mse_limit",
    "center_variance",
    "cramer_rao_bound",
    "double_average_variance",
    "drift_matrix",
    "easgd_alpha_limit",
    "easgd_is_stable",
    "easgd_round_robin_matrix",
    "easgd_round_robin_radius",
    "easgd_stale_matrix",
    "easgd_stale_radius",
    "momentum_alpha",
    "spectral_radius",
    "trajectory",
]
