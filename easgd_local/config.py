"""The configuration of a run: everything that the command line can say, validated when constructed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from easgd_local.center import BLOCK_BYTES
from easgd_local.faults import Fault
from easgd_local.learning_rate import LearningRate
from easgd_local.rules import rule_class
from easgd_local.rules.base import Rule, hints_of, make_plain

WORKERS = 4  # the paper's node
LR_DECAY = 0.1
MAX_STEPS = 10**12  # more than anybody makes, and turn numbers stay far below 2^62

# Fields that may differ between a run and its continuation: none of them changes what is computed up to the old end.
RESUMABLE = frozenset(
    {
        "steps", "epochs", "workers", "eval_every", "checkpoint_every", "keep", "on_failure", "out", "tensorboard",
        "exchange",
    }
)


def flag(default: Any, help: str) -> Any:
    """A field with the sentence that the command line shows for it."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to train, on what, by which rule, with how many workers.

    Steps, epochs and periods count in each worker's own clock: one step is one minibatch of one worker.
    Raises `ValueError` for values that cannot work; what depends on the data is checked by `train`.
    """

    rule: Rule = field(metadata={"help": "the algorithm"})
    workers: int | None = flag(None, f"number of worker processes p; default {WORKERS}, 1 for sequential rules")
    device: Literal["auto", "cpu", "cuda"] = flag(
        "auto", "where the workers compute: cuda is the machine's GPUs in turn, auto the CPU in this version"
    )
    data: str = flag("digits", "data set: digits, cifar10, imagefolder, synthetic")
    data_dir: str | None = flag(
        None, "folder of the data set (imagefolder: train/ and test/; cifar10: default ~/.cache/easgd_local/cifar10)"
    )
    image_size: int | None = flag(None, "imagefolder: side to which pictures are brought; default their own, else 256")
    memory_budget: float | None = flag(
        None,
        "imagefolder: GiB of memory for pictures, beyond which they are streamed; default a quarter of what is free",
    )
    model: str = flag("mlp", "mlp, cifar7, imagenet11, or any torchvision classifier by name")
    steps: int | None = flag(None, "steps of each worker; default 500 unless epochs is given")
    epochs: float | None = flag(None, "instead of steps: passes over the training set by all workers together")
    batch_size: int = flag(32, "samples per step and worker")
    weight_decay: float = flag(1e-4, "l2 coefficient λ")
    sampling: Literal["shard", "independent"] = flag(
        "shard", "shard: each sample once per epoch across workers; independent: every worker draws from the whole set"
    )
    seed: int = flag(0, "seed of the start, the order of samples, crops, flips and dropout")
    turns: Literal["strict", "free", "none", "together"] | None = flag(
        None,
        "order of visits to the center: strict is reproducible, free waits for no slow worker, none lets all write at "
        "once, together is the rendezvous of the synchronous rules; default the first that the rule is defined for",
    )
    schedule: Literal["constant", "step", "cosine", "sqrt"] = flag(
        "constant", "step size over each worker's own steps; sqrt is lr/√(t + 1)"
    )
    warmup: int = flag(0, "steps in which the step size grows from nothing to what the schedule says")
    lr_step: int | None = flag(None, "schedule step: steps from one decay to the next")
    lr_decay: float | None = flag(None, "schedule step: factor of each decay; default 0.1")
    precision: Literal["fp32", "bf16", "fp16", "bf16-true", "fp16-true"] = flag(
        "fp32", "precision of forward and backward by autocast, or with -true of all layers and their parameters, then "
        "x rounded; fp16 with a scaled loss; x, c and g stay float32"
    )
    compile: bool = flag(False, "compile the model by torch.compile: slow to start, rounded otherwise")
    tf32: bool = flag(False, "cuda: let matrix products and convolutions of float32 round their inputs to 10 bits")
    nondeterministic: bool = flag(
        False, "cuda: let torch choose the fastest algorithms, so that two runs may differ in the last bits"
    )
    exchange: Literal["auto", "overlap", "inline", "zerocopy"] = flag(
        "auto",
        "cuda: overlap carries blocks of the center to the GPU beside the gradient, inline before it, zerocopy works "
        "on them through the link; auto is zerocopy for small models and coherent links, else overlap",
    )
    channels_last: bool = flag(
        False,
        "pictures with the channels of each pixel together in memory: often faster in convolutions; rounded otherwise",
    )
    buffers: Literal["average", "recalibrate"] = flag(
        "average",
        "BatchNorm statistics of the center: exchanged like parameters, or computed anew on training samples",
    )
    block_bytes: int = flag(BLOCK_BYTES, "size of the center's blocks in bytes; small models have smaller ones")
    threads: int | None = flag(None, "threads of each worker; default cores / workers, 1 for small models")
    eval_every: int | None = flag(
        None, "steps between evaluations of the center; 0 only at the start and the end; default steps / 10"
    )
    eval_samples: int = flag(2000, "training samples used for the center's training loss")
    checkpoint_every: int = flag(0, "steps between checkpoints; 0 only when interrupted")
    keep: int = flag(3, "checkpoints to keep")
    out: str | None = flag(None, "run folder; default runs/<time>-<rule>")
    on_failure: Literal["continue", "respawn", "stop"] = flag("continue", "what to do when a worker dies")
    tensorboard: bool = flag(False, "also write the events for TensorBoard into the run folder")
    faults: tuple[Fault, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule):
            raise ValueError(
                f"rule={self.rule!r}: must be a rule with its hyperparameters, such as EASGD() or EASGD(tau=10)."
            )
        make_plain(self)
        if self.workers is None:
            object.__setattr__(self, "workers", 1 if self.rule.sequential else WORKERS)
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "steps", 500)
        if self.turns is None:
            object.__setattr__(self, "turns", self.rule.orders[0])
        self._check_counts()
        check_choices(self)
        self._check_schedule()
        if self.turns not in self.rule.orders:
            rendezvous = ", or use a synchronous rule such as easgd-sync" if self.turns == "together" else ""
            raise ValueError(
                f"turns={self.turns}: the rule {self.rule.name} is defined for turns={' or '.join(self.rule.orders)}; "
                f"leave turns out for {self.rule.orders[0]}{rendezvous}."
            )
        if self.rule.sequential and self.workers != 1:
            raise ValueError(
                f"workers={self.workers}: the rule {self.rule.name} is sequential; use workers=1, or the rule easgd."
            )
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps={self.steps} and epochs={self.epochs}: both fix the length of the run; give one.")
        assert self.workers is not None
        self.rule.derived(self.workers)  # says so where α would leave [0, 1]

    def _check_counts(self) -> None:
        least = {"workers": 1, "steps": 1, "batch_size": 1, "eval_samples": 1, "keep": 1, "threads": 1, "image_size": 8,
                 "block_bytes": 64,
                 "seed": 0, "warmup": 0, "lr_step": 1, "eval_every": 0, "checkpoint_every": 0}  # fmt: skip
        check_limits(self, least)
        if self.steps is not None and self.steps > MAX_STEPS:
            raise ValueError(f"steps={self.steps}: must be at most 10^12; choose a smaller value.")
        for name in ("epochs", "memory_budget"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value}: must be positive and finite; leave it out for the default.")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay={self.weight_decay}: must be at least 0 and finite; 0 switches it off.")

    def _check_schedule(self) -> None:
        for name in ("lr_step", "lr_decay"):
            value = getattr(self, name)
            if value is not None and self.schedule != "step":
                raise ValueError(
                    f"{name}={value}: belongs to the schedule step, but schedule={self.schedule}; leave it out, or use "
                    f"schedule=step."
                )
        if self.schedule == "step" and self.lr_step is None:
            raise ValueError("schedule=step: after how many steps the step size decays is missing; give lr_step.")
        if self.lr_decay is not None and not 0 < self.lr_decay <= 1:
            raise ValueError(f"lr_decay={self.lr_decay}: the factor of a decay must lie in (0, 1]; try 0.1.")

    def learning_rate(self, steps: int) -> LearningRate:
        """η as a function of the worker's clock, in a run of `steps` steps."""
        decay = LR_DECAY if self.lr_decay is None else self.lr_decay
        return LearningRate(self.schedule, self.rule.lr, steps, self.warmup, self.lr_step or 1, decay)

    def steps_over(self, samples: int) -> int:
        """The steps of each worker on a training set of so many samples."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        assert self.workers is not None
        needed = self.epochs * samples / (self.batch_size * self.workers)
        if needed > MAX_STEPS:
            raise ValueError(f"epochs={self.epochs}: that is more than 10^12 steps; choose a smaller value.")
        return math.ceil(needed)

    def to_json(self) -> dict[str, Any]:
        """A mapping that JSON can hold and `from_json` reads back."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        values["rule"] = {"name": self.rule.name} | asdict(self.rule)
        values["faults"] = [asdict(fault) for fault in self.faults]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Config:
        """The configuration that `to_json` described; `ValueError` if it does not describe one."""
        rule = dict(values["rule"])
        kind = rule_class(rule.pop("name"))
        try:
            made = {"rule": kind(**rule), "faults": tuple(Fault(**fault) for fault in values.get("faults", []))}
            return cls(**(values | made))
        except TypeError as error:
            raise ValueError(
                f"configuration of another version ({error}); train with the version that wrote it."
            ) from error


