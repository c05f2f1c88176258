"""The flags of the command line, derived from the fields of the rules' dataclasses and of the configuration's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

from easgd_local.argument_types import number, whole
from easgd_local.config import CHOICES, Config
from easgd_local.rules import RULES, rule_class
from easgd_local.rules.base import Rule, hints_of, plain_type

NOT_FLAGS = {"rule", "faults"}
FOLDERS = {"data_dir", "out"}
PARSERS: dict[type, Any] = {int: whole, float: number}


def names_of(rule: type[Rule]) -> list[str]:
    """The hyperparameters of a rule."""
    return [one.name for one in fields(rule)]


def rule_fields() -> dict[str, Any]:
    """The hyperparameters of all the rules: name -> field. A name means the same in every rule that has it."""
    return {one.name: one for rule in RULES.values() for one in fields(rule)}


def add_rule_flags(group: Any, *, without: str = "") -> None:
    """The flags of all the rules, but for one."""
    hints = {name: hint for rule in RULES.values() for name, hint in hints_of(rule).items()}
    for name, one in rule_fields().items():
        if name == without:
            continue
        defaults = {rule: _default(rule_class(rule), name) for rule in RULES}
        _add_flag(group, name, plain_type(hints[name]), _help(one, defaults))


def add_config_flags(group: Any, names: Sequence[str] = ()) -> None:
    """The flags of the run: these, or all."""
    hints = hints_of(Config)
    for one in fields(Config):
        kind, text = plain_type(hints[one.name]), _help(one, {"": one.default})
        if one.name in NOT_FLAGS or (names and one.name not in names):
            continue
        if kind is bool:
            group.add_argument(flag(one.name), action="store_true", help=text)
        else:
            _add_flag(group, one.name, kind, text)


def _add_flag(group: Any, name: str, kind: type, help: str) -> None:
    """A flag with a value. Whether the value is allowed is for the configuration to say."""
    word = "FOLDER" if name in FOLDERS else {int: "N", float: "X"}.get(kind, "NAME")
    metavar = f"{{{','.join(CHOICES[name])}}}" if name in CHOICES else word
    group.add_argument(flag(name), type=PARSERS.get(kind, str), metavar=metavar, help=help)


def flag(name: str) -> str:
    """Such as --batch-size for batch_size."""
    return "--" + name.replace("_", "-")


def _default(rule: type, name: str) -> Any:
    return next((one.default for one in fields(rule) if one.name == name), MISSING)


def _help(one: Any, defaults: dict[str, Any]) -> str:
    """The field's sentence, and its default where the sentence does not say it: one, or one for each rule."""
    text = one.metadata.get("help", "").replace("%", "%%")
    silent = (None, False, MISSING)
    known = {owner: value for owner, value in defaults.items() if not any(value is one for one in silent)}
    if not known or "default" in text:
        return text
    usual = Counter(known.values()).most_common(1)[0][0]
    others = {value: [owner for owner in known if known[owner] == value] for value in known.values() if value != usual}
    but = "".join(f"; {', '.join(owners)}: {value}" for value, owners in others.items())
    return f"{text} (default {usual}{but})"
