"""The course of a rival's run: its processes watched, its evaluations written down, its folder as that of any run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn

from easgd_local import data, metrics, models, report
from easgd_local.compare import rival
from easgd_local.compare.rival import RivalPlan
from easgd_local.compare.rivals import Rival
from easgd_local.config import Config
from easgd_local.data import Dataset
from easgd_local.gpus import chosen
from easgd_local.graphics import Graphics, device_name
from easgd_local.launcher import Launcher, Message
from easgd_local.metrics import Metrics
from easgd_local.prepare import computing, load, thread_count
from easgd_local.runfolder import claim
from easgd_local.signals import signals
from easgd_local.whole_file import whole_file

POLL_S = 0.05


def train(config: Config, dataset: Dataset | None = None) -> dict[str, Any]:
    """Runs the rival `config.rule` and returns what its summary.json holds, as `training.train` does for a rule.

    When a process dies or the run is interrupted, all of them are ended. Raises `ValueError` with one sentence for
    more processes than GPUs, and where GPUs are missing.
    """
    graphics, warnings = chosen(config.device, config.exchange, config.workers or 1)
    if graphics is not None:
        check_seats(config.rule.name, config.workers or 1, graphics)
    dataset = dataset or load(config)
    fd, description = data.to_memfd(dataset)
    try:
        model = models.build(config.model, shape=dataset.input_shape, classes=len(dataset.classes))
        plan = _plan(config, dataset, graphics, thread_count(config, model, dataset.input_shape))
        known = {"threads": plan.threads, "device": device_name(graphics)}
        plan = replace(plan, folder=claim(config.out, config.rule.name, config.to_json(), known))
        with Metrics(plan.folder) as log, Launcher(plan.folder / "logs") as launcher:
            course = RivalRun(plan, launcher, log)
            with signals(course.interrupt):
                course.execute([] if fd is None else [fd], description)
    finally:
        if fd is not None:
            os.close(fd)
    summary = course.summary(config, model) | {"warnings": warnings}
    with whole_file(plan.folder / "summary.json") as part:
        part.write_text(json.dumps(metrics.finite(summary), indent=1) + "\n")
    report.write(plan.folder)
    return summary | {"folder": str(plan.folder)}


def check_seats(label: str, workers: int, graphics: Graphics) -> None:
    """`ValueError` unless each process has a GPU of its own, as NCCL demands."""
    gpus = len(graphics.names)
    if workers > gpus:
        raise ValueError(
            f"workers={workers}: {label} on {gpus} {'GPU' if gpus == 1 else 'GPUs'}: NCCL takes one process per GPU; "
            f"use at most {gpus}, or --device cpu."
        )


def _plan(config: Config, dataset: Dataset, graphics: Graphics | None, threads: int) -> RivalPlan:
    assert isinstance(config.rule, Rival)
    assert config.steps is not None
    assert config.workers is not None
    assert config.eval_every is not None
    return RivalPlan(
        rival=config.rule, learning_rate=config.learning_rate(config.steps), workers=config.workers,
        steps=config.steps, evaluate_every=config.eval_every, model=config.model, batch_size=config.batch_size,
        sampling=config.sampling, seed=config.seed, weight_decay=config.weight_decay,
        computing=computing(config, dataset, graphics), graphics=graphics, threads=threads,
        evaluation_samples=config.eval_samples, folder=Path(),
    )  # fmt: skip


class RivalRun:
    """One run; `execute` is called once, then `summary` says how it went."""

    def __init__(self, plan: RivalPlan, launcher: Launcher, log: Metrics) -> None:
        self._plan, self._launcher, self._log = plan, launcher, log
        self._scores: dict[str, float] = {}
        self._t, self._seconds = 0, 0.0
        self._finished: set[int] = set()
        self._failures: list[dict[str, Any]] = []
        self._interrupted = False

    def execute(self, fds: list[int], description: dict[str, Any]) -> None:
        """Until no process is left; the first that dies takes the others with it, as they would wait for it."""
        plan = self._plan
        self._event("start", rule=plan.rival.name, workers=plan.workers, model=plan.model, steps=plan.steps)
        children = [
            self._launcher.start(f"worker-{rank}", rival.main, fds, (rank, plan, description), rank)
            for rank in range(plan.workers)
        ]
        while not self._stops and not all("ready" in one.said for one in children):
            self._hear()
        for one in children:
            with contextlib.suppress(OSError):  # dead: its exit is about to be told
                one.conn.send("go")
        while self._launcher.alive and not self._stops:
            self._hear()
        (plan.folder / "meeting").unlink(missing_ok=True)
        self._event("end", status=self.status)

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Answers Ctrl-C: all the processes are ended."""
        self._interrupted = True

    @property
    def _stops(self) -> bool:
        return self._interrupted or bool(self._failures)

    def _hear(self) -> None:
        for one, message in self._launcher.poll(POLL_S):
            self._take(one.rank or 0, message)

    def _take(self, rank: int, message: Message) -> None:
        match message:
            case ("center", t, seconds, scores):
                self._t, self._seconds, self._scores = t, seconds, scores
                self._event("center", **scores)
            case ("finished", _, _):
                self._finished.add(rank)
            case ("exit", cause) if cause:
                self._failures.append({"rank": rank, "t": self._t, "cause": cause})
                self._event("death", rank=rank, cause=cause)

    def _event(self, kind: str, **values: Any) -> None:
        self._log.write(kind, t=self._t, seconds=self._seconds, **values)

    @property
    def status(self) -> str:
        """done, interrupted, or failed: a process died, or the loss is not finite."""
        ended = len(self._finished) == self._plan.workers
        if self._interrupted and not ended:
            return "interrupted"
        return "done" if ended and math.isfinite(self._scores["train_loss"]) else "failed"

    def summary(self, config: Config, model: nn.Module) -> dict[str, Any]:
        """What summary.json holds; how long the processes averaged and waited cannot be told apart from outside."""
        plan, seconds = self._plan, self._seconds
        samples = self._t * plan.batch_size * plan.workers
        center = plan.folder / "center.safetensors"
        return {
            "status": self.status, "interrupts": int(self._interrupted), "rule": plan.rival.name,
            "model": config.model, "data": config.data, "workers": plan.workers, "steps": self._t,
            "exchanges": plan.workers * plan.rival.meetings(self._t),
            "seconds": seconds, "samples": samples, "samples_per_s": samples / seconds if seconds else None,
            "wait_s": None, "exchange_s": None, **self._scores, "scores": self._scores,
            "center_sha256": hashlib.sha256(center.read_bytes()).hexdigest() if center.exists() else None,
            "parameters": sum(one.numel() for one in model.parameters()),
            "failures": self._failures,
        }  # fmt: skip
