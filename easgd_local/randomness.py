"""The random generators that a training loop may draw from: torch's, NumPy's and Python's own."""

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
    """Seeds all three."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """The state of all three."""
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}


def restore_random(state: dict[str, Any]) -> None:
    """Undoes what was drawn since `random_state`."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Meanwhile all three are seeded so; afterwards they go on as if nothing had been drawn."""
    before = random_state()
    seed_all(seed)
    try:
        yield
    finally:
        restore_random(before)
