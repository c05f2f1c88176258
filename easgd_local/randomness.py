"""The random generators that a training loop may draw from: torch's, on the CPU and on the GPU in use, NumPy's and
Python's own."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def seed_of(seed: int, number: int) -> int:
    """Another seed for every seed of a run and every number (a worker's rank, say)."""
    return (seed * 1_000_003 + number * 7919 + 1) % 2**63


def seed_all(seed: int) -> None:
    """Seeds all."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def seed_model(seed: int, device: torch.device) -> None:
    """Seeds what a model draws from in its forward pass: torch's generators on the CPU and, if it is there, on its GPU.

    `torch.manual_seed` gives them the same states, but each time tells all kinds of devices that there might be, which
    takes as long as half a step of a small network.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The state of all."""
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def restore_random(state: dict[str, Any]) -> None:
    """Undoes what was drawn since `random_state`."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Meanwhile all are seeded so; afterwards they go on as if nothing had been drawn."""
    before = random_state()
    seed_all(seed)
    try:
        yield
    finally:
        restore_random(before)
