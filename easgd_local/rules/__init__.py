"""One file per algorithm; this table is the only list of them."""

from __future__ import annotations

import difflib

from easgd_local.rules.base import Rule
from easgd_local.rules.eamsgd import EAMSGD
from easgd_local.rules.easgd import EASGD
from easgd_local.rules.msgd import MSGD
from easgd_local.rules.sgd import SGD

RULES: dict[str, type[Rule]] = {
    "sgd": SGD,
    "msgd": MSGD,
    "easgd": EASGD,
    "eamsgd": EAMSGD,
}


def rule_class(name: str) -> type[Rule]:
    """The rule of that name; `ValueError` with the nearest names for an unknown one."""
    if name in RULES:
        return RULES[name]
    near = difflib.get_close_matches(name, RULES, n=1)
    hint = f"did you mean {near[0]}?" if near else "choose one of them."
    raise ValueError(f"rule={name}: the rules are {', '.join(RULES)}; {hint}")
