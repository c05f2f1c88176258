"""The files of a comparison as JSON: written whole or not at all, and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from easgd_local import metrics
from easgd_local.compare.settings import Comparison
from easgd_local.whole_file import whole_file

RESULTS, TRIALS = "results.json", "tune.json"


def saved_state(folder: Path) -> dict[str, Any]:
    """What results.json and tune.json of an earlier comparison hold; `ValueError` if there is none."""
    try:
        state = json.loads((folder / RESULTS).read_text())
        trials = json.loads((folder / TRIALS).read_text()) if (folder / TRIALS).exists() else []
        return dict(restored(state)) | {"trials": restored(trials)}
    except OSError as error:
        raise ValueError(
            f"resume={folder}: no comparison is there ({RESULTS}: {error.strerror}); name the folder of an earlier one."
        ) from error
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{folder / RESULTS}: is damaged ({error}); restore it, or start a new comparison with another --out."
        ) from error


def read_comparison(folder: Path, state: dict[str, Any]) -> Comparison:
    """The comparison that a saved state belongs to; `ValueError` if it is damaged, or another version's."""
    try:
        comparison = Comparison.from_json(state["settings"])
        if json.loads(json.dumps(comparison.to_json())) != state["settings"]:
            raise KeyError("settings")
        labels = {one.label for one in comparison.entries}
        for one in (*state["records"], *state["trials"]):
            if one["label"] not in labels or not {"seed", "status", "lr", "wanted_steps"} <= one.keys():
                raise KeyError(one["label"])
        if not all("curve" in one for one in state["records"]) or not all("values" in one for one in state["trials"]):
            raise KeyError("curve, values")
        if not isinstance(state["tuned"], dict) or not isinstance(state["paces"], dict):
            raise TypeError("tuned, paces")
    except (KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{folder / RESULTS}: is damaged, or was written by another version ({what}); start a new comparison with "
            f"another --out."
        ) from error
    return comparison


def write_json(path: Path, values: Any) -> None:
    """The file, whole or as it was; numbers that are not finite become null, and their names are listed beside them."""
    with whole_file(path) as part:
        part.write_text(json.dumps(finite(values), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def finite(values: Any) -> Any:
    """What JSON can hold: numbers that are not finite become null, and their names are listed beside them."""
    if isinstance(values, dict):
        return metrics.finite({name: finite(value) for name, value in values.items()})
    return [finite(one) for one in values] if isinstance(values, list | tuple) else values


def restored(values: Any) -> Any:
    """What `write_json` was given."""
    if isinstance(values, dict):
        return {name: restored(value) for name, value in metrics.restored(values).items()}
    return [restored(one) for one in values] if isinstance(values, list) else values
