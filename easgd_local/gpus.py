"""What a run decides of its GPUs before it starts, whoever makes the workers' steps."""

from __future__ import annotations

import functools

from easgd_local import hardware
from easgd_local.fork_server import ChildDied, ask
from easgd_local.graphics import Capability, Graphics, Images, look
from easgd_local.link import DEPTH
from easgd_local.plan import Plan

UNTRIED = "Training on GPUs has been tested on a simulated driver only; --device cuda uses them all the same."
MPS = "MPS is active, with which easgd_local has never been tried; if a run hangs, stop the MPS daemon."
BLOCKING = "CUDA_LAUNCH_BLOCKING is set: each launch waits for its kernel, so no exchange hides behind a gradient."

_compiled: dict[Capability, Images] = {}  # once for all runs of this process


def chosen(
    device: str, exchange: str, workers: int, *, evaluator: bool = False
) -> tuple[Graphics | None, list[str]]:
    """The GPUs that a run uses, None on the CPU, and what is to be said of that.

    evaluator: beside the workers a process that evaluates uses the first GPU.

    Raises `ValueError` with one sentence for what is missing or does not fit.
    """
    if device == "cuda":
        found = find()
        found.check_processes(workers, evaluator=evaluator)
        return found, [UNTRIED, *([MPS] if found.mps else []), *([BLOCKING] if hardware.launches_block() else [])]
    if exchange != "auto":
        raise ValueError(f"exchange={exchange}: says how a GPU reaches the center, but device={device}; leave it out.")
    gpus = hardware.gpus() if device == "auto" else []
    return None, [f"{', '.join(gpus)} found and not used. {UNTRIED}"] if gpus else []


def find() -> Graphics:
    """The GPUs of this machine, looked for in a process of their own; `ValueError` for what is missing."""
    try:
        found: Graphics = ask(functools.partial(look, _compiled))
    except ChildDied as error:
        raise ValueError(
            f"device=cuda: the process that looks for GPUs ended without an answer ({error}), so the driver does not "
            f"work; see what nvidia-smi says, or use --device cpu."
        ) from error
    _compiled.update(found.images)
    return found


def exchanging(graphics: Graphics | None, exchange: str, plan: Plan, own_vectors: int) -> Graphics | None:
    """With the way of exchanging that was asked for, or that suits the plan.

    Raises `MemoryError` if a GPU has no room for its workers, each with so many vectors of n floats, and `ValueError`
    for a rule that needs what a GPU cannot know.
    """
    if graphics is None:
        return None
    if plan.rule.counts and plan.turns == "free":
        raise ValueError(
            f"turns=free with the rule {plan.rule.name}: each of its updates depends on how many came before it, and "
            f"on a GPU they are enqueued before that is known; use turns=strict, or the CPU."
        )
    layout = plan.layout
    graphics = graphics.exchanging(exchange, plan.turns, layout.vector_bytes, layout.workers)
    staging = 0 if graphics.exchange == "zerocopy" else DEPTH * len(layout.shared) * layout.block_bytes
    graphics.check_room(layout.workers, 4 * layout.n * own_vectors + staging)
    return graphics
