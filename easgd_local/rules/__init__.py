"""One file per algorithm; this table is the only list of them."""

from __future__ import annotations

import difflib

from easgd_local.rules.admm import ADMM
from easgd_local.rules.apam import APAM
from easgd_local.rules.asgd import ASGD, MVASGD
from easgd_local.rules.base import Rule
from easgd_local.rules.diloco import DiLoCo
from easgd_local.rules.downpour import ADownpour, Downpour, MVADownpour
from easgd_local.rules.eamsgd import EAMSGD
from easgd_local.rules.eamsgd_sync import EAMSGDSync
from easgd_local.rules.easgd import EASGD
from easgd_local.rules.easgd_gs import EASGDGaussSeidel
from easgd_local.rules.easgd_sync import EASGDSync
from easgd_local.rules.localsgd import LocalSGD
from easgd_local.rules.mdownpour import MDownpour
from easgd_local.rules.msgd import MSGD
from easgd_local.rules.passm import PASSM, PASSMPlus
from easgd_local.rules.sgd import SGD
from easgd_local.rules.sma import SMA

RULES: dict[str, type[Rule]] = {
    "easgd": EASGD,
    "eamsgd": EAMSGD,
    "easgd-sync": EASGDSync,
    "eamsgd-sync": EAMSGDSync,
    "easgd-gs": EASGDGaussSeidel,
    "downpour": Downpour,
    "adownpour": ADownpour,
    "mvadownpour": MVADownpour,
    "mdownpour": MDownpour,
    "admm": ADMM,
    "apam": APAM,
    "passm": PASSM,
    "passm+": PASSMPlus,
    "localsgd": LocalSGD,
    "sma": SMA,
    "diloco": DiLoCo,
    "sgd": SGD,
    "msgd": MSGD,
    "asgd": ASGD,
    "mvasgd": MVASGD,
}


def rule_class(name: str) -> type[Rule]:
    """The rule of that name; `ValueError` with the nearest names for an unknown one."""
    if name in RULES:
        return RULES[name]
    near = difflib.get_close_matches(name.lower().replace("_", "-"), RULES, n=1)
    hint = f"did you mean {near[0]}?" if near else "choose one of them."
    raise ValueError(f"rule={name}: the rules are {', '.join(RULES)}; {hint}")
