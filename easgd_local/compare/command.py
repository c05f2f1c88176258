"""`easgd-local compare ENTRY ENTRY ...`: its own flags, its folder and its files; the rest is as in `train`."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easgd_local.argument_types import number, whole
from easgd_local.compare.entries import parse
from easgd_local.compare.rivals import RIVALS
from easgd_local.compare.settings import COMMON, POINTS, Comparison, duration
from easgd_local.compare.tuning import LRS, cost_of, rungs
from easgd_local.whole_file import whole_file

if TYPE_CHECKING:
    from rich.console import RenderableType

    from easgd_local.compare.contest import Contest

USAGE = "easgd-local compare ENTRY ENTRY ... [--flag VALUE ...]"
DESCRIPTION = (
    "Trains the same model on the same data from the same start with every ENTRY, one after another, each with the "
    "whole machine, and says how soon it reached which test error. An ENTRY is a rule or one of "
    f"{', '.join(RIVALS)} (PyTorch's own), with its flags in one word: 'eamsgd tau=16 lr=0.01'; beside the rule's "
    "it may have turns, threads, workers. Equal for all is what fixes the length: --steps (of each worker), --epochs "
    "(samples of all workers together) or --budget (seconds)."
)
DEFAULT_STEPS = 500


class Stopped(Exception):
    """The user has stopped the comparison; the message says how to go on."""


class Failed(Exception):
    """Some runs have failed; the message says which."""


def add_flags(group: argparse._ArgumentGroup) -> None:
    """The flags that only `compare` has; those that are not given are absent from the result."""

    def add(name: str, read: Callable[[str], Any], word: str, text: str) -> None:
        group.add_argument(name, type=read, metavar=word, default=argparse.SUPPRESS, help=text)

    add("--steps", whole, "N", f"steps of each worker; default {DEFAULT_STEPS} unless epochs or budget is given")
    add("--budget", str, "TIME", "instead of steps: training seconds of each run, such as 30s, 10m or 1h")
    add("--eval-every", whole, "N", "steps between evaluations; 0 only at the start and the end; default steps / "
        f"{POINTS}")  # fmt: skip
    add("--target-error", number, "X", "test error whose time is taken, a share in (0, 1) (default 0.1)")
    add("--seeds", whole, "N", "runs of each entry, with seeds from --seed on (default 3)")
    group.add_argument(
        "--tune", action="store_true", default=argparse.SUPPRESS,
        help=f"first find each entry's lr by successive halving, for the cost of {cost_of(rungs(LRS)):g} runs each",
    )  # fmt: skip
    add("--tune-over", str, "NAMES", "tune these: lr, or lr,tau, or lr,tau,beta where an entry has them; tau and beta "
        f"are tried at a few times less and more, for {cost_of(rungs(3 * LRS)):.2g} and "
        f"{cost_of(rungs(9 * LRS)):.2g} runs each (default lr)")  # fmt: skip
    add("--tune-lrs", whole, "N", f"step sizes to try, factors of √10 apart; an odd number (default {LRS})")
    add("--tune-cost", number, "X", "what each search may cost, in compared runs: its trials get shorter or longer")
    add("--out", str, "FOLDER", "folder of the comparison; one that was interrupted goes on (default "
        "runs/<time>-compare)")  # fmt: skip
    add("--resume", str, "FOLDER", "go on with the comparison in this folder, as it was started")


def make_comparison(*, entries: Sequence[str], **values: Any) -> Comparison:
    """The comparison that the flags describe; `ValueError` for one that cannot work."""
    common = {name: values.pop(name) for name in COMMON if name in values}
    budget, over, tunes = values.pop("budget", None), values.pop("tune_over", None), values.pop("tune", False)
    if tunes or over is not None or {"tune_lrs", "tune_cost"} & values.keys():
        values["tune"] = tuple(("lr" if over is None else over).split(","))
    if budget is not None:
        values["budget_s"] = duration(budget)
    elif common.get("steps") is None and common.get("epochs") is None:
        common["steps"] = DEFAULT_STEPS
    return Comparison(entries=parse(entries, common.get("model", "")), common=common, **values)


def execute(*, importing: AbstractContextManager[None] | None = None, **values: Any) -> Iterator[str | RenderableType]:
    """Runs the comparison and yields what to print as it is known.

    `importing` is entered while torch is imported. `ValueError` for values that cannot work, before anything is
    written; `Stopped`, `Failed`; `OSError` when the folder cannot be written to.
    """
    out, resume = values.pop("out", None), values.pop("resume", None)
    comparison = _saved(Path(resume), out, values) if resume is not None else make_comparison(**values)
    from easgd_local.fork_server import warm_up

    warm_up("easgd_local.preload_loop")  # torch's optimizers, for the rivals
    with importing or nullcontext():
        from easgd_local.compare.contest import open_contest
        from easgd_local.compare.measuring import Interrupted
        from easgd_local.compare.outset import look
    folder = Path(resume or out or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-compare")
    with open_contest(comparison, folder, look(comparison)) as contest:
        try:
            yield _opening(comparison, folder, len(contest.records))
            try:
                yield from contest.run()
            finally:
                written = list(_write(contest)) if contest.records else []
            yield from written
        except (KeyboardInterrupt, Interrupted):
            go_on = shlex.join(["easgd-local", "compare", "--resume", str(folder)])
            raise Stopped(f"interrupted; go on with {go_on}") from None
    failed = [f"{one['label']} seed {one['seed']}" for one in contest.records if one["status"] == "failed"]
    if failed:
        raise Failed(f"{', '.join(failed)}: failed; --resume {folder} runs what failed again.")


def _saved(folder: Path, out: str | None, given: dict[str, Any]) -> Comparison:
    """The comparison in this folder; nothing may be given beside it."""
    words = [*given.pop("entries"), *given, *(["out"] if out is not None else [])]
    if words:
        raise ValueError(
            f"resume={folder} and {words[0]}: a comparison that goes on stays what it was; leave {words[0]} out."
        )
    from easgd_local.compare.saved import read_comparison, saved_state

    return read_comparison(folder, saved_state(folder))


def _workers(comparison: Comparison) -> str:
    """p of the entries that may have several."""
    several = {comparison.workers(one) for one in comparison.entries if not one.rule.sequential}
    return ", ".join(map(str, sorted(several))) or "1"


def _opening(comparison: Comparison, folder: Path, recorded: int) -> str:
    count = comparison.seeds * len(comparison.entries)
    rest = f", {recorded} of them done already" if recorded else ""
    seeds = "1 seed" if comparison.seeds == 1 else f"{comparison.seeds} seeds"
    trials = " after the trials of each entry's search" if comparison.tune else ""
    return f"{len(comparison.entries)} entries x {seeds} = {count} runs{trials}{rest}; folder {folder}"


def _write(contest: Contest) -> Iterator[str | RenderableType]:
    """The files of what is recorded so far, then the table."""
    from easgd_local.compare import figures, tables
    from easgd_local.compare.standing import standings

    comparison, folder = contest.comparison, contest.folder
    order = {one.label: place for place, one in enumerate(comparison.entries)}
    records = sorted(contest.records, key=lambda one: (order[one["label"]], one["seed"]))
    found = standings(records, comparison.target_error)
    contest.finish(standings=[one.to_json() for one in found])
    with whole_file(folder / "report.md") as part:
        part.write_text(tables.markdown(comparison, found, contest.state), encoding="utf-8")
    common = comparison.template
    heading = (
        f"{common.model} on {common.data}, p = {_workers(comparison)}; "
        f"{'one seed, so no range' if comparison.seeds == 1 else f'median and range of {comparison.seeds} seeds'}"
    )
    with whole_file(folder / "comparison.png") as part:
        figures.figure(records, comparison.target_error, heading).savefig(part, dpi=110, format="png")
    yield tables.screen(comparison, found)
    yield f"written: {', '.join(str(folder / name) for name in ('results.json', 'report.md', 'comparison.png'))}"