def _choices(hint: Any) -> tuple[str, ...]:
    """The words that a field with this annotation may hold; none for one that holds something else."""
    literal = next((one for one in (hint, *get_args(hint)) if get_origin(one) is Literal), None)
    return get_args(literal)


def choices_of(kind: type) -> dict[str, tuple[str, ...]]:
    """The fields of a configuration that hold one of some words, and these words."""
    return {name: choices for name, hint in hints_of(kind).items() if (choices := _choices(hint))}


CHOICES = choices_of(Config)


def check_choices(values: Any) -> None:
    """`ValueError` unless every such field holds one of its words, or None."""
    for name, choices in choices_of(type(values)).items():
        value = getattr(values, name)
        if value not in choices and value is not None:
            raise ValueError(f"{name}={value}: must be one of {', '.join(choices)}; choose one of them.")


def check_limits(values: Any, least: dict[str, int]) -> None:
    """`ValueError` unless the fields are at least so large, and those that every run has are not too large."""
    for name, limit in least.items():
        value = getattr(values, name)
        if value is not None and value < limit:
            raise ValueError(f"{name}={value}: must be at least {limit}; choose a larger value.")
    if values.workers is not None and values.workers > 64:
        raise ValueError(f"workers={values.workers}: one machine runs at most 64; start with one per GPU or core.")
    if values.threads is not None and values.threads > 1024:
        raise ValueError(f"threads={values.threads}: must be at most 1024; leave it out for cores / workers.")
    if values.seed >= 2**63:
        raise ValueError(f"seed={values.seed}: must be below 2^63; choose a smaller one.")


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The fields, and the rule's hyperparameters, in which `new` may not continue `old`: name -> (old, new)."""
    found: dict[str, tuple[Any, Any]] = {}
    before, after = old.to_json(), new.to_json()
    # A cosine ends with the run, so in a longer run it would have been another one from the start.
    fixed = {"steps", "epochs", *(["workers"] if old.epochs else [])}  # which say how long that is
    allowed = RESUMABLE - fixed if old.schedule == "cosine" else RESUMABLE
    for name in before:
        if name not in allowed | {"faults", "rule"} and before[name] != after[name]:
            found[name] = (before[name], after[name])
    for name in before["rule"] | after["rule"]:
        pair = before["rule"].get(name), after["rule"].get(name)
        if pair[0] != pair[1]:
            found["rule" if name == "name" else name] = pair
    return found


def refuse_change(name: str, old: Any, new: Any, run: Path) -> None:
    """`ValueError` unless the run to resume has the same value."""
    if old != new:
        began = f"without {name}" if old is None else f"with {name}={old}"
        remedy = f"name {old}" if name == "rule" else f"leave --{name.replace('_', '-')} out"
        raise ValueError(
            f"{name}={new}: the run in {run} was started {began}, and a resumed run stays what it was; {remedy}, or "
            f"start a new run."
        )
