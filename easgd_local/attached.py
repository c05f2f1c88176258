"""A worker whose steps are made by the user's own optimizer: the exchange is all that is added to them."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from easgd_local import checkpoint, faults
from easgd_local.attachment import Attachment
from easgd_local.backend.cpu import Vector
from easgd_local.center import Center
from easgd_local.child import Refusal
from easgd_local.devices import place_of
from easgd_local.flat import Flat
from easgd_local.loop_evaluator import LoopEvaluator, numbers
from easgd_local.loop_state import LoopState
from easgd_local.plan import Plan, Start
from easgd_local.stepping import Steps
from easgd_local.turns import Aborted
from easgd_local.visitor import Visitor


class Attached(Visitor):
    """The worker behind an attached model. `Steps` calls `before_step` and `after_step`.

        d <- α(x - c),  c <- c + d,  x <- x - d     before the step, g having been taken at the x before, or
        c, x <- what the rule says                  after it, for rules that replace x

    Parameters in half precision are x rounded, but while an optimizer steps, which moves x itself.

    The clock t counts steps: one is made when each of the optimizers has stepped. Checkpoints are of the moment between
    two steps: best seen where the loop asks for its next batch, else they are noted at the end of a step and written in
    the next one.
    """

    def __init__(
        self, rank: int, center: Center, plan: Plan, flat: Flat, attachment: Attachment, post: Callable[..., None],
        conn: Connection, start: Start,
    ) -> None:  # fmt: skip
        rule = plan.rule
        super().__init__(
            rank, center, plan, flat.buffers, post, start.t, kept=rule.over_local, scratch=rule.over_scratch,
            run_t=start.run_t, place=place_of(center, rank, plan.calendar, plan.graphics, seated=True),
        )  # fmt: skip
        self._tensor = self._place.tensor(self.x)
        self._begun: Any = None  # d of an exchange that goes on beside forward and backward
        self._flat, self._attachment, self._conn = flat, attachment, conn
        self._state = LoopState(rank, flat, attachment, self._place, self._kept)
        self._evaluator = LoopEvaluator(flat, attachment, self._place.device, post)
        self._evaluations = replace(plan.calendar, checkpoint_every=0)
        self._parameters = [id(one) for one in attachment.model.parameters()]
        self._steps = Steps(
            attachment.optimizers, flat.halves, adopt=self._adopt, begins=self.before_step, made=self.after_step
        )
        self._between_t = -1  # the clock whose boundary has been seen
        self._noted: dict[str, Any] | None = None
        self._random: dict[str, Any] | None = None  # to be restored before the next batch
        self._loss: float | None = None
        self._began = time.perf_counter()
        self._resumed = start.saved is not None or start.joins

    # The start

    def fill(self, state: dict[str, Any] | None) -> None:
        """Writes the model's values, or a saved state's, to the center and the shared vectors that start like it."""
        values = self._flat.values() if state is None else state["kept"]["x"].numpy()
        for name in ("c", *self._rule.copies):
            self._center.vectors[name][:] = values

    def bind(self) -> None:
        """The model computes in x from now on, and the optimizers tell of their steps."""
        self._bind()
        self._steps.watch()

    def _bind(self) -> None:
        self._place.touch([self.x], [self.x])
        self._flat.bind(self._tensor)

    def take_up(self, saved: Path | None) -> None:
        """The state to start from: a checkpoint's, or the center while nobody moves it yet."""
        if saved is None:
            super().take_up(None)
        else:
            name = checkpoint.worker_file(self.rank, "pt")
            self.restore(torch.load(saved / name, map_location="cpu", weights_only=False))

    def join(self, t: int) -> None:
        """Takes the place of a worker that died; the model computes with the center's values."""
        super().join(t)
        self.drain()  # while it waits for its turns this worker can hold; before its first step nobody answers for it
        self._place.touch([self.x], [self.x])
        self._flat.halves.round()

    def _begin(self) -> None:
        for name in self._rule.over_local:
            self.ops.copy(self._kept[name], self.x)

    # The step

    def _adopt(self) -> None:
        """What the loop has written to parameters in half precision, as it may to those in float32, is in x."""
        if self._flat.halves:
            self._place.touch([self.x], [self.x])
            self._flat.halves.adopt()

    @torch.no_grad()
    def before_step(self) -> None:
        """The gradient is taken, nothing has moved yet."""
        if self._place.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise Refusal(
                "step(): is being recorded in a CUDA graph, and a graph that is replayed does not tell of its steps; "
                "record forward and backward only, and call the optimizer's step() beside the graph."
            )
        self._check_bound()
        self._gather_buffers()
        if self._between_t != self.t:
            self._boundary_in_step()
        if faults.due(self._plan.faults, "nan", self.rank, self.t):
            self.ops.fill(self.x[: self._buffers.start // 2], math.nan)
            self._place.touch([self.x], [self.x])
        if not self._rule.replaces:
            self._meet()

    @torch.no_grad()
    def after_step(self) -> None:
        """The optimizers have moved x."""
        self._place.step_made()
        self._count_step(self._loss)
        self._loss = None
        self._center.clock[self.rank] = self.t
        if self._rule.replaces:
            self._meet()
        self._report_now_and_then()
        if self._stops or (self._in_rounds and self._checkpoint_due) or self._center.save[0] != self._saved_label:
            self._noted = self._passing_state()
        now = time.perf_counter() - self._turns.wait_s
        faults.keep_pace(self._plan.faults, self.rank, self.t, now - self._began)
        self._began = time.perf_counter() - self._turns.wait_s

    def _meet(self) -> None:
        d, self._begun = self._begun, None
        if d is None:
            d = self._exchange()
        if d is not None:
            self.ops.subtract(self.x, d)  # x <- x - d
        self._draw_buffers()
        self._place.touch([self.x], [self.x])  # the loop's next operations are torch's own
        self._flat.halves.round()
        if self._is_due and self._attachment.optimizer_state == "reset":
            self._reset_optimizers()
        if self._reloaded_at == self.t:
            self._drop_gradients()

    @property
    def _is_due(self) -> bool:
        """Whether an exchange is due at the present clock."""
        return self.t % self._rule.period == 0

    def _exchange(self) -> Any:
        """The rule's exchange, if one is due; d of the elastic ones.

        On a GPU its round begins when the center to be evaluated before it has been taken. Else: 1. our stream waits
        for the turn of a worker, 2. all hold, that worker too, and we are to evaluate the center, 3. what we compute
        for that waits in our stream, and nobody goes on.
        """
        if self._plan.graphics is not None and self._in_rounds and self._is_due:
            earlier, taken = self._evaluations.previous_snapshot(self._turns.round), self._center.taken
            if earlier is not None:
                self._turns.until(lambda: taken[0] > earlier)
        return self._rule.meet(self)

    def _exchange_buffers(self, b: slice) -> None:
        if self._plan.buffers == "average":
            super()._exchange_buffers(b)
        elif self.rank == 0:  # each worker's own: the center carries worker 0's
            self.ops.copy(self.c[b], self.x[b])

    def _reload(self) -> None:
        super()._reload()
        if self._plan.buffers != "average":
            self.drain()
            self._place.load(self.x[self._buffers], self._center.vectors["c"][self._buffers])
        self._reset_optimizers()

    def _reset_optimizers(self) -> None:
        for optimizer in self._attachment.optimizers:
            optimizer.state.clear()

    def _drop_gradients(self) -> None:
        """The gradient at a point that was not finite moves nothing."""
        for optimizer in self._attachment.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def _gather_buffers(self) -> None:
        try:
            self._flat.gather_buffers()
        except ValueError as error:
            raise Refusal(str(error)) from error

    def _check_bound(self) -> None:
        name = self._flat.strayed(self._tensor)
        if name is None and self._is_due:
            name = self._replaced()
        if name is not None:
            raise Refusal(
                f"{name}: was replaced after attach, so the optimizer or the model no longer uses what is exchanged; "
                f"change the model (.to, new layers, loaded weights by assignment) before attach, or copy values in "
                f"place."
            )

    def _replaced(self) -> str | None:
        """The name of the first parameter that the model has got since it was attached."""
        for place, (name, parameter) in enumerate(self._attachment.model.named_parameters()):
            if place >= len(self._parameters) or id(parameter) != self._parameters[place]:
                return name
        return None

    # Between two steps

    def between_steps(self, *, ends: bool = False) -> None:
        """Nothing of step t has begun: its batch has not been drawn yet, or it never begins."""
        self._steps.lower()
        if self._between_t == self.t:
            return
        self._between_t, self._noted = self.t, None
        self._gather_buffers()
        if self._random is not None:
            self._state.restore_random(self._random)
            self._random = None
        self._boundary()
        if not ends:
            self._meet_beside_gradient()

    def _meet_beside_gradient(self) -> None:
        """On a GPU begins the exchange of step t, which goes on beside forward and backward: they change nothing of x
        but its buffers, which on the CPU are exchanged as the forward pass leaves them."""
        beside = self._plan.graphics is not None and not self._rule.replaces and not self._has_buffers
        if beside and self._is_due and self._begun is None:
            self._adopt()
            self._begun = self._exchange()

    def _boundary_in_step(self) -> None:
        """The loop did not say when step t began, so the state at its beginning counts if it was noted."""
        self._between_t, self._random = self.t, None
        self._halt(self.t + 1)
        if self._noted is not None:
            self._save_or_stop()
        self._noted = None
        self._enter_step()

    def _enter_step(self) -> None:
        """While somebody answers for the worker it may have passed the end of step t, where it would have noted its
        state: so it can stop a step later only."""
        if self._respondent and not self._made_last:
            self._respondent.enter(self.t + 1)

    def finish(self) -> None:
        """The loop is over: saves what is due, waits until all workers have finished."""
        if not self._made and not self._resumed:
            raise Refusal(
                "attach: the loop is over, and the attached optimizer has made no step; attach the very optimizer that "
                "the loop steps, and see that the loop gets batches."
            )
        if self._begun is not None:  # a batch was drawn for a step that is not made
            self._meet()
        self._between_t, self._made_last = -1, True
        self.between_steps(ends=True)
        self._settle()
        self._depart()
        self._post("finished")
        self._linger()

    def release(self) -> None:
        """The model computes in memory of its own from now on, and its optimizers step as before the attach."""
        self._steps.leave()
        self._place.touch([self.x], [self.x])
        self._flat.bind(self._tensor.clone())

    def _depart(self) -> None:
        super()._depart()
        self._post("own", self._flat.naming())

    def _linger(self) -> None:
        """Until all have finished; meanwhile this worker's state may belong to checkpoints."""
        center = self._center
        while not center.leave[0]:
            if center.abort[0]:
                raise Aborted
            self._answer_end()
            time.sleep(1e-3)
        self._answer_end()

    def _answer_end(self) -> None:
        if (label := self._center.save[0]) != self._saved_label:
            self._saved_label = label
            self._save(label - 1)
        self._while_held()

    def await_start(self) -> int:
        """Waits for the word to go, answering questions about the center; returns the clock of one that joins."""
        while isinstance(word := self._conn.recv(), tuple):
            self._evaluate(word[1])
        return word

    def _while_held(self) -> None:
        while self._conn.poll():
            what, t = self._conn.recv()
            if what == "save":
                self._save(t)
            else:
                self._evaluate(t)

    # Checkpoints

    def state(self) -> dict[str, Any]:
        """All that belongs to this worker between two steps; the shared vectors are the center's."""
        passing = self._noted or self._passing_state()
        self._adopt()
        return self._state.whole(self.t, passing)

    def _passing_state(self) -> dict[str, Any]:
        self.drain()  # while it waits this worker can hold; in what follows torch itself would wait for the device
        return self._state.passing()

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what `state` gave, in place."""
        self._state.restore_model(state)
        self._bind()
        self._steps.load(state["optimizers"])
        self._state.restore_rest(state)
        self._random = state["random"]

    def _save(self, label: int) -> None:
        file = io.BytesIO()
        torch.save(self.state(), file)
        name = checkpoint.worker_file(self.rank, "pt")
        folder = checkpoint.partial_folder(self._plan.folder, label)
        digest = checkpoint.save_bytes(folder, name, file.getbuffer())
        self._post("saved", label, self.t, name, digest, self._counts())

    # The center

    def center_model(self) -> nn.Module:
        """A copy of the model with the values of the center, read now, in evaluation mode."""
        return self._evaluator.model_with(self._result(self._center.vectors))

    def _result(self, vectors: Mapping[str, Vector]) -> Vector:
        """A copy of what the rule reports, with the buffers of c."""
        values = vectors[self._rule.reported].copy()
        values[self._buffers] = vectors["c"][self._buffers]
        return values

    def _evaluate(self, t: int) -> None:
        """Answers the launcher's question about the center's snapshot, which it has taken at step t."""
        values = self._result(self._center.snapshot)
        self._post("taken")
        began = time.perf_counter()
        scores, seen = self._evaluator.evaluate(values, self._plan.seed, t)
        self._post("evaluated", scores, seen[self._buffers], time.perf_counter() - began)

    # What the loop tells

    def log(self, values: dict[str, Any]) -> None:
        """An event of this worker; `loss` is also what is shown as the worker's loss."""
        plain = numbers(values, "log")
        self._loss = plain.get("loss", self._loss)
        self._post("event", "log", t=self.t, **plain)

    @property
    def samples_per_step(self) -> int | None:
        return self._attachment.positions.batch_size
