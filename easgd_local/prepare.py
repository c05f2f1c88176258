"""From a configuration to everything a run needs, checked before a process starts or a folder appears."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from easgd_local import checkpoint, checks, data, hardware, models
from easgd_local.center import Center, Layout
from easgd_local.computing import Computing
from easgd_local.config import Config
from easgd_local.curvature import start_curvature
from easgd_local.data import Dataset, MemorySplit
from easgd_local.flat import Flat
from easgd_local.gpus import chosen, exchanging
from easgd_local.graphics import Graphics, effective
from easgd_local.outset import check_room, copy_center, restore, set_turns, shared_names
from easgd_local.partition import share_out
from easgd_local.plan import Start
from easgd_local.rules.elastic import Elastic
from easgd_local.runfolder import claim, lock, write_config
from easgd_local.schedules import Calendar
from easgd_local.worker import TrainingPlan

CURVE_POINTS = 10  # evaluations of a run that does not say how often
REPORTS = 100  # of each worker
SHARE_FOR_PICTURES = 0.25  # of a GPU's free memory


@dataclass
class Prepared:
    """A run that is ready to start. A context manager that frees the shared memory.

    `starts` says by rank where each worker takes up.
    """

    config: Config
    plan: TrainingPlan
    flat: Flat
    center: Center
    data_fd: int | None
    description: dict[str, Any]
    starts: dict[int, Start]
    t: int
    seconds: float
    evaluate_s: float
    warnings: list[str]
    lock_fd: int

    @property
    def model(self) -> str:
        return self.plan.model

    @property
    def data(self) -> str:
        return self.config.data

    @property
    def parameters(self) -> int:
        return self.flat.parameters

    @property
    def own_vectors(self) -> tuple[str, ...]:
        """Names of the vectors of n floats at each worker."""
        return own_vectors(self.plan)

    @property
    def fds(self) -> list[int]:
        """The descriptors that every child receives: the center's, and the data set's unless that is streamed."""
        return [self.center.fd] + ([] if self.data_fd is None else [self.data_fd])

    def __enter__(self) -> Prepared:
        return self

    def __exit__(self, *exc: object) -> None:
        self.center.close()
        for fd in (self.data_fd, self.lock_fd):
            if fd is not None:
                os.close(fd)


def prepare(config: Config, resume: Path | None = None, dataset: Dataset | None = None) -> Prepared:
    """Loads the data, builds the model and the center, and claims the run folder last.

    With `resume`, a run folder, the center and the workers' states come from its newest checkpoint and `config` must
    agree with that run's; its config.json then says what holds from here on. Raises `ValueError` or `MemoryError` with
    one sentence; nothing is left behind then.
    """
    checks.gpu_flags(config)
    graphics, said = chosen(config.device, config.exchange, config.workers or 1, evaluator=True)
    checks.tensorboard(config)
    with contextlib.ExitStack() as undo:
        lock_fd = -1 if resume is None else lock(resume, undo)  # first: a run in progress moves its checkpoints
        manifest = None if resume is None else checks.newest_checkpoint(config, resume)
        dataset = dataset or load(config)
        steps = config.steps_over(len(dataset.train))
        if resume is not None and manifest is not None:
            checks.work_left(config, steps, manifest.t, resume)
        checks.samples(config, dataset)
        flat = Flat(_model(config, dataset))
        if config.rule.divides:
            share_out(flat.layers, config.workers or 1)  # says if there are too few
        plan = _plan(config, dataset, flat, steps, graphics)
        plan = replace(plan, graphics=exchanging(graphics, config.exchange, plan, _needed_vectors(plan)))
        curvature = _curvature(plan, flat.model, dataset)
        warnings = [*checks.rule_warnings(config, curvature), *said, *checks.length_warnings(config, steps)]
        check_room(plan, 0 if graphics else _needed_vectors(plan))
        center = undo.enter_context(Center.create(plan.layout))
        data_fd, description = data.to_memfd(dataset)
        if data_fd is not None:
            undo.callback(os.close, data_fd)
        if manifest is None or resume is None:
            _start(center, plan, flat)
            starts, t, seconds = {rank: Start() for rank in range(plan.layout.workers)}, 0, 0.0
            evaluate_s = 0.0
            plan = replace(
                plan, folder=claim(config.out, config.rule.name, config.to_json(), _effective(plan, dataset, curvature))
            )
            lock_fd = lock(plan.folder, undo)
        else:
            starts = restore(center, plan, manifest, checkpoint.steps(resume)[-1], warnings)
            t, seconds, evaluate_s = manifest.t, manifest.seconds, manifest.evaluate_s
            plan = replace(plan, folder=resume)
            write_config(resume, config.to_json(), _effective(plan, dataset, curvature))
        set_turns(center, plan.calendar.rounds_before(t))
        undo.pop_all()
    return Prepared(
        config, plan, flat, center, data_fd, description, starts, t, seconds, evaluate_s, warnings, lock_fd
    )


def load(config: Config) -> Dataset:
    """The data set of a configuration; `ValueError` if its folder cannot be read."""
    budget = None if config.memory_budget is None else int(config.memory_budget * 2**30)
    try:
        return data.load(
            config.data, config.data_dir, memory_budget_bytes=budget, size=config.image_size, seed=config.seed
        )
    except OSError as error:
        raise ValueError(
            f"data_dir={config.data_dir}: cannot be read ({error.strerror}: {error.filename}); give a folder that you "
            f"may read."
        ) from error


def thread_count(config: Config, model: nn.Module, shape: models.Shape) -> int:
    """Of each worker: as configured, else those that its share of the cores and the size of a step are worth."""
    assert config.workers is not None
    share = hardware.cores() // config.workers
    return config.threads or models.worth_threads(model, shape, config.batch_size, share)


def _model(config: Config, dataset: Dataset) -> nn.Module:
    torch.manual_seed(config.seed)
    shape = dataset.input_shape
    try:
        model = models.build(config.model, shape=shape, classes=len(dataset.classes))
        models.check(model, shape)
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        raise MemoryError(
            f"model={config.model}: there is no memory for one on pictures of {shape}; choose a smaller model or "
            f"smaller pictures, or free some memory."
        ) from error
    return model


def computing(config: Config, dataset: Dataset, graphics: Graphics | None) -> Computing:
    """How each worker's model computes; with these GPUs, or on the CPU without any."""
    return Computing(
        config.precision, config.channels_last, "cuda" if graphics and not graphics.pretended else "cpu",
        config.compile, not config.nondeterministic, config.tf32,
        _fits_on_device(dataset, graphics, config.workers or 1),
    )  # fmt: skip


