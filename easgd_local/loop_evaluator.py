"""The center of a loop's run looked at: in a copy of the attached model, by the user's own functions."""

from __future__ import annotations

import contextlib
import copy
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from easgd_local.attachment import Attachment
from easgd_local.backend.cpu import Vector, vector
from easgd_local.calibrate import recalibrate
from easgd_local.child import Refusal
from easgd_local.flat import Flat
from easgd_local.randomness import seed_of, seeded
from easgd_local.turns import Aborted

EVENTS_OWN = ("kind", "t", "seconds", "rank", "round", "evaluate_s", "nonfinite")


class LoopEvaluator:
    """Puts float32[n] into copies of the attached model; a worker's own model is never touched."""

    def __init__(self, flat: Flat, attachment: Attachment, device: torch.device, post: Callable[..., None]) -> None:
        self._flat, self._attachment, self._device, self._post = flat, attachment, device, post

    def model_with(self, values: Vector) -> nn.Module:
        """A copy of the model, in evaluation mode, that computes with a copy of `values` on the worker's device."""
        x = vector(self._flat.n)
        np.copyto(x, values)
        try:
            model = copy.deepcopy(self._attachment.model)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise Refusal(f"the model cannot be copied, so the center cannot be looked at in one: {error}") from error
        self._flat.of(model).bind(torch.from_numpy(x).to(self._device))
        return model.eval()

    def evaluate(self, values: Vector, seed: int, t: int) -> tuple[dict[str, float], Vector]:
        """What the user's function says of `values`, and all n as they were for it: with buffers computed anew if so
        wanted. The same numbers whichever worker evaluates, wherever it holds."""
        model, attachment = self.model_with(values), self._attachment
        with seeded(seed_of(seed, t)):
            if attachment.calibrate_on is not None:
                with self._failing("calibrate_on"):
                    recalibrate(model, attachment.calibrate_on)
            scores = self._scores(model) if attachment.evaluate else {}
        return scores, self._flat.of(model).values()

    @torch.no_grad()
    def _scores(self, model: nn.Module) -> dict[str, float]:
        assert self._attachment.evaluate is not None
        scores: dict[str, float] = {}
        with self._failing("evaluate"):
            scores = numbers(self._attachment.evaluate(model.eval()), "evaluate")
        return scores

    @contextlib.contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            text = str(error) if isinstance(error, Refusal) else f"{what}: raised {type(error).__name__}: {error}."
            traceback.print_exc()
            # The loop may catch exceptions around its step, so the launcher is told here.
            self._post("failed evaluation", text, traceback.format_exc())
            raise Aborted from error


def numbers(values: Any, what: str) -> dict[str, float]:
    """Names and plain numbers; `Refusal` for anything else, or for a name that every event has."""
    if not isinstance(values, dict):
        raise Refusal(f"{what}: gave {type(values).__name__}, and must give names and numbers; write a dict of them.")
    plain: dict[str, float] = {}
    for name, value in values.items():
        if not isinstance(name, str) or name in EVENTS_OWN:
            raise Refusal(f"{what}: the name {name!r} is every event's own, or no word; choose another.")
        try:
            if isinstance(value, Tensor):
                value = _element(value.detach())
            plain[name] = int(value) if isinstance(value, int) else float(value)
        except (TypeError, ValueError):
            raise Refusal(
                f"{what}: {name}={type(value).__name__} is not one number; give a number, or a tensor of one element."
            ) from None
    return plain


def _element(value: Tensor) -> Tensor:
    """The only one, to be read; what a GPU has to say against that is no mistake of the loop's."""
    if value.numel() != 1 or value.is_complex() or value.is_meta:
        raise ValueError
    return value
