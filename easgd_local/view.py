"""What a person sees of a run while it runs, drawn by the launcher alone: bars on a terminal, plain lines elsewhere.

Everything shown comes from an event or from the workers' clocks; nothing is extrapolated except the time left, which
says "about". "Worker loss" is a worker's own, over its minibatches; "center loss" is the center's, by evaluation.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from easgd_local import checkpoint
from easgd_local.board import Board, Row
from easgd_local.metrics import Event
from easgd_local.unfailing import Unfailing
from easgd_local.wording import (
    clock_text,
    count_text,
    loss_text,
    seconds_text,
    summary_rows,
    worker_rows,
)

LINE_EVERY_S = 10.0  # plain progress lines, at most
STYLES = {"died": "bold red", "finished": "green", "evaluating": "cyan", "training": ""}


class Screen:
    """A terminal: one bar a worker, the center below, and what happened scrolling by above."""

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self.console, self.board = console, Board(now)
        self.live = Live(console=console, auto_refresh=False, get_renderable=self.render, vertical_overflow="crop")

    def __call__(self, event: Event) -> None:
        self.board.observe(event)
        if event["kind"] == "start":
            self.console.print(Text(self.board.heading(), style="bold"))
        elif event["kind"] not in ("center", "checkpoint") and (line := notable(event)):
            self.console.print(Text(line, style="red" if event["kind"] in ("death", "nonfinite") else "yellow"))

    def tick(
        self, clocks: Sequence[int], *, waiting_for: Mapping[int, int] | None = None, evaluating: Collection[int] = ()
    ) -> None:
        """Draws once: `clocks` are steps by rank, `waiting_for` maps a rank to the rank it waits for."""
        self.board.tick(clocks, waiting_for or {}, evaluating)
        self.live.refresh()

    def render(self) -> RenderableType:
        board, rows = self.board, [self.board.rows[rank] for rank in sorted(self.board.rows)]
        if not rows:
            return Text("")
        shown = _worst(rows, self.console.height - 8)
        parts: list[RenderableType] = [self._bars(shown)]
        if len(shown) < len(rows):
            others = Counter(row.state.split(" for ")[0] for row in rows if row not in shown)
            states = ", ".join(f"{count} {state}" for state, count in others.items())
            parts.append(Text(f"   and {len(rows) - len(shown)} more: {states}", "dim"))
        saved = [f"checkpoint at step {count_text(board.checkpoint['t'])}"] if board.checkpoint else []
        parts.append(_packed("CENTER  ", board.center_facts(), self.console.width, "bold"))
        parts.append(_packed("", [*board.time_facts(), *board.rate_facts(), *saved], self.console.width, "dim"))
        return Group(*parts)

    def _bars(self, rows: Iterable[Row]) -> Table:
        steps = self.board.start.get("steps")
        gap = 1 if self.console.width < 100 else 2
        table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim", expand=True)
        for head in ("worker", "steps"):
            table.add_column(head, justify="right", no_wrap=True)
        table.add_column(f"of {count_text(steps)}" if steps else "", ratio=1)
        for head in ("worker loss", "samples/s", "waiting"):
            table.add_column(head, justify="right", no_wrap=True)
        table.add_column("state", min_width=20, no_wrap=True)
        for row in rows:
            color = "red" if row.state == "died" else "blue"
            bar: RenderableType = ""
            if steps:
                bar = ProgressBar(steps, row.t, style="bright_black", complete_style=color, finished_style=color)
            rate = "-" if row.samples_per_s is None else count_text(row.samples_per_s)
            waiting = "-" if row.waiting is None else f"{100 * row.waiting:.0f} %"
            state = Text(row.state, STYLES.get(row.state, "yellow"))
            table.add_row(str(row.rank), count_text(row.t), bar, _loss_cell(row.loss), rate, waiting, state)
        return table

    def __enter__(self) -> Screen:
        self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.live.refresh()
        self.live.stop()


class Lines:
    """Not a terminal: a plain line for each center evaluation and notable event, now and then one of progress."""

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self.console, self.board = console, Board(now)
        self.printed = now()

    def __call__(self, event: Event) -> None:
        self.board.observe(event)
        if event["kind"] == "start":
            self._print(self.board.heading())
        elif event["kind"] == "center":
            self._print("center " + ", ".join(self.board.center_facts()))
        elif line := notable(event):
            self._print(line)

    def tick(
        self, clocks: Sequence[int], *, waiting_for: Mapping[int, int] | None = None, evaluating: Collection[int] = ()
    ) -> None:
        """As `Screen.tick`; a line at most every ten seconds."""
        self.board.tick(clocks, waiting_for or {}, evaluating)
        if self.board.now() - self.printed >= LINE_EVERY_S:
            steps = _range([row.t for row in self.board.rows.values()], count_text, "workers at step")
            facts = ["evaluating the center"] if self.board.evaluating else self.board.time_facts()[1:]
            self._print(", ".join([steps, *self._losses(), *self.board.rate_facts(), *facts]))

    def _losses(self) -> list[str]:
        losses = [row.loss for row in self.board.rows.values() if row.alive and row.loss is not None]
        return [_range(losses, loss_text, "worker loss")] if losses else []

    def _print(self, line: str) -> None:
        self.printed = self.board.now()
        stamp = clock_text(self.printed - self.board.began)
        self.console.print(
            f"{stamp}  {' '.join(line.split())}", soft_wrap=True, markup=False, highlight=False, emoji=False
        )

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def open_view(to: Console | IO[str] | Unfailing) -> Screen | Lines:
    """The view for this console or file: a context manager and a listener; `tick` it 4 to 10 times a second."""
    console = to if isinstance(to, Console) else Console(file=cast("IO[str]", to))
    return Screen(console) if console.is_terminal and not console.is_dumb_terminal else Lines(console)


def notable(event: Event) -> str | None:
    """The sentence for an event that a person should not miss; None for the others."""
    who, step = f"worker {event.get('rank')}", f"at step {count_text(event['t'])}"
    match event["kind"]:
        case "death":
            return f"{who} died {step}: {event.get('cause') or 'cause not known'}"
        case "respawn":
            return f"{who} respawned {step}"
        case "warning":
            return f"warning: {event.get('message')}"
        case "nonfinite" if event.get("times", 1) == 1:  # the first of perhaps many
            return f"{who} had {count_text(event.get('count'))} values that are not finite {step}"
        case "checkpoint":
            return f"checkpoint {step}: {event.get('path')}"
        case "stop":
            return f"stopping {step}: {event.get('reason')}"
        case "end":
            return f"run {event.get('status')} {step} after {seconds_text(event['seconds'])} of training"
    return None


def summary_table(
    summary: dict[str, Any], folder: str | Path | None = None, go_on: str | None = None
) -> RenderableType:
    """The end of a run: its numbers, its workers, and where the picture and the rest lie; how to `go_on` with one that
    was interrupted."""
    numbers = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for what, value in summary_rows(summary):
        numbers.add_row(Text(what, "dim"), Text(value, "bold" if what.startswith("center") else ""))
    workers = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="dim")
    for head in (
        "worker",
        "state",
        "steps",
        "exchanges",
        "samples/s",
        "exchange\n(s)",
        "waiting\n(s)",
        "waited\nmost for",
    ):
        workers.add_column(head, justify="left" if head in ("state", "waited\nmost for") else "right")
    for *cells, waited, _ in worker_rows(summary):  # how stale a worker was is for the report
        workers.add_row(*map(Text, (*cells, waited.split(", ")[0])))
    parts: list[RenderableType] = [numbers, *([workers] if workers.row_count else [])]
    for failure in summary.get("failures") or []:
        parts.append(Text(str(notable({"kind": "death", "t": None, **failure})), "red"))
    parts += [Text(f"warning: {warning}", "yellow") for warning in summary.get("warnings") or []]
    if summary.get("center_sha256"):
        parts.append(Text(f"center_sha256 {summary['center_sha256']}", overflow="fold"))
    if folder is not None:
        if summary.get("status") == "interrupted":
            go_on = go_on or f"easgd-local train --resume {folder}"
            if not checkpoint.steps(Path(folder)):
                go_on = "nothing: it was stopped before there was a checkpoint"
            parts.append(Text(f"{'go on with':<11} {go_on}", overflow="fold"))
        parts.append(Text(f"curves      {Path(folder) / 'curves.png'}", overflow="fold"))
        parts.append(Text(f"run folder  {folder}", overflow="fold"))
    return Group(*parts)


def _loss_cell(loss: float | None) -> Text:
    sound = loss is None or math.isfinite(loss)
    return Text("-" if loss is None else loss_text(loss), "" if sound else "bold red")


def _worst(rows: list[Row], room: int) -> list[Row]:
    """As many rows as there is room for: the dead first, then those furthest behind; in order of rank."""
    if len(rows) <= room:
        return rows
    worst = sorted(rows, key=lambda row: (row.state != "died", row.t))[: max(1, room - 1)]
    return sorted(worst, key=lambda row: row.rank)


def _range(values: Sequence[float], text: Callable[[float], str], name: str) -> str:
    """ "step 90 to 100"; values that are not finite are counted apart."""
    sound = [value for value in values if math.isfinite(value)]
    words = " to ".join(dict.fromkeys(map(text, (min(sound), max(sound))))) if sound else ""
    rest = f"NaN in {len(values) - len(sound)} of {len(values)} workers" if len(sound) < len(values) else ""
    return f"{name} " + ", ".join(part for part in (words, rest) if part)


def _packed(label: str, facts: Iterable[str], width: int, style: str) -> Text:
    """The facts side by side, as many on a line as fit, none broken."""
    lines, indent = [label], " " * len(label)
    for number, fact in enumerate(facts):
        if number and len(lines[-1]) + 3 + len(fact) > width:
            lines.append(indent + fact)
        else:
            lines[-1] += ("   " if number else "") + fact
    return Text("\n".join(lines), style=style)
