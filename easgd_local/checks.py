"""What is refused, or warned of, before a run of the built-in loop starts: see also `Config`, which checks itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from easgd_local import checkpoint, data, hardware
from easgd_local.config import Config, differences, refuse_change
from easgd_local.data import Dataset
from easgd_local.runfolder import saved_config, saved_summary


def gpu_flags(config: Config) -> None:
    """`ValueError` for a flag that says how a GPU computes, without one."""
    for name in ("tf32", "nondeterministic"):
        if getattr(config, name) and config.device != "cuda":
            raise ValueError(f"{name}=True: says how a GPU computes, but device={config.device}; leave it out.")


def tensorboard(config: Config) -> None:
    """`ValueError` where its events are wanted and it is not installed."""
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "tensorboard=True: the package tensorboard is not installed; pip install 'easgd_local[tensorboard]', or "
            "leave --tensorboard out."
        )


def samples(config: Config, dataset: Dataset) -> None:
    """`ValueError` where a step of all workers takes more than there are."""
    data.SAMPLINGS[config.sampling](config.seed, 0, config.workers or 1, config.batch_size, len(dataset.train))


def newest_checkpoint(config: Config, run: Path) -> checkpoint.Manifest:
    """The newest checkpoint of the run to resume, verified; `ValueError` if `config` is that of another run."""
    for name, (old, new) in differences(saved_config(run), config).items():
        refuse_change(name, old, new, run)
    _, manifest = checkpoint.newest(run)
    for name, (old, new) in differences(Config.from_json(manifest.config), config).items():
        raise ValueError(
            f"{run / 'config.json'}: says {name}={new}, but the checkpoint was written with {name}={old}; put the file "
            f"back as it was, or start a new run."
        )
    return manifest


def work_left(config: Config, steps: int, t: int, run: Path) -> None:
    """`ValueError` where a run of so many steps, taken up at t, would have nothing to do, or is done already."""
    name, summary = "steps" if config.epochs is None else "epochs", saved_summary(run)
    if steps < t or (steps == t and summary):  # without a summary it was killed before it could conclude
        raise ValueError(
            f"{name}={getattr(config, name)}: the run in {run} has its newest checkpoint at step {t}, so nothing is "
            f"left to do; give more --{name}."
        )
    if summary.get("status") == "done" and summary.get("steps", 0) >= steps:
        raise ValueError(
            f"{name}={getattr(config, name)}: the run in {run} is done, so nothing is left to do; give more --{name}, "
            f"which go on from its newest checkpoint, at step {t}."
        )


def length_warnings(config: Config, steps: int) -> list[str]:
    """What is legal but unwise in a run of so many steps of so many workers."""
    warnings, cores = [], hardware.cores()
    if config.workers is not None and config.workers > 2 * cores:
        warnings.append(
            f"workers={config.workers} on {cores} cores: they take turns on the cores, so more workers gain nothing."
        )
    if not config.rule.sequential and steps <= config.rule.period > 1:
        warnings.append(
            f"tau={config.rule.period} with steps={steps}: the workers part at step 0 and would next meet at step "
            f"{config.rule.period}, so the center stays as it starts; choose a smaller tau, or more steps."
        )
    for name, needed in (("warmup", config.warmup), ("lr_step", config.lr_step or 0)):
        if needed >= steps:
            warnings.append(f"{name}={needed} with steps={steps}: the run ends before; choose a smaller {name}.")
    return warnings


def rule_warnings(config: Config, curvature: float | None) -> list[str]:
    """What the rule has to say. After a warmup the curvature is no longer that of the start."""
    assert config.workers is not None
    assert config.turns is not None
    return config.rule.warnings(config.workers, None if config.warmup else curvature, config.turns)
