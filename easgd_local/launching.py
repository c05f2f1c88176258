"""`launch`: a training loop of the user's own, in worker processes around one center."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from easgd_local import checkpoint, child, hardware, hosted
from easgd_local.attachment import Proposal
from easgd_local.center import Center, Layout
from easgd_local.centers import CenterState
from easgd_local.config import MAX_STEPS, WORKERS, check_choices, check_limits
from easgd_local.faults import Fault
from easgd_local.fork_server import warm_up
from easgd_local.gathering import fill, gather
from easgd_local.gpus import chosen, exchanging
from easgd_local.graphics import Graphics, effective
from easgd_local.launcher import Child, Launcher
from easgd_local.looprun import Gathered, LoopRun
from easgd_local.metrics import Listener
from easgd_local.outset import check_room, restore, set_turns, shared_names
from easgd_local.plan import Plan, Start
from easgd_local.rules.base import make_plain
from easgd_local.runfolder import claim, lock, saved_values, write_config
from easgd_local.schedules import Calendar
from easgd_local.signals import signals
from easgd_local.unfailing import Unfailing
from easgd_local.view import Lines, Screen, open_view, summary_table

REPORT_EVERY = 10  # steps; slow workers report at least every two seconds
FIXED = ("seed", "threads", "rule", "turns", "buffers", "optimizer_state", "block_bytes", "dtype")  # in a resumed run


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """What `launch` and `join` are told, validated when constructed; the rule is part of what the workers attach."""

    fn: str
    workers: int = WORKERS
    device: Literal["auto", "cpu", "cuda"] = "auto"
    exchange: Literal["auto", "overlap", "inline", "zerocopy"] = "auto"
    out: str | None = None
    seed: int = 0
    threads: int | None = None
    checkpoint_every: int = 0
    keep: int = 3
    on_failure: Literal["continue", "respawn", "stop"] = "continue"
    tensorboard: bool = False
    faults: tuple[Fault, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        make_plain(self)
        check_limits(self, {"workers": 1, "seed": 0, "threads": 1, "checkpoint_every": 0, "keep": 1})
        check_choices(self)

    def to_json(self) -> dict[str, Any]:
        """A mapping that JSON can hold."""
        return asdict(self)

    @property
    def thread_count(self) -> int:
        """Threads of each worker."""
        return self.threads or max(1, hardware.cores() // self.workers)


@dataclass(frozen=True)
class Agreed:
    """The configuration of a run whose workers have attached."""

    config: LaunchConfig
    terms: dict[str, Any]

    @property
    def keep(self) -> int:
        return self.config.keep

    @property
    def on_failure(self) -> str:
        return self.config.on_failure

    @property
    def tensorboard(self) -> bool:
        return self.config.tensorboard

    def to_json(self) -> dict[str, Any]:
        """A mapping that JSON can hold."""
        return self.terms | self.config.to_json()


def launch(
    fn: Callable[..., object], *, workers: int = WORKERS, args: tuple[Any, ...] = (), device: str = "auto",
    exchange: str = "auto", out: str | Path | None = None, resume: str | Path | None = None, seed: int = 0,
    threads: int | None = None, checkpoint_every: int = 0, keep: int = 3, on_failure: str = "continue",
    tensorboard: bool = False, view: bool = True, listeners: Sequence[Listener] = (), faults: tuple[Fault, ...] = (),
) -> CenterState:  # fmt: skip
    """Runs `fn(worker, *args)` in `workers` processes around one center; returns the center's state dict.

    fn: a function at the top level of a module or script; in it `worker.attach(model, optimizer, rule)` is all that a
    training loop needs (see `LoopWorker`). Scripts call `launch` under `if __name__ == "__main__":`.
    args: a tuple handed on to fn; must be picklable.
    device: "cpu" or "cuda": workers compute on the GPUs of the machine in turn, several on one if need be; "auto" is
    the CPU. On a GPU the loop's work belongs on torch's default stream.
    exchange: how a GPU reaches the center, "overlap", "inline" or "zerocopy"; "auto" is what suits the model.
    out: the run folder, default runs/<time>-<script>; there are metrics.jsonl, summary.json, report.md, curves.png,
    center.safetensors and what the workers print, in logs/. The result's attribute `folder` names it.
    resume: the folder of an interrupted run, or one whose loop is to be longer now, to go on with: `attach` then
    restores model, optimizers, generators, samplers and clock from its last checkpoint. Checkpoints are pickles: resume
    only what you trust.
    seed: of the workers' generators and samplers.
    threads: of each worker, default cores / workers.
    checkpoint_every: steps between checkpoints, of which the last `keep` stay; 0 for only when interrupted (Ctrl-C).
    on_failure: what happens when a worker dies: the others "continue", it is replaced ("respawn"), or all "stop".
    tensorboard: also write the events for TensorBoard.
    view: show the run on stderr.
    listeners: called with every event of metrics.jsonl.
    faults: to try out what happens when workers fail, see easgd_local.faults.

    Raises `ValueError` or `MemoryError` for what cannot work, `RuntimeError` when no worker came to its end,
    `KeyboardInterrupt`, with the attribute `folder`, after an interrupted run is saved. No process and no memory is
    left in any case.
    """
    if child.inside:
        raise ValueError(
            'launch: called in a worker; a script launches under `if __name__ == "__main__":`, since its workers '
            "import it, and a training function does not launch."
        )
    if out is not None and resume is not None:
        raise ValueError(f"out={out} and resume={resume}: a resumed run stays in its folder; leave out away.")
    job = hosted.job_of(fn, args)
    options: dict[str, Any] = {"on_failure": on_failure, "device": device, "exchange": exchange}
    config = LaunchConfig(
        fn=job.name, workers=workers, seed=seed, threads=threads, checkpoint_every=checkpoint_every, keep=keep,
        tensorboard=tensorboard, faults=faults, out=None if out is None else str(out), **options,
    )  # fmt: skip
    run = None if resume is None else Path(resume)
    warm_up("easgd_local.preload_loop")
    graphics, said = chosen(config.device, config.exchange, config.workers)
    with contextlib.ExitStack() as ends:
        with signals(signal.default_int_handler):  # SIGTERM is a Ctrl-C, so that nothing is left behind
            folder = ends.enter_context(run_folder(config, job.label, run))
            launcher = ends.enter_context(Launcher(folder / "logs"))
            start = partial(_start, launcher, job, config, graphics)
            children = [start(rank) for rank in range(config.workers)]
            gathered = ends.enter_context(prepare(config, folder, run, launcher, children, start, graphics, said))
        live = view_of(view)
        outcome = conduct(LoopRun(gathered, launcher, [*([live] if live else []), *listeners]), live)
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _start(
    launcher: Launcher, job: hosted.Job, config: LaunchConfig, graphics: Graphics | None, rank: int
) -> Child:  # fmt: skip
    arguments = (rank, config.workers, job, config.seed, config.thread_count, graphics)
    return launcher.start(f"worker-{rank}", hosted.main, [], arguments, rank)


@contextlib.contextmanager
def run_folder(config: LaunchConfig, label: str, resume: Path | None) -> Iterator[Path]:
    """The run folder, locked; a new one is removed again if the run does not come to its start."""
    with contextlib.ExitStack() as undo:
        if resume is not None:
            lock(resume, undo)
            yield resume
            return
        folder = claim(config.out, label, config.to_json(), {})
        lock(folder, undo)
        try:
            yield folder
        except BaseException:
            if not (folder / "metrics.jsonl").exists():
                shutil.rmtree(folder)
                with contextlib.suppress(OSError):  # other runs are there
                    if config.out is None:
                        folder.parent.rmdir()
            raise


@contextlib.contextmanager
def prepare(
    config: LaunchConfig, folder: Path, resume: Path | None, launcher: Launcher, children: list[Child],
    start_again: Callable[[int], Child], graphics: Graphics | None = None, said: Sequence[str] = (),
) -> Iterator[Gathered]:  # fmt: skip
    """Waits until all workers have attached, creates the center, fills it; frees it in the end."""
    found = None if resume is None else checkpoint.newest(resume)
    proposal = gather(launcher, children)[0]
    agreed, plan = Agreed(config, _terms(proposal)), _plan(config, proposal, folder)
    own_vectors = len(proposal.own_vectors)
    plan = replace(plan, graphics=exchanging(graphics, config.exchange, plan, own_vectors))
    if found is not None:
        _check_same(found[1].config, agreed.to_json(), folder)
        _check_same(saved_values(folder), agreed.to_json(), folder)
    check_room(plan, 0 if graphics else own_vectors)
    warnings = [*said, *plan.rule.warnings(config.workers, turns=plan.turns)]
    with Center.create(plan.layout) as center:
        t, seconds, evaluate_s = proposal.t, 0.0, 0.0
        starts = {rank: Start(t) for rank in range(config.workers)}
        if found is not None:
            path, manifest = found
            t, seconds, evaluate_s = manifest.t, manifest.seconds, manifest.evaluate_s
            starts = restore(center, plan, manifest, path, warnings)
        set_turns(center, plan.calendar.rounds_before(t))
        filler = children[0] if found is None else None  # a restored center has its values
        if filler is not None:
            fill(launcher, filler, center, plan, starts[0])
        write_config(folder, agreed.to_json(), _effective(plan))
        yield Gathered(
            agreed, plan, center, proposal, starts, t, seconds, evaluate_s, warnings, children, filler, start_again
        )  # fmt: skip


def conduct(run: LoopRun, live: Screen | Lines | None, how: str = "launch") -> CenterState | BaseException:
    """The run from its start to its end: the center, or what ended it."""
    with live or contextlib.nullcontext():
        summary = run.execute()
    folder = Path(summary["folder"])
    if run.error is not None:
        return run.error
    if live is not None:
        live.console.print(summary_table(summary, folder, f'easgd_local.{how}(..., resume="{folder}")'))
    if summary["status"] == "interrupted":
        error = KeyboardInterrupt(f"interrupted; go on with resume={str(folder)!r}")
        error.folder = folder  # type: ignore[attr-defined]
        return error
    if summary["status"] != "done":
        return RuntimeError(f"the run failed: {run.reason}; see {folder}/report.md.")
    return CenterState(run.center_state(), folder, summary)


def view_of(wanted: bool) -> Screen | Lines | None:
    """The view on stderr, if it is wanted."""
    return open_view(Unfailing(sys.stderr)) if wanted else None


def _terms(proposal: Proposal) -> dict[str, Any]:
    """What the workers agreed on, for config.json."""
    names = ("turns", "buffers", "optimizer_state", "evaluate_every", "block_bytes", "model")
    terms = {n: getattr(proposal, n) for n in names} | {"dtype": proposal.dtype}
    return {"rule": {"name": proposal.rule.name} | asdict(proposal.rule)} | terms


def _plan(config: LaunchConfig, proposal: Proposal, folder: Path) -> Plan:
    rule = proposal.rule
    return Plan(
        rule=rule,
        calendar=Calendar(
            rule.period, MAX_STEPS, proposal.evaluate_every, config.checkpoint_every, ahead=int(rule.replaces)
        ),
        layout=Layout(config.workers, proposal.n, shared_names(rule, config.workers), proposal.block_bytes),
        turns=proposal.turns,
        buffers=proposal.buffers,
        threads=config.thread_count,
        seed=config.seed,
        folder=folder,
        report_every=REPORT_EVERY,
        faults=config.faults,
    )


def _effective(plan: Plan) -> dict[str, Any]:
    """What the configuration leaves open, as it was decided."""
    return {"threads": plan.threads, **effective(plan.graphics), **plan.rule.derived(plan.layout.workers)}


def _check_same(before: dict[str, Any], now: dict[str, Any], run: Path) -> None:
    """`ValueError` if the run to resume was another one."""
    for name in FIXED:
        old, new = before.get(name), now.get(name)
        if old != new:
            raise ValueError(
                f"{name}={new}: the run in {run} was started with {name}={old}, and a resumed run stays what it was; "
                f"give it as it was, or start a new run."
            )
