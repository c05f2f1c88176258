"""What takes part in a comparison: a rule or a rival with its own flags, in one word of the command line."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from easgd_local.compare.rivals import ENTRANTS, Rival
from easgd_local.config import CHOICES
from easgd_local.rules.base import Rule, hints_of, plain_type
from easgd_local.workloads import tuned

LONGEST = 200  # characters of an entry, whose folder is called after it


@dataclass(frozen=True)
class Entry:
    """A rule, or a rival, with its hyperparameters; `label` is as the user wrote it, and unlike all others.

    turns, threads (of each worker) and workers are those of the run where they are given.
    """

    label: str
    rule: Rule
    turns: str | None = None
    threads: int | None = None
    workers: int | None = None

    @property
    def is_rival(self) -> bool:
        return isinstance(self.rule, Rival)

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return self.label.replace(" ", ",")

    def with_values(self, values: dict[str, float]) -> Entry:
        """The same with other hyperparameters."""
        return replace(self, rule=replace(self.rule, **values))

    def to_json(self) -> dict[str, Any]:
        rule = {"name": self.rule.name} | asdict(self.rule)
        own = {name: getattr(self, name) for name in ("turns", "threads", "workers")}
        return {"label": self.label, "rule": rule} | own

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Entry:
        rule = dict(values["rule"])
        return cls(**(values | {"rule": ENTRANTS[rule.pop("name")](**rule)}))


def parse(texts: Sequence[str], model: str = "") -> tuple[Entry, ...]:
    """The entries that these words describe, such as "eamsgd tau=16 lr=0.01"; `ValueError` for one that is none.

    Equal ones are told apart by a number: "easgd", "easgd 2". Where `model` is one that has been tuned, its
    hyperparameters are the defaults.
    """
    found = [_parse(text, model) for text in texts]
    seen: Counter[str] = Counter()
    entries = []
    for one in found:
        seen[one.label] += 1
        times = seen[one.label]
        entries.append(one if times == 1 else replace(one, label=f"{one.label} {times}"))
    return tuple(entries)


def _parse(text: str, model: str) -> Entry:
    try:
        name, *words = shlex.split(text) or [""]
    except ValueError as error:
        raise ValueError(f"entry={text!r}: cannot be read ({error}); write it like 'eamsgd tau=16 lr=0.01'.") from error
    kind = _entrant(name)
    given = dict(_flag(text, word) for word in words)
    if len(given) < len(words):
        raise ValueError(f"entry={text!r}: gives a flag twice; give each of them once.")
    if len(text) > LONGEST:
        raise ValueError(f"entry={text[:40]}...: is longer than {LONGEST} characters; write its numbers shorter.")
    label = " ".join([name, *(f"{one}={value}" for one, value in given.items())])
    turns, threads, workers = (given.pop(one, None) for one in ("turns", "threads", "workers"))
    if turns is not None and (turns not in CHOICES["turns"] or issubclass(kind, Rival)):
        allowed = ", ".join(kind.orders)
        raise ValueError(f"turns={turns}: {name} is defined for turns {allowed}; leave turns out for {kind.orders[0]}.")
    values = tuned(model, name, given) | {one: _value(kind, one, value) for one, value in given.items()}
    return Entry(label, kind(**values), turns, _count("threads of each worker", threads), _count("workers", workers))


def _entrant(name: str) -> type[Rule]:
    if name in ENTRANTS:
        return ENTRANTS[name]
    if "=" in name:
        raise ValueError(f"entry={name}: a flag belongs into one word with its rule; write it like 'eamsgd {name}'.")
    near = get_close_matches(name.lower().replace("_", "-"), ENTRANTS, n=2)
    hint = f"did you mean {' or '.join(near)}?" if near else "choose one of them."
    raise ValueError(f"entry={name}: the entries are {', '.join(ENTRANTS)}; {hint}")


def _count(name: str, text: str | None) -> int | None:
    if text is not None and (not text.isdecimal() or int(text) < 1):
        what, _, of = name.partition(" ")
        raise ValueError(f"{what}={text}: {of + ', ' if of else ''}must be a whole number of at least 1; try 1.")
    return None if text is None else int(text)


def _flag(text: str, word: str) -> tuple[str, str]:
    name, sign, value = word.removeprefix("--").partition("=")
    if not (name and sign and value):
        raise ValueError(f"entry={text!r}: {word} is no flag with its value; write it like tau=16.")
    return name.replace("-", "_"), value


def _value(kind: type[Rule], name: str, text: str) -> Any:
    """The value of a hyperparameter, of its type; `ValueError` if the rule has none of this name."""
    names = [one.name for one in fields(kind)]
    if name not in names:
        owners = ", ".join(owner for owner, one in ENTRANTS.items() if name in {each.name for each in fields(one)})
        if not owners and (near := get_close_matches(name, names, n=1)):
            raise ValueError(f"{name}={text}: {kind.name} has no {name}, did you mean {near[0]}?")
        remedy = f"leave it out, or use an entry that has it: {owners}" if owners else "leave it out"
        raise ValueError(f"{name}={text}: {kind.name} has no {name}, only {', '.join(names)}; {remedy}.")
    type_ = plain_type(hints_of(kind)[name])
    try:
        return type_(text)
    except ValueError:
        wanted = "a whole number, such as 10" if type_ is int else "a number, such as 0.05"
        raise ValueError(f"{name}={text}: {kind.name} needs {wanted} here; write it as one.") from None
