"""All benches on one page: bench/results/*.jsonl as Markdown, the newest row of every entry on every kind of machine.

    python bench/tables.py                       prints it
    python bench/tables.py --write docs/benches.md
"""

from __future__ import annotations

import argparse
import ast
import json
from collections import defaultdict
from pathlib import Path

import harness

HERE = Path(__file__).parent
TOP = """# Benches: the numbers

Made by `bench/tables.py` from the rows in `bench/results`; what the columns mean stands in `bench/README.md`. A number
is a median, in brackets the 20th to the 80th percentile and n. GB is 10^9 bytes, and load how many processes were
running or ready before.
"""


def page(folder: Path) -> str:
    """The whole page."""
    return "\n".join([TOP, *(section(path) for path in sorted(folder.glob("*.jsonl")))])


def section(path: Path) -> str:
    """One bench: its question, and a table for each place and time where rows were measured."""
    tables: dict[str, list[harness.Row]] = defaultdict(list)
    for row in newest(path):
        tables[where(row)].append(row)
    parts = [f"## {path.stem}\n\n{question(path.stem)}\n"]
    parts += [f"{place}\n\n{harness.table([plain(row) for row in rows])}\n" for place, rows in tables.items()]
    return "\n".join(parts)


def newest(path: Path) -> list[harness.Row]:
    """The last row of every entry on every kind of machine, in the order in which they first appeared."""
    rows = {}
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        rows[machine(row), row["entry"]] = row
    return list(rows.values())


def machine(row: harness.Row) -> str:
    """The kind of machine: its processor and GPUs."""
    hardware = row["hardware"]
    gpus = "".join(f"; {gpu}" for gpu in hardware.get("gpus", ()))
    pretended = "; the CUDA driver only pretends" if row.get("pretended") else ""
    return f"{hardware['processor']}, {hardware['cores']} cores{gpus}{pretended}"


def where(row: harness.Row) -> str:
    """Machine, versions, commit and date."""
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    return f"{machine(row)}. {versions}. Commit {row['commit']}, {row['date'][:10]}, load {row['load']:.2f}."


def plain(row: harness.Row) -> harness.Row:
    """Without what `where` has said, and without what is no cell of a table, such as a curve."""
    return {name: value for name, value in row.items() if name != "pretended" and is_cell(value)}


def is_cell(value: object) -> bool:
    """A number, a word or a spread."""
    return "median" in value if isinstance(value, dict) else not isinstance(value, list)


def question(bench: str) -> str:
    """The first paragraph of the script's docstring; nothing for a script that is gone."""
    script = HERE / f"{bench}.py"
    said = ast.get_docstring(ast.parse(script.read_text("utf-8"))) if script.is_file() else None
    return " ".join((said or "").split("\n\n")[0].split())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of the rows")
    parser.add_argument("--write", type=Path, metavar="FILE", help="where the page goes, instead of being printed")
    given = parser.parse_args()
    text = page(given.results)
    if given.write:
        given.write.write_text(text, "utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
