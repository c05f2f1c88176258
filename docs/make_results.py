"""Makes docs/results.md from the rows under bench/results/paper; a test says when it is out of date.

    python bench/paper/draw.py; python docs/make_results.py
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PAPER = DOCS.parent / "bench" / "paper"
sys.path.insert(0, str(PAPER))

from draw import ROWS, short  # noqa: E402
from experiments import EXPERIMENTS, Experiment  # noqa: E402
from findings import FINDINGS, text  # noqa: E402
from rows import Runs, read  # noqa: E402

from easgd_local.compare.standing import Standing  # noqa: E402
from easgd_local.compare.tables import head, rows  # noqa: E402
from easgd_local.report import table  # noqa: E402

PAGE, REMARKS = DOCS / "results.md", PAPER / "remarks"
OPENING = """# Results

What `easgd-local` has measured of itself, and where its curves agree with the papers' and where they do not. This page
is made from the rows in [bench/results/paper](../bench/results/paper) by `docs/make_results.py`: one row for every run
and every trial of a step size. Test errors and losses are the center's. They depend on no clock: asynchronous runs with
strict turns give the same numbers again, to the last bit, on the same machine. Times depend on it, and on what else it
did.

**No experiment has run on a GPU yet.** All were run on the CPU named, at the scale it allows."""


def page() -> str:
    parts, missing = [OPENING], []
    for experiment in EXPERIMENTS.values():
        runs = read(ROWS, experiment.name)
        if runs is None:
            missing.append(experiment)
        else:
            parts += section(experiment, runs)
    if missing:
        listed = "\n".join(f"- `{one.name}`: {one.source}" for one in missing)
        parts += ["## Not run yet", f"`python bench/paper/run.py NAME` runs them:\n\n{listed}"]
    return "\n\n".join(parts) + "\n"


def section(experiment: Experiment, runs: Runs) -> list[str]:
    found = runs.standing(experiment.target_error)
    picture = f"![{experiment.source}](pictures/paper-{experiment.name}.png)"
    parts = [f"## {experiment.source}", f"```bash\n{command(experiment, runs)}\n```", facts(experiment, runs), picture]
    if len(experiment.panels) > 1:
        parts.append(pivot(experiment, found))
    else:
        ordered = [found[label] for label in experiment.labels if label in found]
        parts.append(table(head(experiment.target_error), rows(ordered)))
    claims = FINDINGS[experiment.name](runs, found) if experiment.name in FINDINGS else []
    if claims:
        told = [(one.claim, one.verdict, one.numbers) for one in claims]
        parts.append(table(("the paper's finding", "here", "final test errors unless said otherwise"), told))
    remark = REMARKS / f"{experiment.name}.md"
    return parts + ([remark.read_text("utf-8").strip()] if remark.exists() else [])


def command(experiment: Experiment, runs: Runs) -> str:
    """The command that made the rows, but for where the pictures lie."""
    about, flags = runs.about, []
    for name, value in about["settings"].items():
        own = experiment.common.get(name)
        if name in ("steps", "epochs") or value == own or (own is None and value in USUAL[name]):
            continue
        flags.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}"))
    search = about["search"]
    if search["tune_cost"] is not None or bool(search["tune"]) != bool(experiment.tune):
        flags.append(f"--tune-cost {search['tune_cost'] or 0:g}")
    scale = f" --data-scale {about['data_scale']:g}" if about["data_scale"] != 1 else ""
    call = f"python bench/paper/run.py {experiment.name} --scale {about['scale']:g}{scale} --seeds {search['seeds']}"
    return " ".join([call, *flags])


def _usual() -> dict[str, tuple[object, ...]]:
    from easgd_local.compare.settings import COMMON
    from easgd_local.config import Config
    from easgd_local.rules.easgd import EASGD

    made = Config(rule=EASGD())
    return {name: (getattr(made, name), None) for name in COMMON}


USUAL = _usual()


def facts(experiment: Experiment, runs: Runs) -> str:
    """On what: model, machine, versions, commits, load."""
    about, settings = runs.about, runs.about["settings"]
    machine, versions = about["hardware"], about["versions"]
    commits = ", ".join(dict.fromkeys(one["commit"] for one in runs.compared))
    load = statistics.median(one["load"] for one in runs.compared)
    steps = sorted({one["wanted_steps"] for one in runs.compared})
    length = f"{steps[0]:,} steps" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,} steps"
    tuned = f"; step sizes by {len(runs.trials)} shorter trials on a seed that is not compared" if runs.trials else ""
    parameters = next((one["parameters"] for one in runs.compared if "parameters" in one), 0)
    seeds = ", ".join(str(one) for one in sorted({one["seed"] for one in runs.compared}))
    return (
        f"{settings['model']} ({parameters:,} parameters) on {settings['data']}, batches of "
        f"{settings['batch_size']}, {settings['precision']}, {length} of each worker, seeds {seeds}{tuned}. "
        f"{machine['processor']}, {machine['cores']} cores, PyTorch {versions['torch']}; commit {commits}; load "
        f"(processes running or ready) before a run: median {load:.1f}."
    )


def pivot(experiment: Experiment, found: dict[str, Standing]) -> str:
    """Final test error: a row for each name, a column for each panel."""
    names = dict.fromkeys(short(experiment, label) for label in experiment.labels)
    lines = [
        [name, *(_cell(experiment, name, panel.labels, found) for panel in experiment.panels)] for name in names
    ]  # fmt: skip
    return (
        "Final test error of the center, mean ± standard deviation (n), and the step size found:\n\n"
        + table(("entry", *(panel.title for panel in experiment.panels)), lines)
    )


def _cell(experiment: Experiment, name: str, labels: tuple[str, ...], found: dict[str, Standing]) -> str:
    own = [found[label] for label in labels if short(experiment, label) == name and label in found]
    if not own:
        return ""
    one = own[0]
    count = "" if one.test_error is None else f" (n = {one.test_error.n})"
    bad = "" if one.status == "done" else f", {one.status}"
    return f"{text(one.test_error)}{count}{bad}, lr {one.lr:g}"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
