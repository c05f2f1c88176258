"""Writes reference.md from the docstrings of the public names: `python docs/make_reference.py`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import easgd_local as easgd
from easgd_local import theory
from easgd_local.batches import Batches, Loader
from easgd_local.rules.base import Rule

PAGE = Path(__file__).with_name("reference.md")
INTRODUCTION = """# Reference

Written by `docs/make_reference.py` from the docstrings. Losses are cross-entropies as measured, errors fractions, times
seconds; vectors have n float32; t counts a worker's own steps.
"""


def page() -> str:
    """The whole page."""
    functions = ["launch", "join", "train", "recalibrate", "load_center"]
    parts = [INTRODUCTION, "## Functions"]
    parts += [function(f"easgd_local.{name}", getattr(easgd, name)) for name in functions]
    parts += ["## Classes", *(described(one) for one in (easgd.LoopWorker, Loader, Batches, easgd.CenterState))]
    parts += [configuration(), "## Rules", *map(rule, sorted(rules(), key=lambda one: one.name))]
    parts += ["## Theory", *(function(f"easgd_local.theory.{name}", getattr(theory, name)) for name in theory.__all__)]
    return "\n\n".join(parts) + "\n"


def function(name: str, one: Any) -> str:
    """A heading, the signature and the docstring."""
    return f"### `{name}`\n\n```python\n{name.rpartition('.')[2]}{signature(one)}\n```\n\n{text(one)}"


def described(kind: type) -> str:
    """A class and its public methods and properties."""
    parts = [f"### `{kind.__name__}`", text(kind)]
    for name, member in vars(kind).items():
        if name.startswith("_") or not inspect.getdoc(member):
            continue
        if isinstance(member, property):
            parts.append(f"#### `{kind.__name__}.{name}`\n\n{text(member)}")
        elif inspect.isfunction(member):
            parts.append("#" + function(f"{kind.__name__}.{name}", member))
    return "\n\n".join(parts)


def configuration() -> str:
    """The fields of Config with the sentences that the command line shows."""
    rows = [
        f"| `{one.name}` | {one.metadata['help'].replace('|', '&#124;')} |"
        for one in dataclasses.fields(easgd.Config)
        if "help" in one.metadata
    ]
    return "\n".join([f"### `Config`\n\n{text(easgd.Config)}\n", "| field | meaning |", "|---|---|", *rows])


def rules() -> list[type[Rule]]:
    """The classes of all rules."""
    named = (getattr(easgd, name) for name in easgd.__all__ if name[0].isupper())
    return [one for one in named if isinstance(one, type) and issubclass(one, Rule) and one is not Rule]


def rule(one: type[Rule]) -> str:
    """A rule, its fields and its docstring."""
    fields = ", ".join(f"{field.name}={getattr(one(), field.name)!r}" for field in dataclasses.fields(one))
    return f"### `{one.__name__}` (`{one.name}`)\n\n```python\n{one.__name__}({fields})\n```\n\n{text(one)}"


def signature(one: Any) -> str:
    """The parameters, one a line where they are many."""
    found = inspect.signature(one)
    parameters: list[str] = []
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        hint = "" if parameter.annotation is parameter.empty else f": {parameter.annotation}"
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        stars = {parameter.VAR_KEYWORD: "**", parameter.VAR_POSITIONAL: "*"}.get(parameter.kind, "")
        parameters.append(f"{stars}{parameter.name}{hint}{default}")
    result = "" if found.return_annotation is found.empty else f" -> {found.return_annotation}"
    line = f"({', '.join(parameters)}){result}"
    return line if len(line) <= 100 else "(\n" + "".join(f"    {one},\n" for one in parameters) + ")" + result


def text(one: Any) -> str:
    """The docstring as Markdown: what it says of each parameter becomes a list."""
    listed = re.sub(r"^([a-z_0-9]+(?:, [a-z_0-9]+)*): ", r"- `\1`: ", inspect.cleandoc(one.__doc__ or ""), flags=re.M)
    examples = re.compile(r"(?:^>>> .*\n(?:.+(?:\n|\Z))*)+", re.MULTILINE)
    return examples.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", listed)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
