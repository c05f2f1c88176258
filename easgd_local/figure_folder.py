"""A folder of figures and their data, as `theory` and `simulate` write it."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from easgd_local.whole_file import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 110


Table = Mapping[str, Any]  # column -> values; they broadcast and are written flat


def refuse_foreign(folder: Path, names: Sequence[str]) -> None:
    """`ValueError` if the folder is a file, or holds others than these."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={folder}: is a file, and the figures need a folder; give another --out.")
    known = {*names, *(f".{name}.part" for name in names)}  # the second are what a kill has left
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in known) if folder.exists() else []
    if foreign:
        raise ValueError(
            f"out={folder}: holds other files ({foreign[0]}), and only an empty folder or an earlier one of the same "
            f"figures is written into; give another --out."
        )


def write(folder: Path, tables: Mapping[str, Table], figures: Mapping[str, Figure]) -> list[Path]:
    """Writes STEM.csv for each table and STEM.png for each figure, each as a whole; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for stem, table in tables.items():
        written.append(folder / f"{stem}.csv")
        with whole_file(written[-1]) as part:
            _write_table(part, table)
    for stem, figure in figures.items():
        written.append(folder / f"{stem}.png")
        with whole_file(written[-1]) as part:
            figure.savefig(part, dpi=DOTS_PER_INCH, format="png")
    return written


def _write_table(path: Path, table: Table) -> None:
    """The columns as a CSV file; numbers with ten digits."""
    columns = [column.ravel() for column in np.broadcast_arrays(*table.values())]
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerows(chain([list(table)], zip(*(map(_cell, column) for column in columns), strict=True)))


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.10g}"