def _fits_on_device(dataset: Dataset, graphics: Graphics | None, workers: int) -> bool:
    """Whether every worker may have the training pictures on its GPU."""
    if graphics is None or not isinstance(dataset.train, MemorySplit):
        return False
    sharers = -(-workers // len(graphics.names))
    return sharers * dataset.train.images.nbytes <= SHARE_FOR_PICTURES * min(graphics.free_bytes)


def own_vectors(plan: TrainingPlan) -> tuple[str, ...]:
    """Names of the vectors of n floats at each worker: x, g and what the rule declares. `halves` are parameters and
    gradients of 2 bytes each, as much together as one of floats."""
    halves = () if plan.computing.parameter_type == torch.float32 else ("halves",)
    return ("x", "g", *halves, *plan.rule.local, *plan.rule.scratch)


def _needed_vectors(plan: TrainingPlan) -> int:
    """How many vectors of n floats each worker needs room for: its own, and what torch's optimizers use in passing."""
    return len(own_vectors(plan)) + (3 if plan.rule.optimizer and plan.graphics else 0)


def _plan(config: Config, dataset: Dataset, flat: Flat, steps: int, graphics: Graphics | None) -> TrainingPlan:
    """What the processes must agree on, but the run folder, which is claimed last."""
    assert config.workers is not None
    assert config.turns is not None
    evaluate_every = max(1, steps // CURVE_POINTS) if config.eval_every is None else config.eval_every
    return TrainingPlan(
        rule=config.rule,
        learning_rate=config.learning_rate(steps),
        calendar=Calendar(config.rule.period, steps, evaluate_every, config.checkpoint_every),
        layout=Layout(config.workers, flat.n, shared_names(config.rule, config.workers), config.block_bytes),
        model=config.model,
        shape=dataset.input_shape,
        classes=len(dataset.classes),
        batch_size=config.batch_size,
        sampling=config.sampling,
        seed=config.seed,
        weight_decay=config.weight_decay,
        turns=config.turns,
        computing=computing(config, dataset, graphics),
        graphics=graphics,
        buffers=config.buffers,
        threads=thread_count(config, flat.model, dataset.input_shape),
        folder=Path(),
        report_every=max(1, steps // REPORTS),
        evaluation_samples=config.eval_samples,
        faults=config.faults,
    )


def _curvature(plan: TrainingPlan, model: nn.Module, dataset: Dataset) -> float | None:
    """An estimate of the largest h at the start, for the rules whose bounds ask for it and where it is cheap."""
    if not isinstance(plan.rule, Elastic):
        return None
    return start_curvature(model, dataset, plan.sampler(0, len(dataset.train)), plan.weight_decay)


def _effective(plan: TrainingPlan, dataset: Dataset, curvature: float | None) -> dict[str, Any]:
    """What the configuration leaves open, as it was decided or estimated."""
    calendar = plan.calendar
    return {
        "steps": calendar.steps,
        "eval_every": calendar.evaluate_every,
        "threads": plan.threads,
        **effective(plan.graphics),
        "input_shape": dataset.input_shape,
        "scale": dataset.scale,
        "classes": len(dataset.classes),
        "lr": plan.learning_rate.lr,
        "schedule": plan.learning_rate.shape,
        **plan.rule.derived(plan.layout.workers),
        **({"curvature": curvature} if isinstance(plan.rule, Elastic) else {}),
    }


def _start(center: Center, plan: TrainingPlan, flat: Flat) -> None:
    """The center at step 0: c as the model starts, the vectors that the rule says as copies of it, zeros."""
    center.vectors["c"][:] = flat.values()
    rule, workers = plan.rule, plan.layout.workers
    copy_center(center, [name for name in rule.shared if name in rule.copies])
    copy_center(center, [f"{name}{i}" for name in rule.allotted if name in rule.copies for i in range(workers)])
