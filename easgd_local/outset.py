"""The center as a run takes it up: its names, its room, its values from a checkpoint, its turns."""

from __future__ import annotations

from pathlib import Path

from easgd_local import checkpoint, hardware
from easgd_local.center import UPDATES, Center
from easgd_local.plan import Plan, Start
from easgd_local.rules.base import Rule


def shared_names(rule: Rule, workers: int) -> tuple[str, ...]:
    """The names of the center's vectors."""
    return "c", *rule.shared, *(f"{name}{i}" for name in rule.allotted for i in range(workers))


def check_room(plan: Plan, own_vectors: int) -> None:
    """`MemoryError` unless there is room for the center and this many vectors at each worker."""
    workers = plan.layout.workers
    needed = plan.layout.size_bytes + workers * own_vectors * 4 * plan.layout.n
    room = hardware.available_bytes()
    if needed > room:
        raise MemoryError(
            f"workers={workers}: the center and the vectors of the workers take {needed:,} bytes and only {room:,} are "
            f"available; choose fewer workers or a smaller model, or free some memory."
        )


def restore(
    center: Center, plan: Plan, manifest: checkpoint.Manifest, folder: Path, warnings: list[str]
) -> dict[int, Start]:
    """Fills the center's vectors from a checkpoint; returns where each worker takes up."""
    if manifest.n != plan.layout.n:
        raise ValueError(
            f"{folder}: holds a model of {manifest.n:,} floats instead of {plan.layout.n:,}; the data folder or the "
            f"model has changed since, so start a new run."
        )
    saved, ranks = checkpoint.load_vectors(folder, "center.safetensors"), range(plan.layout.workers)
    workers, clocks = plan.layout.workers, manifest.clocks
    needed = {"c", *plan.rule.shared, UPDATES, *(center.vectors if workers == manifest.workers else ())}
    if missing := sorted(needed - saved.keys()):
        raise ValueError(
            f"{folder}: lacks {', '.join(missing)}, so another version of easgd_local wrote it; resume with that "
            f"version, or start a new run."
        )
    if workers == manifest.workers:
        center.restore(saved)
    else:  # what was allotted to the workers of before is nobody's now
        center.restore({name: saved[name] for name in ("c", *plan.rule.shared, UPDATES)})
        copy_center(center, [f"{name}{i}" for name in plan.rule.allotted for i in range(workers)])
    if workers != manifest.workers:
        warnings.append(
            f"continuing from the center with {workers} workers instead of {manifest.workers}: every worker starts at "
            f"the center, so this is another run from step {manifest.t} on, not the same one to the bit."
        )
        clocks = {}
    elif dead := sorted(set(range(workers)) - set(clocks)):
        names = ", ".join(map(str, dead))
        warnings.append(f"worker {names} had died before the checkpoint and starts again from the center.")
    t, drawn = manifest.t, manifest.t * manifest.workers // workers  # as many samples in all
    saved_in, done = dict.fromkeys(clocks, folder), _done(manifest, workers)
    return {
        rank: Start(clocks.get(rank, t), saved_in.get(rank), run_t=t, drawn=drawn, done=done[rank]) for rank in ranks
    }


def _done(manifest: checkpoint.Manifest, workers: int) -> list[dict[str, float]]:
    """What was counted before, by rank; each worker also takes over the counts of ranks that there are no more."""
    done: list[dict[str, float]] = [{} for _ in range(workers)]
    for rank, counts in sorted(manifest.counts.items()):
        mine = done[rank % workers]
        for name, value in counts.items():
            mine[name] = mine.get(name, 0) + value
    return done


def copy_center(center: Center, names: list[str]) -> None:
    """These shared vectors become copies of c."""
    for name in names:
        center.vectors[name][:] = center.vectors["c"]


def set_turns(center: Center, rounds: int) -> None:
    """As many rounds are over, with the updates that are counted."""
    for b in range(center.layout.blocks):
        center.turn[b] = rounds * center.layout.workers
        center.uncounted[b] = center.turn[b] - center.updates[b]
    center.taken[0] = rounds
