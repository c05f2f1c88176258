"""What the papers ran, as comparisons that `easgd-local compare` could make: EASGD (Zhang, Choromanska, LeCun 2015,
arXiv:1412.6651), PASSM+ and APAM.

Entries are written as on the command line. The EASGD paper has grids of step sizes; here three are tried, a factor of
√10 apart, and the step size of an entry is the middle one. As our runs are shorter it is the largest of the paper's
grid (EAMSGD, and DOWNPOUR at long periods) or √10 times that (the others). Momentum is the paper's 0.99.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from easgd_local.compare.entries import parse
from easgd_local.compare.settings import Comparison

EASGD, EAMSGD = "easgd tau={tau} lr=0.158", "eamsgd tau={tau} lr=0.00949 momentum=0.99"
DOWNPOURS = ("downpour", "adownpour", "mvadownpour")
MDOWNPOUR = "mdownpour lr=0.000158 momentum=0.99"
MSGD = "msgd lr=0.00316 momentum=0.99"
SEQUENTIAL = ("sgd lr=0.158", MSGD, "asgd lr=0.158", "mvasgd lr=0.158")


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot of a figure: its title, and the entries in it."""

    title: str
    entries: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The entries' names in records."""
        return tuple(one.label for one in parse(self.entries))


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """`steps` of each worker at scale 1, with the flags of `compare` in `common`; `source` says what it repeats.

    The EASGD paper draws its curves against hours and does not say how many steps they are: these lengths are ours.
    """

    name: str
    source: str
    steps: int
    panels: tuple[Panel, ...]
    common: dict[str, Any] = field(default_factory=dict)
    target_error: float = 0.4
    tune: tuple[str, ...] = ()
    against: str = "t"  # what the curves are drawn against: worker steps t, or samples
    told: tuple[str, ...] = ()  # hyperparameters that a legend names
    epochs: float | None = None  # instead of steps, so that entries of unlike p see as many samples

    @property
    def entries(self) -> tuple[str, ...]:
        """Of all panels, each once."""
        return tuple(dict.fromkeys(entry for panel in self.panels for entry in panel.entries))

    @property
    def labels(self) -> tuple[str, ...]:
        """The entries' names in records."""
        return tuple(one.label for one in parse(self.entries))

    def comparison(self, *, scale: float, seeds: int, **flags: Any) -> Comparison:
        """At this fraction of the steps; `flags` are those of `compare`, and beat the experiment's own."""
        if not 0 < scale <= 1:
            raise ValueError(f"scale={scale}: the fraction of the full length must lie in (0, 1]; try 0.01.")
        steps = {"steps": max(1, round(scale * self.steps))}
        length = steps if self.epochs is None else {"epochs": scale * self.epochs}
        own = {name: flags.pop(name) for name in ("tune", "tune_lrs", "tune_cost") if name in flags}
        return Comparison(
            entries=parse(self.entries), common=self.common | length | flags, target_error=self.target_error,
            seeds=seeds, **({"tune": self.tune, "tune_lrs": 3} | own),
        )  # fmt: skip


def _downpours(tau: int) -> tuple[str, ...]:
    lr = 0.0158 if tau < 16 else 0.005
    return tuple(f"{name} tau={tau} lr={lr}" for name in DOWNPOURS)


def _periods() -> tuple[Panel, ...]:
    """τ = 1, 4, 16, 64. MDOWNPOUR is defined for τ = 1, MSGD knows no τ and is in all panels."""
    return tuple(
        Panel(
            title=f"τ = {tau}",
            entries=(
                EASGD.format(tau=tau), EAMSGD.format(tau=tau), *_downpours(tau),
                *((MDOWNPOUR,) if tau == 1 else ()), MSGD,
            ),
        )
        for tau in (1, 4, 16, 64)
    )  # fmt: skip


def _workers(*counts: int) -> tuple[Panel, ...]:
    """τ = 10 for the elastic rules, 1 for DOWNPOUR and MDOWNPOUR; one worker in all panels."""
    parallel = (EASGD.format(tau=10), EAMSGD.format(tau=10), *_downpours(1), MDOWNPOUR)
    return tuple(
        Panel(title=f"p = {p}", entries=(*(f"{one} workers={p}" for one in parallel), *SEQUENTIAL)) for p in counts
    )


CIFAR = {"data": "cifar10", "model": "cifar7", "batch_size": 128, "weight_decay": 1e-4, "sampling": "independent"}
# Crops of 222 x 222, as they are even here; the network is the same as with the paper's 221.
IMAGENET = {"data": "imagefolder", "model": "imagenet11", "batch_size": 128, "weight_decay": 1e-5,
            "image_size": 254, "sampling": "independent"}  # fmt: skip
TUNED = ("lr",)

EXPERIMENTS = {
    one.name: one
    for one in (
        Experiment(
            name="cifar-tau", source="EASGD, figure 2: the period τ, p = 4, CIFAR-10", steps=50_000,
            panels=_periods(), common=CIFAR | {"workers": 4}, tune=TUNED,
        ),
        Experiment(
            name="cifar-p", source="EASGD, figure 3: the number of workers p, CIFAR-10", steps=50_000,
            panels=_workers(4, 8, 16), common=CIFAR, tune=TUNED,
        ),
        Experiment(
            name="imagenet-p", source="EASGD, figure 4: the number of workers p, ImageNet", steps=400_000,
            panels=_workers(4, 8), common=IMAGENET, tune=TUNED,
        ),
        Experiment(
            name="passm", source="PASSM+ against its synchronous counterpart", steps=0, epochs=100, against="samples",
            panels=(Panel(title="p = 4", entries=("passm+ lr=0.01", "passm lr=0.01", "ddp lr=0.01")),),
            common=CIFAR | {"workers": 4, "sampling": "shard"}, tune=TUNED,
        ),
        Experiment(
            name="apam", source="APAM: accuracy and speed by the number of workers, against synchronous AMSGrad",
            steps=0, epochs=100, against="samples", told=("workers",),
            panels=(
                Panel(title="APAM", entries=tuple(f"apam workers={p} lr=0.0005" for p in (1, 2, 5, 10, 20))),
                Panel(
                    title="synchronous AMSGrad",
                    entries=tuple(f"ddp optimizer=amsgrad workers={p} lr=0.0005" for p in (1, 2, 5, 10, 20)),
                ),
            ),
            common=CIFAR | {"batch_size": 32, "sampling": "shard"},
        ),
        Experiment(
            name="apam-delay", source="APAM: gradients taken D steps back", steps=0, epochs=100, against="samples",
            told=("delay",),
            panels=(
                Panel(
                    title="D steps of each worker back",
                    entries=tuple(f"apam delay={d} lr=0.0005" for d in (0, 1, 6, 11, 21, 51, 101, 201, 401)),
                ),
            ),
            common=CIFAR | {"workers": 1, "batch_size": 32, "sampling": "shard"},
        ),
        Experiment(
            name="digits", source="Does it pay? Two workers against one and against PyTorch, on the digits", steps=0,
            epochs=40, against="samples", target_error=0.05, tune=TUNED,
            panels=(
                Panel(
                    title="p = 2",
                    entries=("msgd threads=1", "easgd", "eamsgd", "downpour", "ddp", "post-local-sgd"),
                ),
            ),
            common={"data": "digits", "model": "mlp", "workers": 2, "eval_every": 10},
        ),
    )
}  # fmt: skip
