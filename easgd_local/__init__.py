"""Elastic averaging on all the GPUs, or all the cores, of one machine.

    import easgd_local as easgd
    summary = easgd.train(easgd.Config(rule=easgd.EAMSGD(tau=10), data="digits", workers=4))

Names are imported on first use, so that `import easgd_local` costs nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# In a checkout that is not installed the folder of kernels lies beside this one, and is still easgd_local.kernels.
_above = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_above, "kernels", "vectors.cuh")):
    __path__.append(_above)

_HOMES = {
    "Config": "config",
    "train": "training",
    "launch": "launching",
    "join": "joining",
    "LoopWorker": "loop",
    "CenterState": "centers",
    "load_center": "centers",
    "recalibrate": "calibrate",
    "Rule": "rules.base",
    "EASGD": "rules.easgd",
    "EAMSGD": "rules.eamsgd",
    "EASGDSync": "rules.easgd_sync",
    "EAMSGDSync": "rules.eamsgd_sync",
    "EASGDGaussSeidel": "rules.easgd_gs",
    "Downpour": "rules.downpour",
    "ADownpour": "rules.downpour",
    "MVADownpour": "rules.downpour",
    "MDownpour": "rules.mdownpour",
    "ADMM": "rules.admm",
    "APAM": "rules.apam",
    "PASSM": "rules.passm",
    "PASSMPlus": "rules.passm",
    "LocalSGD": "rules.localsgd",
    "SMA": "rules.sma",
    "DiLoCo": "rules.diloco",
    "SGD": "rules.sgd",
    "MSGD": "rules.msgd",
    "ASGD": "rules.asgd",
    "MVASGD": "rules.asgd",
}
__all__ = [*_HOMES, "__version__", "theory"]


def __getattr__(name: str) -> Any:
    if name == "theory":
        return import_module(f"{__name__}.theory")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
