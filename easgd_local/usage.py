"""argparse as we want it: no abbreviations, and one sentence for each mistake, with a remedy."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from difflib import get_close_matches
from typing import Any, NoReturn

from easgd_local.flags import rule_fields

USAGE = 2  # exit code


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are one sentence on one line."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values, allow_abbrev=False, formatter_class=_formatter)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Knows them all or complains, so that the complaint is the subcommand's and not the topmost parser's."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, []

    def error(self, message: str) -> NoReturn:
        """Says what is wrong and leaves with exit code 2."""
        complain(_sentence(message, self))
        raise SystemExit(USAGE)


def complain(sentence: str) -> None:
    """Says what is wrong, on stderr."""
    print(f"easgd-local: error: {sentence}", file=sys.stderr)


def _sentence(message: str, parser: argparse.ArgumentParser) -> str:
    """The complaint of argparse, with a remedy."""
    see, (name, what, value) = f"see {parser.prog} --help", _parts(message)
    match what:
        case "unrecognized arguments":
            return f"{_unrecognized(value.split(), parser)}; {see}."
        case "the following arguments are required":
            missing = next(action for action in parser._actions if action.metavar == value)
            choices = f"one of {', '.join(missing.choices)}" if missing.choices else missing.help
            return f"{value} is missing: give {choices}; {see}."
        case "expected one argument":
            return f"{name}: a value must follow; one that begins with a minus is written {name}=VALUE."
        case "invalid choice":
            wrong = value.partition(" (choose")[0].strip("'")
            known = next(action.choices for action in parser._actions if action.metavar == name) or ()
            near = get_close_matches(wrong, list(known), n=1)
            hint = f", did you mean {near[0]}" if near else ""
            return f"{name}={wrong}: must be one of {', '.join(known)}{hint}; {see}."
    if what.startswith("ignored explicit argument"):
        return f"{name}: takes no value; write {name} alone."
    return message.removeprefix("argument ")


def _parts(message: str) -> tuple[str, str, str]:
    """(flag, complaint, value) of a message like "argument --lr: expected one argument"; "" for what is absent."""
    _, name, rest = re.split(r"^(?:argument ([^:]+): )?", message, maxsplit=1)
    what, _, value = rest.partition(": ")
    return name or "", what, value


def _unrecognized(words: list[str], parser: argparse.ArgumentParser) -> str:
    flag = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
    if flag is None:
        one = next(
            (f" and there is one {action.metavar}" for action in parser._actions if not action.option_strings), ""
        )
        return f"{' '.join(words)}: not understood, as values follow their flag{one}; leave it out"
    if parser.prog.endswith("compare") and flag.lstrip("-").replace("-", "_") in rule_fields():
        return f"{flag}: belongs to an entry, in one word with its rule, such as 'eamsgd tau=16 lr=0.01'"
    word, known = flag.lstrip("-"), [one.lstrip("-") for action in parser._actions for one in action.option_strings]
    near = [one for one in known if one.startswith(word)] or get_close_matches(word, known, n=1)
    return f"{flag}: there is no such flag{f', did you mean --{near[0]}' if near else ''}"


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(
        prog, max_help_position=32, width=max(60, min(100, shutil.get_terminal_size().columns))
    )
