"""`easgd-local simulate RULE ...`: its flags, its folder and its files; the rules' own are the caller's to add."""

from __future__ import annotations

import argparse
import errno
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easgd_local.argument_types import number, whole
from easgd_local.figure_folder import Table, refuse_foreign, write
from easgd_local.simulate.machine import DEFAULTS, Machine
from easgd_local.simulate.problems import PROBLEMS, make_problem
from easgd_local.theory.command import NUMBERS, WHOLES, Flag

if TYPE_CHECKING:
    from easgd_local.simulate.study import Cell

FILES = ("runs.csv", "curves.csv", "staleness.csv", "runs.png", "sweep.png")
OWN = {"dimension", "condition", "sigma", "batch_size"}  # of problems


def _speeds(text: str) -> tuple[float, ...]:
    return tuple(number(word) for word in text.split(","))


FLAGS: dict[str, Flag] = {
    "workers": Flag(WHOLES, "4", "numbers of workers p, up to 4096, with commas between them"),
    "tau": Flag(WHOLES, "", "communication periods τ, with commas between them; default the rule's own"),
    "turns": Flag(str, "", "order of visits to the center: strict, free, none, together; default the rule's first"),
    "steps": Flag(whole, "1000", "steps of each worker; with free and none of each on average"),
    "target": Flag(number, "0.05", "error to reach, as a share of the error at the start"),
    "lr-factors": Flag(NUMBERS, "", "of the step size, to take the best of; default 1, for a sweep 1,0.25,0.0625"),
    "points": Flag(whole, "1000", "how often the center is measured"),
    "seed": Flag(whole, "0", "seed of problem, noise and step times"),
    "problem": Flag(str, "quadratic", f"what is minimised: {', '.join(PROBLEMS)}"),
    "dimension": Flag(whole, "", "quadratic, logistic: number of coordinates; default 32"),
    "condition": Flag(number, "", "quadratic, logistic: largest curvature over the smallest; default 100"),
    "sigma": Flag(number, "", "quadratic: deviation of the gradient's noise; logistic: of the labels'; default 1"),
    "batch-size": Flag(whole, "", "logistic, digits: samples of a gradient; default 16"),
    "out": Flag(str, "simulate", "folder"),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the run and of the machine; those without default are absent from the result when not given."""
    run, machine = parser.add_argument_group("the simulation"), parser.add_argument_group("the machine")
    for name, one in FLAGS.items():
        text = f"{one.help} (default {one.default})" if one.default else one.help
        word = "FOLDER" if name == "out" else _word(one.read)
        default = one.default or argparse.SUPPRESS
        run.add_argument(f"--{name}", type=one.read, default=default, metavar=word, help=text)
    for field in fields(Machine):
        flag, text = f"--{field.name.replace('_', '-')}", field.metadata["help"]
        if field.name == "overlap":
            machine.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        read = _speeds if field.name == "speeds" else number
        shown = "1" if field.name == "speeds" else f"{field.default:g}"
        text = f"{text} (default {shown})"
        machine.add_argument(flag, type=read, default=argparse.SUPPRESS, metavar=_word(read), help=text)


def execute(*, rules: Sequence[str], out: str, **values: Any) -> Iterator[str]:
    """Simulates, writes the files, and yields the lines to print as they are known.

    The folder may hold the files of an earlier simulation, which are replaced, and nothing else. `ValueError` for
    values that cannot work, and `OSError` when it cannot be written to, before anything is run; `MemoryError`.
    """
    try:
        yield from _execute(rules, Path(out), values)
    except OSError as error:  # of mmap
        if error.errno != errno.ENOMEM:
            raise
        remedy = "choose fewer workers, or a smaller dimension"
        raise MemoryError(f"there is not enough memory for this; {remedy}.") from None


def _execute(rules: Sequence[str], folder: Path, values: dict[str, Any]) -> Iterator[str]:
    from easgd_local.simulate import figures, study  # here: the other commands need not wait for them

    refuse_foreign(folder, FILES)
    machine = Machine(**{name: values.pop(name) for name in DEFAULTS if name in values})
    own = {name: values.pop(name) for name in OWN if name in values}
    workers, tau, factors = values.pop("workers"), values.pop("tau", []), values.pop("lr_factors", None)
    settings = {name: values.pop(name) for name in ("turns", "steps", "target", "points", "seed") if name in values}
    problem = make_problem(values.pop("problem"), seed=settings["seed"], **own)
    made = study.make_rules(rules, values, tau)
    sweeps = len(set(workers)) > 1 or len(set(tau)) > 1
    scenarios = study.plan(made, workers, problem, stops=sweeps, **settings)
    if len(machine.speeds) > max(workers):
        raise ValueError(
            f"speeds: {len(machine.speeds)} are given for {max(workers)} workers; give at most one for each of them."
        )
    factors = _checked(factors or (study.FACTORS if sweeps else [1.0]))
    _try_to_write(folder)
    found, target = [], settings["target"]
    for _, row in groupby(study.cells(scenarios, problem, machine, factors), key=lambda cell: (cell.rule, cell.tau)):
        cells = list(row)
        found += cells
        if sweeps:
            yield study.sweep_line(cells, target)
        else:
            yield from study.run_lines(cells[0], problem.measure)
    pictures = {"runs": figures.runs(found, problem.measure, target)}
    if sweeps:
        pictures["sweep"] = figures.sweep(_by_rule(found), target)
    yield f"written: {', '.join(map(str, _write(folder, study.tables(found), pictures)))}"


def _try_to_write(folder: Path) -> None:
    """Makes the folder; `OSError` now, rather than after the whole simulation."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _write(folder: Path, tables: Mapping[str, Table], pictures: Mapping[str, Any]) -> list[Path]:
    written = write(folder, tables, pictures)
    if "sweep" not in pictures:
        (folder / "sweep.png").unlink(missing_ok=True)  # an earlier simulation's
    return written


def _by_rule(found: Sequence[Cell]) -> dict[str, list[list[Cell]]]:
    """rule -> for each τ the cells of its numbers of workers."""
    table: dict[str, list[list[Cell]]] = {}
    for (rule, _), row in groupby(found, key=lambda cell: (cell.rule, cell.tau)):
        table.setdefault(rule, []).append(list(row))
    return table


def _checked(factors: Sequence[float]) -> Sequence[float]:
    wrong = [factor for factor in factors if not 0 < factor < float("inf")]
    if wrong:
        raise ValueError(f"lr_factors={wrong[0]:g}: a factor of the step size must be positive and finite; try 1,0.25.")
    return factors


def _word(read: Callable[[str], Any]) -> str:
    words: dict[Any, str] = {WHOLES: "N,N,...", NUMBERS: "X,X,...", _speeds: "X,X,...", whole: "N", number: "X"}
    return words.get(read, "NAME")
