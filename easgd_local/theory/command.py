"""`easgd-local theory NAME`: its flags, its folder and its files."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easgd_local.argument_types import number, whole
from easgd_local.figure_folder import refuse_foreign, write
from easgd_local.theory.studies import Study, admm_study, averaging_study, moments_study, stability_study


@dataclass(frozen=True)
class Flag:
    """One flag: how its text is read, its default as text, and its sentence."""

    read: Callable[[str], Any]
    default: str
    help: str


def _several(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: list(dict.fromkeys(read(word) for word in text.split(",")))


WHOLES, NUMBERS = _several(whole), _several(number)
POINTS = "points on each side of a map"

# name -> (what it computes, its sentence, its flags)
STUDIES: dict[str, tuple[Callable[..., Study], str, dict[str, Flag]]] = {
    "stability": (stability_study, "where EASGD is stable: exclusive turns and stale differences side by side", {
        "workers": Flag(whole, "8", "number of workers p"),
        "points": Flag(whole, "200", POINTS),
    }),
    "admm": (admm_study, "where ADMM's round robin is not stable, and a trajectory that decays and then blows up", {
        "workers": Flag(WHOLES, "3,8", "numbers of workers p, with commas between them"),
        "lr": Flag(number, "0.001", "step size η of the trajectory"),
        "rho": Flag(number, "2.5", "penalty ρ of the trajectory"),
        "rounds": Flag(whole, "20000", "length of the trajectory, in cycles of p turns"),
        "points": Flag(whole, "200", POINTS),
    }),
    "moments": (moments_study, "mean squared error of the center over η and β, for numbers of workers and times", {
        "workers": Flag(WHOLES, "1,10,100,1000,10000", "numbers of workers p, with commas between them"),
        "times": Flag(NUMBERS, "1,2,10,100,inf", "times t in steps, with commas between them"),
        "start": Flag(number, "1", "distance of workers and center from the minimum at t = 0"),
        "sigma": Flag(number, "10", "standard deviation σ of the gradient's noise"),
        "points": Flag(whole, "60", POINTS),
    }),
    "averaging": (averaging_study, "double averaging of the center against the Cramér-Rao bound", {
        "workers": Flag(whole, "4", "number of workers p"),
        "lr": Flag(NUMBERS, "0.02,0.1,0.5", "step sizes η, with commas between them"),
        "beta": Flag(number, "0.9", "the center's moving rate β = pα"),
        "steps": Flag(whole, "1000000", "the largest time t"),
        "points": Flag(whole, "200", "points on the axis of time"),
    }),
}  # fmt: skip


def add_studies(theory: argparse.ArgumentParser, parser_class: type[argparse.ArgumentParser]) -> None:
    """The subcommands of `easgd-local theory`."""
    names = theory.add_subparsers(
        dest="study", metavar="NAME", required=True, parser_class=parser_class, title="names", prog=theory.prog,
        description="easgd-local theory NAME --help describes one of them.",
    )  # fmt: skip
    for name, (_, sentence, flags) in STUDIES.items():
        study = names.add_parser(
            name, help=sentence, usage=f"easgd-local theory {name} [--flag VALUE ...]",
            description=f"Draws {sentence}. Writes figures (PNG) and their data (CSV), and prints the key numbers.",
        )  # fmt: skip
        for flag, one in flags.items():
            word = "N,N,..." if one.read is WHOLES else "X,X,..." if one.read is NUMBERS else "N"
            word = "X" if one.read is number else word
            text = f"{one.help} (default {one.default})"
            study.add_argument(f"--{flag}", type=one.read, default=one.default, metavar=word, help=text)
        study.add_argument("--out", metavar="FOLDER", default=f"theory-{name}", help=f"folder (default theory-{name})")


def execute(*, study: str, out: str, **values: Any) -> list[str]:
    """Computes the study and writes its files; returns the lines to print.

    The folder may hold the files of an earlier run of the same study, which are replaced, and nothing else.
    `ValueError` for values outside the domain and for another folder; `OSError` when it cannot be written to.
    """
    folder, names = Path(out), _names(study)
    refuse_foreign(folder, names)
    done = STUDIES[study][0](**values)
    assert {*done.tables, *done.figures} == {Path(name).stem for name in names}
    write(folder, done.tables, done.figures)
    return [*done.lines, f"written: {', '.join(str(folder / name) for name in names)}"]


def _names(study: str) -> list[str]:
    stems = ("admm-map", "admm-trajectory") if study == "admm" else (study,)
    return [f"{stem}.{kind}" for stem in stems for kind in ("png", "csv")]
