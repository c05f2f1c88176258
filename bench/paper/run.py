"""Runs an experiment of the papers at the scale that the machine allows, and keeps a row for every run.

    python bench/paper/run.py cifar-tau --scale 0.04 --data imagefolder --data-dir ~/cifar10-images
    python bench/paper/run.py --list

An interrupted one goes on when it is started again with the same --out. Rows go to bench/results/paper/NAME.jsonl;
`draw.py` draws them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # harness, which all benches share

from experiments import EXPERIMENTS, Experiment
from harness import RESULTS, Row, about

from easgd_local.compare.contest import Contest, open_contest
from easgd_local.compare.measuring import Interrupted
from easgd_local.compare.outset import look
from easgd_local.compare.saved import finite
from easgd_local.compare.settings import COMMON
from easgd_local.data import Dataset, MemorySplit, Split
from easgd_local.evaluate import evenly_spaced
from easgd_local.flags import add_config_flags
from easgd_local.fork_server import warm_up
from easgd_local.prepare import load

ROWS = RESULTS / "paper"
FLAGS = [name for name in COMMON if name not in ("steps", "epochs")]  # which the scale decides


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Runs an experiment of the papers at the scale that the machine allows.")
    made.add_argument("name", nargs="?", choices=list(EXPERIMENTS), metavar="NAME", help=f"{', '.join(EXPERIMENTS)}")
    made.add_argument("--list", action="store_true", help="say what each of them is, and stop")
    made.add_argument("--scale", type=float, default=1.0, help="fraction of the full length (default 1)")
    made.add_argument("--data-scale", type=float, default=1.0, help="fraction of the pictures (default 1)")
    made.add_argument("--seeds", type=int, default=3, help="runs of each entry (default 3)")
    made.add_argument("--tune-cost", type=float, help="what the search of an entry's step size may cost, in "
                      "runs; 0 for none (default 1.75, where the experiment has one)")  # fmt: skip
    made.add_argument("--out", type=Path, help="folder of the runs (default runs/paper/NAME-SCALE)")
    made.add_argument("--rows", type=Path, default=ROWS, help="folder of the rows (default bench/results/paper)")
    made.argument_default = argparse.SUPPRESS
    group = made.add_argument_group("as in easgd-local train; the defaults are the experiment's, see --list")
    add_config_flags(group, FLAGS)
    for action in group._group_actions:
        action.help = re.sub(r"; default .*$| \(default .*\)$", "", action.help or "")
    return made


def main() -> None:
    given = parser().parse_args()
    if given.list or given.name is None:
        print("\n".join(map(described, EXPERIMENTS.values())))
        return
    experiment = EXPERIMENTS[given.name]
    flags = {name: getattr(given, name) for name in FLAGS if hasattr(given, name)}
    if given.tune_cost is not None:
        flags |= {"tune_cost": given.tune_cost} if given.tune_cost else {"tune": ()}
    try:
        run(experiment, given, flags)
    except (ValueError, OSError) as error:
        raise SystemExit(f"run.py: error: {error}") from None
    except (KeyboardInterrupt, Interrupted):
        raise SystemExit("run.py: interrupted; the same command goes on.") from None


def described(experiment: Experiment) -> str:
    length = f"{experiment.steps:,} steps" if experiment.epochs is None else f"{experiment.epochs:g} epochs"
    flags = ", ".join(f"{name} {value}" for name, value in experiment.common.items())
    entries = f"{len(experiment.entries)} entries, {length} at scale 1, {flags}"
    return f"{experiment.name}: {experiment.source}\n    {entries}"


def run(experiment: Experiment, given: argparse.Namespace, flags: dict[str, Any]) -> None:
    comparison = experiment.comparison(scale=given.scale, seeds=given.seeds, **flags)
    part_of_data = "" if given.data_scale == 1 else f"-{given.data_scale:g}"
    folder = given.out or Path("runs", "paper", f"{experiment.name}-{given.scale:g}{part_of_data}")
    settings = comparison.to_json()
    common = about("paper") | {
        "experiment": experiment.name, "scale": given.scale, "data_scale": given.data_scale,
        "settings": {name: value for name, value in settings["common"].items() if name != "data_dir"},
        "search": {name: settings[name] for name in ("tune", "tune_lrs", "tune_cost", "seeds")},
    }  # fmt: skip
    warm_up("easgd_local.preload_loop")
    dataset = look(comparison, part(load(comparison.template), given.data_scale))
    given.rows.mkdir(parents=True, exist_ok=True)
    with (
        open_contest(comparison, folder, dataset) as contest,
        open(given.rows / f"{experiment.name}.jsonl", "a", encoding="utf-8") as file,
    ):
        known = contest.state.setdefault("rows", {"data_scale": given.data_scale, "written": []})
        if known["data_scale"] != given.data_scale:
            raise ValueError(
                f"data_scale={given.data_scale:g}: the experiment in {folder} was started with "
                f"{known['data_scale']:g}; leave it as it was, or give another --out."
            )
        print(f"{len(comparison.entries)} entries, {len(comparison.run_seeds)} seeds; folder {folder}", flush=True)
        try:
            for line in contest.run():
                print(line, flush=True)
                write(contest, file, common)
        finally:
            write(contest, file, common)
        failed = [f"{one['label']} seed {one['seed']}" for one in contest.records if one["status"] == "failed"]
        if failed:
            raise ValueError(f"{', '.join(failed)}: failed; the same command runs what failed again.")
        print(f"rows: {file.name}; draw them with python bench/paper/draw.py {experiment.name} --rows {given.rows}")


def write(contest: Contest, file: TextIO, common: Row) -> None:
    """Appends the rows of what has been recorded and has none yet, and notes that; killed in between it writes them
    again, and the newer of two equal rows counts."""
    made = contest.state["rows"]["written"]
    for kind in ("trials", "records"):
        for one in contest.state[kind]:
            name = [kind, one["label"], one["seed"], one["lr"], one["wanted_steps"], one["status"]]
            if name not in made:
                file.write(json.dumps(finite(row(one, kind, common)), allow_nan=False) + "\n")
                made.append(name)
    file.flush()
    contest.finish()


def row(record: Row, kind: str, common: Row) -> Row:
    name = f"{common['experiment']}: {record['label']}, seed {record['seed']}"
    trial = kind == "trials"
    left_out = ("curve", "warnings") if trial else ("warnings",)
    own = {name: value for name, value in record.items() if name not in left_out}
    return {"entry": f"{name}, trial lr={record['lr']:g}" if trial else name, "trial": trial, **common, **own}


def part(dataset: Dataset, scale: float) -> Dataset:
    """So large a fraction of the training and of the test pictures, evenly spaced."""
    if not 0 < scale <= 1:
        raise ValueError(f"data_scale={scale}: the fraction of the pictures must lie in (0, 1]; try 0.1.")
    if scale < 1 and dataset.name == "synthetic":
        raise ValueError(f"data_scale={scale:g}: synthetic pictures are made anew from each seed; leave it out.")
    return dataset if scale == 1 else dataclasses.replace(
        dataset, train=_part(dataset.train, scale), test=_part(dataset.test, scale)
    )  # fmt: skip


def _part(split: Split, scale: float) -> MemorySplit:
    return MemorySplit(*split.read(evenly_spaced(len(split), max(1, round(scale * len(split))))))


if __name__ == "__main__":
    main()
