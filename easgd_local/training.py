"""A run of the built-in training loop: built-in data and models, the center evaluated by a process of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from easgd_local import evaluate, worker
from easgd_local.config import Config
from easgd_local.data import Dataset
from easgd_local.fork_server import warm_up
from easgd_local.launcher import Child, Launcher
from easgd_local.metrics import Listener
from easgd_local.plan import Start
from easgd_local.prepare import Prepared, prepare
from easgd_local.run import Run


def train(
    config: Config,
    *,
    resume: str | Path | None = None,
    listeners: Sequence[Listener] = (),
    dataset: Dataset | None = None,
) -> dict[str, Any]:
    """Trains as the command line does; returns what summary.json holds, and the run folder under "folder".

    `resume` names the folder of a run to continue. `listeners` are called with every event of metrics.jsonl.
    `dataset` is what `prepare.load(config)` gives, for a caller of many runs that loads it once.
    Raises `ValueError` or `MemoryError` for a configuration that cannot work, before anything is started.
    """
    if not isinstance(config, Config):
        raise ValueError(f"config={config!r}: must be a configuration; write easgd.train(easgd.Config(rule=...)).")
    warm_up()
    with prepare(config, None if resume is None else Path(resume), dataset) as prepared:
        return Training(prepared, listeners).execute()


class Training(Run):
    """The course of a run of the built-in loop; `execute` is called once."""

    _prepared: Prepared

    def __init__(self, prepared: Prepared, listeners: Sequence[Listener] = ()) -> None:
        super().__init__(prepared, listeners)
        self._evaluating: Child | None = None

    def _processes(self) -> contextlib.AbstractContextManager[Launcher]:
        return Launcher(self._folder / "logs")

    def _described(self) -> dict[str, Any]:
        config = self._prepared.config
        rates = {"lr": config.rule.lr, "momentum": getattr(config.rule, "momentum", None)}
        return {"model": config.model, "data": config.data, "steps": self._calendar.steps, **rates}

    def _start_worker(self, rank: int, start: Start) -> None:
        plan = self._prepared.plan
        plan = replace(plan, faults=()) if start.joins else plan  # a fault strikes once
        arguments = (rank, plan, self._prepared.description, start)
        self._workers[rank] = self._launcher.start(f"worker-{rank}", worker.main, self._prepared.fds, arguments, rank)

    @property
    def _evaluator(self) -> Child | None:
        return self._evaluating

    def _start_evaluator(self) -> None:
        arguments = (self._prepared.plan, self._prepared.description)
        self._evaluating = self._launcher.start("evaluator", evaluate.main, self._prepared.fds, arguments)

    def _end_evaluation(self) -> None:
        if self._evaluating:
            self._launcher.kill(self._evaluating)

    def _evaluator_exited(self, cause: str | None) -> None:
        self._evaluating = None
        self._evaluations.snapshot_taken()
        self._evaluations.forget()
        if cause and self._stop_t < 0:
            self._chronicle.warn(
                f"the evaluator died ({cause}): no evaluation from here on; see {self._folder}/logs/evaluator.log."
            )

    def _finish(self) -> None:
        self._clock.stop()
        self._center.take_whole_snapshot()
        self._save_stopped()
        steps = self._calendar.steps
        if self._stop_t < 0 and self._finished() and self._calendar.checkpoint_every:
            self._assembly.add_center(steps, self._center.state())
        self._finish_checkpoints()
        if self._finished():
            self._evaluate_now(self._calendar.rounds_before(steps) - 1, steps)

    def center_state(self) -> dict[str, Tensor]:
        flat = self._prepared.flat
        return flat.state_dict(self._result(flat.buffers))
