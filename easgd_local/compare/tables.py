"""The table of a comparison, for the screen and in Markdown, and the report around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from easgd_local import hardware
from easgd_local.compare.measuring import Record
from easgd_local.compare.settings import Comparison
from easgd_local.compare.standing import Spread, Standing, edges
from easgd_local.compare.tuning import BETA_FACTORS, TAU_FACTORS
from easgd_local.report import table
from easgd_local.wording import count_text, flattened, seconds_text

if TYPE_CHECKING:
    from rich.console import RenderableType

BYTES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
NOTHING = "-"
FAR = 0.25  # from the budget, as a share of it


def head(target: float) -> list[str]:
    """The names of the columns."""
    return [
        "entry", "status", "lr", "p", "steps", f"time to {100 * target:g} %", "samples to it", "reached",
        "final test error", "training time", "samples/s", "exchange", "waiting", "moved",
    ]  # fmt: skip


def rows(standings: Sequence[Standing]) -> list[list[str]]:
    """A row for each entry."""
    return [
        [
            one.label, one.status, _values(one), NOTHING if one.workers is None else str(one.workers),
            NOTHING if one.steps is None else f"{one.steps:,}",
            _time(one), _median(one.samples_to_target, count_text), f"{one.reached}/{sum(one.statuses.values())}",
            _error(one.test_error), _median(one.seconds, seconds_text), _median(one.samples_per_s, count_text),
            _median(one.exchange_s, seconds_text), _median(one.wait_s, seconds_text),
            _median(one.moved_bytes, bytes_text),
        ]
        for one in standings
    ]  # fmt: skip


def notes(comparison: Comparison, standings: Sequence[Standing]) -> list[str]:
    """What the columns mean, what is equal for all entries, and where it came out otherwise."""
    found = [
        *_unequal(comparison.budget_s, standings),
        f"Equal for all: {_length(comparison)}; model, start, data, minibatches by rank, weight decay and evaluation.",
        "Time to the target: training seconds until the first evaluation at or below it, median over the runs that "
        "reached it (least to largest). Evaluation and start-up are not counted. Samples to it: of all workers.",
        f"Final test error: mean ± standard deviation over the runs that are done (n); "
        f"{_runs(comparison)}. The other columns are medians.",
        "Exchange and waiting: seconds summed over the workers; torch's cannot be told apart from its backward pass. "
        "Moved: bytes that all workers together read and write to average, counted, not measured.",
    ]
    if comparison.tune:
        found.append(
            f"{', '.join(comparison.tune)}: each entry's own, by successive halving over {comparison.tune_lrs} step "
            f"sizes, factors of √10 apart around its default{_also(comparison.tune)}, by the test error on seed "
            f"{comparison.tuning_seed}, which is not compared. All trials are in tune.json. As there is no third set "
            f"of samples, errors are a little flattered, all alike."
        )
    else:
        found.append(
            "Not tuned: an entry without an lr of its own runs at its rule's default, which need not suit this model "
            "and length; --tune finds each entry's own."
        )
    if (most := comparison.most_workers) > hardware.cores() and comparison.common.get("device") != "cuda":
        found.append(
            f"{most} workers shared {hardware.cores()} cores, which makes no worker faster: on CPUs compare with "
            f"--workers {hardware.cores()}."
        )
    return found


def _runs(comparison: Comparison) -> str:
    seeds = comparison.run_seeds
    return f"1 run, seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} runs, seeds {seeds[0]} to {seeds[-1]}"


def _also(names: Sequence[str]) -> str:
    factors = {"tau": TAU_FACTORS, "beta": BETA_FACTORS}
    told = [f"{name} times {', '.join(f'{one:.2g}' for one in factors[name])}" for name in names if name in factors]
    return "".join(f" and {one}" for one in told) + ("; of tau, what the trials are long enough for" if told else "")


def _unequal(budget_s: float | None, standings: Sequence[Standing]) -> list[str]:
    """A sentence where runs took much more or less time than the budget, so that nobody takes them for equal."""
    if budget_s is None:
        return []
    far = [one for one in standings if one.seconds and abs(one.seconds.median / budget_s - 1) > FAR]
    if not far:
        return []
    told = ", ".join(f"{one.label} {seconds_text(one.seconds.median)}" for one in far if one.seconds)
    return [
        f"Unequal: against the budget of {seconds_text(budget_s)} the median training time was: {told}. The machine "
        f"was not equally busy in the timed run and in the compared ones; compare times to the target only."
    ]


def _length(comparison: Comparison) -> str:
    common = comparison.template
    if comparison.budget_s is not None:
        return f"about {seconds_text(comparison.budget_s)} of training (steps by a short timed run of each)"
    if common.epochs is not None:
        return f"{common.epochs:g} passes over the training set by all workers together, so the number of samples"
    return f"{common.steps} steps of each worker, so one worker sees p times fewer samples than p workers"


def screen(comparison: Comparison, standings: Sequence[Standing]) -> RenderableType:
    """The table for a terminal of 80 columns: what is the same for all, or of less interest, is in the report."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    goal = f"{100 * comparison.target_error:g} %"
    names = ("entry", "status", f"time to {goal}\n(reached)", "final\ntest error", "samples/s,\nmoved",
             "exchange,\nwaiting")  # fmt: skip
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="dim")
    for place, name in enumerate(names):
        shown.add_column(name, justify="left" if place < 2 else "right", no_wrap=place > 0)
    for one in standings:
        runs = sum(one.statuses.values())
        time = f"{_time(one).replace(' (', chr(10) + '(')}\n({one.reached}/{runs})"
        rate = f"{_median(one.samples_per_s, count_text)}\n{_median(one.moved_bytes, bytes_text)}"
        spent = f"{_median(one.exchange_s, seconds_text)}\n{_median(one.wait_s, seconds_text)}"
        entry = "\n".join([one.label, *f"lr={_values(one)}".split(", ")])
        cells = (entry, one.status, time, _error(one.test_error).replace(" (", "\n("), rate, spent)
        shown.add_row(*(Text(cell, "red" if cell == one.status != "done" else "") for cell in cells))
    return Group(shown, *(Text(note, "dim") for note in notes(comparison, standings)))


