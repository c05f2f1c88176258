"""Elastic averaging on all the GPUs, or all the cores, of one machine.

    import easgd_local as easgd
    summary = easgd.train(easgd.Config(rule=easgd.EAMSGD(tau=10), data="digits", workers=4))

Names are imported on first use, so that `import easgd_local` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Config": "config",
    "train": "run",
    "Rule": "rules.base",
    "SGD": "rules.sgd",
    "MSGD": "rules.msgd",
    "EASGD": "rules.easgd",
    "EAMSGD": "rules.eamsgd",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
