"""What belongs to a worker of a loop between two steps: all that a checkpoint holds of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from easgd_local.attachment import Attachment
from easgd_local.child import Refusal
from easgd_local.devices import Place
from easgd_local.flat import Flat
from easgd_local.randomness import random_state, restore_random


class LoopState:
    """Takes it, as a mapping that torch saves, and gives it back: the worker's vectors (`kept`), what its model has
    beside them, optimizers, generators, positions in the data, and the stateful objects of the user's."""

    def __init__(
        self, rank: int, flat: Flat, attachment: Attachment, place: Place, kept: Mapping[str, Any]
    ) -> None:
        self._rank, self._flat, self._attachment, self._place, self._kept = rank, flat, attachment, place, kept

    def passing(self) -> dict[str, Any]:
        """What the forward pass of the next step will change; nothing enqueued may be under way."""
        return {
            "own": self._flat.naming().own,
            "buffers": torch.from_numpy(self._place.host(self._kept["x"][self._flat.buffers]).copy()),
            "random": random_state() | {"worker": self._attachment.generator.get_state()},
            "positions": self._attachment.positions.now(),
        }

    def whole(self, t: int, passing: dict[str, Any]) -> dict[str, Any]:
        """All of it at clock t, with what was passing at the end of the step before."""
        kept = {name: torch.from_numpy(self._place.host(value).copy()) for name, value in self._kept.items()}
        kept["x"][self._flat.buffers] = passing["buffers"]
        return {
            "t": t,
            "kept": kept,
            "own": passing["own"],
            "random": passing["random"],
            "positions": passing["positions"],
            "optimizers": [one.state_dict() for one in self._attachment.optimizers],
            "stateful": [one.state_dict() for one in self._attachment.stateful],
        }

    def restore_model(self, state: dict[str, Any]) -> None:
        """Gives back in place what the model computes with; `Refusal` where other objects are attached than were."""
        counts = {"optimizer": len(self._attachment.optimizers), "stateful object": len(self._attachment.stateful)}
        for (what, count), saved in zip(counts.items(), (state["optimizers"], state["stateful"]), strict=True):
            if count != len(saved):
                raise Refusal(
                    f"the saved state of worker {self._rank} is of {len(saved)} {what}s and {count} are attached; "
                    f"attach the same ones, in the same order."
                )
        for name, value in self._kept.items():
            self._place.load(value, state["kept"][name].numpy())
        self._attachment.model.load_state_dict(state["own"], strict=False)

    def restore_rest(self, state: dict[str, Any]) -> None:
        """And what else belongs to the loop, when its optimizers have their own again."""
        for one, saved in zip(self._attachment.stateful, state["stateful"], strict=True):
            one.load_state_dict(saved)
        self._attachment.positions.restore(state["positions"])
        self.restore_random(state["random"])

    def restore_random(self, state: dict[str, Any]) -> None:
        """Sets the generators back."""
        restore_random(state)
        own, saved = self._attachment.generator, state.get("worker")
        if saved is not None and len(saved) == len(own.get_state()):  # not if it is of another kind of device
            own.set_state(saved)
