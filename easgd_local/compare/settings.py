"""A comparison: who takes part, how long the runs are, with which seeds, and what all have in common."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from easgd_local.compare import tuning
from easgd_local.compare.entries import Entry
from easgd_local.config import Config
from easgd_local.rules.easgd import EASGD

# The flags of `train` that hold for all entries alike.
COMMON = (
    "workers", "device", "data", "data_dir", "image_size", "memory_budget", "model", "steps", "epochs", "batch_size",
    "weight_decay", "sampling", "seed", "schedule", "warmup", "lr_step", "lr_decay", "precision", "tf32",
    "nondeterministic", "channels_last", "threads", "eval_every", "eval_samples",
)  # fmt: skip
OTHERWISE = {"steps", "eval_every"}  # of these, those whose default is another one than `train`'s
UNITS_S = {"s": 1, "m": 60, "h": 3600}
POINTS = 20  # evaluations of a run that does not say how often


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared, and how. `common` holds fields of Config; the length of the runs is there (steps or epochs) or
    `budget_s`, training seconds.

    Raises `ValueError` for values that cannot work, as far as the data need not be known for that.
    """

    entries: tuple[Entry, ...]
    common: dict[str, Any]
    budget_s: float | None = None
    target_error: float = 0.1
    seeds: int = 3
    tune: tuple[str, ...] = ()
    tune_lrs: int = tuning.LRS
    tune_cost: float | None = None

    def __post_init__(self) -> None:
        if len(self.entries) < 2:
            names = " ".join(one.label for one in self.entries) or "none"
            raise ValueError(f"entries={names}: a comparison needs at least two; name another one, such as msgd.")
        if not 0 < self.target_error < 1:
            raise ValueError(
                f"target_error={self.target_error}: the share of wrong answers must lie in (0, 1); try 0.1."
            )
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds}: must be at least 1; 3 show a spread.")
        self._check_tuning()
        if self.budget_s is not None:
            for name in ("steps", "epochs"):
                if self.common.get(name) is not None:
                    raise ValueError(
                        f"budget={self.budget_s:g}s and {name}={self.common[name]}: both fix the length of the runs; "
                        f"give one."
                    )
        self._check_precision()
        template = Config(rule=EASGD(), **self.common)
        if template.seed + self.seeds >= 2**63:
            raise ValueError(f"seed={template.seed}: must be below 2^63 - seeds; choose a smaller one.")
        for one in self.entries:
            self.config(one, steps=1)

    def _check_tuning(self) -> None:
        for name in self.tune:
            if name not in tuning.NAMES:
                raise ValueError(f"tune_over={name}: must be one of {', '.join(tuning.NAMES)}; choose one of them.")
        if len(set(self.tune)) < len(self.tune):
            raise ValueError(f"tune_over={','.join(self.tune)}: names one of them twice; give each once.")
        if self.tune and "lr" not in self.tune:
            raise ValueError(f"tune_over={','.join(self.tune)}: lr must be among them; write lr,{','.join(self.tune)}.")
        if self.tune_lrs < 1 or self.tune_lrs % 2 == 0:
            raise ValueError(f"tune_lrs={self.tune_lrs}: as many smaller as larger ones, so an odd number; try 5.")
        if self.tune_cost is not None and not 0 < self.tune_cost < math.inf:
            raise ValueError(f"tune_cost={self.tune_cost}: in compared runs, must be positive; try 1.")

    def _check_precision(self) -> None:
        precision = self.common.get("precision", "fp32")
        for one in self.entries:
            if one.is_rival and precision not in ("fp32", "bf16"):
                raise ValueError(
                    f"precision={precision}: {one.label} is torch's own, with neither a scaled loss nor a float32 x "
                    f"behind its parameters; choose fp32 or bf16."
                )

    def workers(self, entry: Entry) -> int:
        """p of an entry."""
        if entry.workers is not None:
            return entry.workers
        return 1 if entry.rule.sequential else self.template.workers or 1

    @property
    def most_workers(self) -> int:
        """The largest p of all entries."""
        return max(self.workers(one) for one in self.entries)

    def candidates(self, entry: Entry, steps: int) -> list[tuning.Values]:
        """The hyperparameters to try, for a compared run of so many steps."""
        return tuning.candidates(
            entry.rule, self.tune, lrs=self.tune_lrs, workers=self.workers(entry), steps=steps,
            cost=self.tune_cost,
        )  # fmt: skip

    @property
    def template(self) -> Config:
        """What all have in common, as the configuration of a rule."""
        return Config(rule=EASGD(), **self.common)

    @property
    def run_seeds(self) -> list[int]:
        """The seeds that are compared."""
        return [self.template.seed + k for k in range(self.seeds)]

    @property
    def tuning_seed(self) -> int:
        """One that is not."""
        return self.template.seed + self.seeds

    def config(self, entry: Entry, *, steps: int, seed: int | None = None, out: str | None = None) -> Config:
        """The configuration of one run."""
        own = self.common | {
            "workers": self.workers(entry),
            "steps": steps, "epochs": None, "turns": entry.turns, "out": out, "on_failure": "stop",
            "seed": self.template.seed if seed is None else seed,
        }  # fmt: skip
        if own.get("threads") is not None and entry.rule.sequential:
            own["threads"] *= self.template.workers  # the whole machine for every entry
        if entry.threads is not None:
            own["threads"] = entry.threads
        if own.get("eval_every") is None:
            own["eval_every"] = max(1, steps // POINTS)
        return Config(rule=entry.rule, **own)

    def fixed_steps(self, entry: Entry, train_samples: int) -> int | None:
        """The steps of each worker; None where the budget decides."""
        if self.budget_s is not None:
            return None
        return replace(self.template, workers=self.workers(entry)).steps_over(train_samples)

    def to_json(self) -> dict[str, Any]:
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        template = asdict(self.template)
        common = {name: template[name] for name in COMMON}
        if self.budget_s is not None:
            common["steps"] = None
        return values | {"entries": [one.to_json() for one in self.entries], "common": common}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Comparison:
        listed = {"entries": tuple(map(Entry.from_json, values["entries"])), "tune": tuple(values["tune"])}
        return cls(**(values | listed))


def duration(text: str) -> float:
    """The seconds of "90s", "10m" or "1.5h"."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)([smh])", text.strip())
    seconds = float(found[1]) * UNITS_S[found[2]] if found else 0.0
    if not seconds > 0:
        raise ValueError(f"budget={text}: must be a time above nothing, with its unit; write it like 30s, 10m or 1.5h.")
    return seconds


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, old value, new value) of what differs between the settings of two comparisons, as JSON."""
    before, after = (", ".join(one["label"] for one in each["entries"]) for each in (old, new))
    if before != after:
        return [("entries", before, after)]
    flat = [{**each, **each["common"]} for each in (old, new)]
    names = [name for name in flat[1] if name != "common"]
    return [(name, flat[0].get(name), flat[1][name]) for name in names if flat[0].get(name) != flat[1][name]]