def markdown(comparison: Comparison, standings: Sequence[Standing], state: dict[str, Any]) -> str:
    """The report: the table, the pictures, what failed, and everything needed to judge and to repeat it."""
    bad = [one for one in state["records"] if one["status"] != "done"]
    causes = [(one["label"], one["seed"], one["status"], one["cause"]) for one in bad]
    parts = [
        "# Comparison",
        table(head(comparison.target_error), rows(standings)),
        "\n".join(f"- {note}" for note in [*notes(comparison, standings), *_load(state["records"])]),
        "![test error against training seconds and against samples](comparison.png)",
        "## Failed and diverged runs",
        table(("entry", "seed", "status", "cause"), causes),
        "## Warnings",
        table(("entry", "seed", "warning"), _warnings(state)),
    ]
    for name in ("settings", "hardware", "versions"):
        told = [(what, _told(value)) for what, value in flattened(state[name]) if value is not None]
        parts += [f"## {name.capitalize()}", table(("what", "value"), told)]
    return "\n\n".join(parts) + "\n"


def _told(value: Any) -> Any:
    """A value of the settings: of entries, their rules with all hyperparameters."""
    if not (isinstance(value, list) and value and isinstance(value[0], dict)):
        return value
    rules = ({**one["rule"], **{name: one[name] for name in ("turns", "threads", "workers")}} for one in value)
    flags = ({name: one for name, one in rule.items() if one is not None} for rule in rules)
    return "; ".join(" ".join([own.pop("name"), *(f"{name}={one}" for name, one in own.items())]) for own in flags)


def _load(records: Sequence[Record]) -> list[str]:
    """How busy the machine was with this and with other things."""
    loads = sorted(one["load"] for one in records if "load" in one)
    if not loads:
        return []
    return [
        f"Load, processes running or ready in the minute before a run: median {loads[len(loads) // 2]:.1f}, largest "
        f"{loads[-1]:.1f}. What else runs on the machine is felt most by those who wait for each other."
    ]


def _warnings(state: dict[str, Any]) -> list[tuple[Any, ...]]:
    told = [(one["label"], one["seed"], warning) for one in state["records"] for warning in one.get("warnings") or ()]
    return [(label, "", f"its {sentence}") for label, sentence in edges(state).items()] + told


def bytes_text(value: float) -> str:
    """With the unit that leaves one to three digits before the point."""
    unit, size = next(((unit, size) for unit, size in BYTES if value >= size), ("B", 1.0))
    return f"{value / size:.3g} {unit}"


def _values(one: Standing) -> str:
    """The step size, the momentum, and what else was found by a search."""
    found = {"momentum": one.momentum, **one.tuned, "lr": None}
    return ", ".join([f"{one.lr:g}", *(f"{name}={value:g}" for name, value in found.items() if value is not None)])


def _time(one: Standing) -> str:
    found = one.seconds_to_target
    if found is None:
        return "not reached" if "done" in one.statuses else NOTHING
    if found.n == 1:
        return seconds_text(found.median)
    return f"{seconds_text(found.median)} ({found.least:.3g} to {found.largest:.3g})"


def _error(found: Spread | None) -> str:
    if found is None:
        return NOTHING
    deviation = "" if found.deviation is None else f" ± {100 * found.deviation:.2f}"
    return f"{100 * found.mean:.2f}{deviation} % (n = {found.n})"


def _median(found: Spread | None, text: Any) -> str:
    return NOTHING if found is None else str(text(found.median))
