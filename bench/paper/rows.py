"""The rows of an experiment, read back: those of its newest runs, all made alike."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easgd_local.compare.measuring import Record
from easgd_local.compare.saved import restored
from easgd_local.compare.standing import Standing, standings

Row = dict[str, Any]


@dataclass(frozen=True)
class Runs:
    """What is drawn and told of an experiment: its compared runs and the trials of the search of step sizes."""

    compared: list[Record]
    trials: list[Record]

    @property
    def about(self) -> Row:
        """The newest row: scale, settings and machine are those of all; date, commit and load may differ."""
        return self.compared[-1]

    def standing(self, target_error: float) -> dict[str, Standing]:
        """Of each entry, by its label."""
        return {one.label: one for one in standings(self.compared, target_error)}


def read(folder: Path, name: str) -> Runs | None:
    """The newest rows of every run that has the scale and the settings of the last one; None without a compared run."""
    path = folder / f"{name}.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    rows: list[Row] = [restored(json.loads(line)) for line in lines]
    alike = [one for one in rows if _made(one) == _made(rows[-1])]
    newest = list({(one["entry"], one["wanted_steps"]): one for one in alike}.values())
    found = Runs([one for one in newest if not one["trial"]], [one for one in newest if one["trial"]])
    return found if found.compared else None


def _made(row: Row) -> tuple[Any, ...]:
    """What must be equal where runs are compared, and found by one search; steps follow from the scale."""
    free = ("steps", "eval_every")
    settings = {name: value for name, value in row["settings"].items() if name not in free}
    return row["scale"], row["data_scale"], row["hardware"]["processor"], settings, row["search"]
