"""What every bench needs: spreads, rows with hardware, versions and commit, and a small table.

A row is one JSON object a line in bench/results/<bench>.jsonl: what was measured (`bench`, `entry` and the settings),
the numbers, each with its unit in its name and as {"median", "p20", "p80", "n"}, and where (`date`, `commit`, `load`,
`hardware`, `versions`). Rows are appended, never changed.

    python bench/harness.py            prints the newest row of every entry
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from easgd_local import hardware

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
ABOUT = ("bench", "date", "commit", "load", "hardware", "versions")  # of a row, beside what is its own

Row = dict[str, Any]


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, and n."""
    numbers = np.asarray(list(values), float)
    p20, median, p80 = np.percentile(numbers, (20, 50, 80))
    return {"median": float(median), "p20": float(p20), "p80": float(p80), "n": len(numbers)}


def arguments(question: str) -> argparse.ArgumentParser:
    """The flags that every bench has."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; writes no rows by itself")
    parser.add_argument("--results", type=Path, help="folder for the rows; default bench/results, nowhere with --quick")
    parser.add_argument("--repetitions", type=int, help="how often each entry is timed")
    return parser


def about(bench: str) -> Row:
    """What all the rows of one run of a bench share. Call it first: `load` is the machine's before we add to it."""
    return {
        "bench": bench,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "load": os.getloadavg()[0],
        "hardware": hardware.describe(),
        "versions": hardware.versions(),
    }


def commit() -> str:
    """The commit measured, with -dirty where files differ from it (rows themselves do not count)."""
    status = _git("status", "--porcelain", "--untracked-files=no", "--", ":!bench/results")
    return _git("rev-parse", "--short=12", "HEAD") + ("-dirty" if status else "")


def record(rows: Iterable[Row], common: Row, given: argparse.Namespace) -> list[Row]:
    """Appends every row to the bench's file as soon as it is measured (with --quick only where --results says so), and
    prints them as a table at the end, also at an end before its time; returns them."""
    folder = given.results or (None if given.quick else RESULTS)
    made: list[Row] = []
    try:
        for row in rows:
            made.append({"entry": row["entry"], **common, **row})
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                with open(folder / f"{common['bench']}.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(made[-1]) + "\n")
    finally:
        if made:
            print(table(made), flush=True)
    return made


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table: one column a number, as median (p20 to p80, n)."""
    names = list(dict.fromkeys(name for row in rows for name in row if name not in (*ABOUT, "entry")))
    lines = [["entry", *names], ["---"] * (1 + len(names))]
    lines += [[row["entry"], *(shown(row.get(name)) for name in names)] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shown(value: Any) -> str:
    """One cell: a spread, a number or a word."""
    if isinstance(value, dict):
        if value["n"] == 1:
            return f"{value['median']:.4g} (n = 1)"
        return f"{value['median']:.4g} ({value['p20']:.4g} to {value['p80']:.4g}, n = {value['n']})"
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def newest(path: Path) -> list[Row]:
    """The last row of every entry of a file, in the order in which the entries first appeared."""
    rows: dict[str, Row] = {}
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        rows[row["entry"]] = row
    return list(rows.values())


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def main() -> None:
    """Prints the newest rows of every bench, and where they were measured."""
    for path in sorted(RESULTS.glob("*.jsonl")):
        rows = newest(path)
        print(f"## {path.stem}\n")
        for place in dict.fromkeys(_place(row) for row in rows):
            print(f"{place}\n\n{table([row for row in rows if _place(row) == place])}\n")


def _place(row: Row) -> str:
    machine, versions = row["hardware"], row["versions"]
    known = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "numpy") if name in versions)
    return (
        f"{machine['processor']}, {machine['cores']} cores; {known}; commit {row['commit']}; {row['date']}; "
        f"load before {row['load']:.2f}"
    )


if __name__ == "__main__":
    main()
