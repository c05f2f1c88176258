"""The command line: flags derived from the dataclasses, one sentence for each mistake. Prints, never computes."""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from easgd_local import __version__
from easgd_local.config import CHOICES, Config
from easgd_local.rules import RULES, rule_class

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
EXIT_CODES = {"done": DONE, "failed": FAILED, "interrupted": INTERRUPTED}
NOT_FLAGS = {"rule", "faults"}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence on one line."""

    def error(self, message: str) -> NoReturn:
        """Says what is wrong and leaves with exit code 2."""
        print(f"easgd-local: error: {message}", file=sys.stderr)
        raise SystemExit(USAGE)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line. A flag that is not given is absent from the result."""
    top = Parser(prog="easgd-local", description="Elastic averaging on all the GPUs, or all the cores, of one machine.")
    top.add_argument("--version", action="version", version=f"easgd_local {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    train = commands.add_parser(
        "train", help="train a model", argument_default=argparse.SUPPRESS,
        description="Trains MODEL on DATA with p workers that meet in a shared center by the algorithm RULE.",
    )  # fmt: skip
    train.add_argument("rule", metavar="RULE", help=f"the algorithm: {', '.join(RULES)}")
    _add_rule_flags(train.add_argument_group("the rule"))
    _add_config_flags(train.add_argument_group("the run"))
    train.add_argument("--resume", metavar="RUN", help="continue the run in this folder from its newest checkpoint")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 done, 1 the run failed, 2 bad usage, 130 interrupted."""
    arguments = vars(parser().parse_args(argv))
    assert arguments.pop("command") == "train"
    return _train(arguments)


def _train(arguments: dict[str, Any]) -> int:
    resume = arguments.pop("resume", None)
    try:
        rule = rule_class(arguments["rule"])  # known before the slow imports start
        from easgd_local.launcher import warm_up

        warm_up()  # the fork server imports torch while we do
        from easgd_local.prepare import prepare, saved_config

        config = (
            make_config(arguments) if resume is None else _resumed(saved_config(Path(resume)), rule.name, arguments)
        )
        prepared = prepare(config, None if resume is None else Path(resume))
    except (ValueError, MemoryError) as error:
        print(f"easgd-local: error: {error}", file=sys.stderr)
        return USAGE
    from rich.console import Console

    from easgd_local import view
    from easgd_local.metrics import Listener
    from easgd_local.run import Run

    console = Console()
    with prepared:
        with view.open_view(console) as live:
            listeners: list[Listener] = [live]
            if config.tensorboard:
                from easgd_local.tensorboard import TensorBoard

                listeners.append(TensorBoard(prepared.plan.folder))
            summary = Run(prepared, listeners).execute()
        console.print(view.summary_table(summary, summary["folder"]))
    return EXIT_CODES[summary["status"]]


def make_config(arguments: dict[str, Any]) -> Config:
    """The configuration that the given flags describe; `ValueError` for a flag that the rule does not have."""
    rule = rule_class(arguments["rule"])
    own = {one.name for one in fields(rule)}
    hyperparameters = {}
    for name in _rule_fields():
        if name in arguments:
            if name not in own:
                raise ValueError(
                    f"{name}={arguments[name]}: the rule {rule.name} has no {name}; it has {', '.join(sorted(own))}."
                )
            hyperparameters[name] = arguments[name]
    rest = {name: value for name, value in arguments.items() if name != "rule" and name not in hyperparameters}
    return Config(rule=rule(**hyperparameters), **rest)


def _resumed(saved: Config, rule: str, arguments: dict[str, Any]) -> Config:
    """The saved configuration with the flags given now on top; `prepare` judges whether they fit."""
    values = saved.to_json()
    if rule != saved.rule.name:
        raise ValueError(f"rule={rule}: the run to resume was started with rule={saved.rule.name}; name that rule.")
    if "steps" in arguments:
        values["epochs"] = None
    for name, value in arguments.items():
        if name in _rule_fields():
            values["rule"][name] = value
        elif name != "rule":
            values[name] = value
    return Config.from_json(values)


def _rule_fields() -> dict[str, Any]:
    """The hyperparameters of all the rules: name -> field. A name means the same in every rule that has it."""
    return {one.name: one for rule in RULES.values() for one in fields(rule)}


def _add_rule_flags(group: Any) -> None:
    hints = {name: hint for rule in RULES.values() for name, hint in get_type_hints(rule).items()}
    for name, one in _rule_fields().items():
        defaults = {rule: _default(rule_class(rule), name) for rule in RULES}
        group.add_argument(_flag(name), type=_parser_of(hints[name]), metavar=name.upper(), help=_help(one, defaults))


def _add_config_flags(group: Any) -> None:
    hints = get_type_hints(Config)
    for one in fields(Config):
        if one.name in NOT_FLAGS:
            continue
        if hints[one.name] is bool:
            group.add_argument(_flag(one.name), action="store_true", help=one.metadata["help"])
        else:
            group.add_argument(
                _flag(one.name), type=_parser_of(hints[one.name]), help=_help(one, {"": one.default}),
                choices=CHOICES.get(one.name), metavar=None if one.name in CHOICES else one.name.upper(),
            )  # fmt: skip


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _default(rule: type, name: str) -> Any:
    return next((one.default for one in fields(rule) if one.name == name), MISSING)


def _help(one: Any, defaults: dict[str, Any]) -> str:
    """The field's sentence, and its default where the sentence does not say it: one, or one for each rule."""
    text = one.metadata["help"].replace("%", "%%")
    known = {owner: value for owner, value in defaults.items() if value not in (None, MISSING)}
    if not known or "default" in text:
        return text
    if len(set(known.values())) == 1:
        return f"{text} (default {next(iter(known.values()))})"
    return f"{text} (default {', '.join(f'{owner} {value}' for owner, value in known.items())})"


def _parser_of(hint: Any) -> Any:
    """What turns the word on the command line into the field's type: int, float or str."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(one for one in get_args(hint) if one is not type(None))
    return hint if hint in (int, float) else str
