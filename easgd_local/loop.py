"""The worker as the user's training function sees it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from easgd_local.attached import Attached
from easgd_local.attachment import (
    Attachment,
    Evaluation,
    Proposal,
    check_optimizers,
    check_words,
    checked_model,
    checked_stateful,
    fitted,
    plain_model,
    refusing,
)  # fmt: skip
from easgd_local.batches import Batches, Loader, Positions
from easgd_local.center import BLOCK_BYTES, Center
from easgd_local.centers import CenterState
from easgd_local.child import Refusal
from easgd_local.data.sampling import SAMPLINGS
from easgd_local.flat import Flat
from easgd_local.randomness import seed_of
from easgd_local.rules.base import Rule


class LoopWorker:
    """One worker process of `launch` or `join`, for a training loop of your own.

    rank: which worker this is, from 0.
    workers: how many there are, p.
    device: where it computes, a torch.device.
    generator: a torch.Generator on that device, seeded by the run's seed and the rank, as torch's, NumPy's and Python's
    own generators are.
    center: after the block of `join`, the center's state dict, in every worker.
    """

    def __init__(
        self, rank: int, workers: int, conn: Connection, seed: int, device: torch.device | None = None
    ) -> None:  # fmt: skip
        self.rank, self.workers, self.device = rank, workers, device or torch.device("cpu")
        self.generator = torch.Generator(self.device).manual_seed(seed_of(seed, rank))
        self._conn, self._seed = conn, seed
        self._positions = Positions()
        self.center: CenterState | None = None
        self._attached: Attached | None = None
        self._state: dict[str, Any] | None = None

    @property
    def t(self) -> int:
        """The worker's clock: how many steps it has made, in a resumed run since the beginning of all."""
        return self._attached.t if self._attached else 0

    @property
    def is_attached(self) -> bool:
        """Whether `attach` has been called."""
        return self._attached is not None

    # The one line

    def attach(
        self, model: nn.Module, optimizer: Optimizer | list[Optimizer] | tuple[Optimizer, ...], rule: Rule, *,
        turns: str | None = None, buffers: str = "average", calibrate_on: Iterable[Any] | None = None,
        optimizer_state: str = "local", evaluate: Evaluation | None = None, evaluate_every: int = 0,
        stateful: Any = (), block_bytes: int = BLOCK_BYTES,
    ) -> None:  # fmt: skip
        """Lays a rule over the steps of an optimizer: from here on `optimizer.step()` also meets the center.

        model: on `worker.device`, with parameters in float32 or one half precision; every worker builds the same one,
        and all start from worker 0's values. Its parameters become views of one vector of n floats, or of that vector
        rounded, and stay the same objects.
        optimizer: any `torch.optim.Optimizer` over parameters of the model, or several: a step is made when each has
        stepped, and one that a GradScaler skips is none.
        rule: `EASGD`, `EASGDSync`, `EASGDGaussSeidel`, `EAMSGD` or `EAMSGDSync` (over SGD with the same Nesterov
        momentum), `Downpour` and its averaged forms, `LocalSGD`, `SMA`, `DiLoCo`. Their lr is the optimizer's.

            d <- α(x - c),  c <- c + d,  x <- x - d,  then the optimizer's step with g at the old x     elastic, SMA
            the optimizer's step,  then c, x <- what the rule says                                      the others

        turns: the order of visits to the center; default the first that the rule is defined for.
        buffers: BatchNorm's statistics and other float32 buffers are averaged at each exchange ("average"), computed
        anew for the center on the batches `calibrate_on` ("recalibrate"), or left alone, and worker 0's are the
        center's ("local"). Integers are never averaged.
        optimizer_state: momentum and the like stay over an exchange ("local", as in the papers) or are forgotten
        ("reset").
        evaluate: a function of a model to names and numbers, called about every `evaluate_every` steps (0: only at the
        end) in one worker, without gradients, with a copy of the model that has the values of the center after a
        round, while all hold and the clock stands. `train_loss`, `test_loss` and `test_error` (a fraction) are drawn.
        stateful: what else belongs in checkpoints: learning rate schedules, a GradScaler, anything with `state_dict`
        and `load_state_dict`; one of them, or a list.
        block_bytes: size of the center's blocks.

        Raises `ValueError` for what cannot be attached; then all workers stop.
        """
        if self._attached is not None:
            raise Refusal(
                "attach: this worker has a model attached already, and a run has one center; put both models into one "
                "nn.Module, or launch a second run."
            )
        optimizers = tuple(optimizer) if isinstance(optimizer, list | tuple) else (optimizer,)
        plain = plain_model(checked_model(model, self.device))
        check_optimizers(plain, optimizers)
        rule = fitted(rule, optimizers[0])
        check_words(rule, turns, buffers, optimizer_state, evaluate_every, calibrate_on)
        with refusing():
            flat = Flat(plain)
            if hasattr(rule, "moving_rate"):
                rule.moving_rate(self.workers)
        attachment = Attachment(
            plain, optimizers, optimizer_state, evaluate, calibrate_on, checked_stateful(stateful),
            self._positions, self.generator,
        )  # fmt: skip
        proposal = Proposal(
            rule=rule, turns=turns or rule.orders[0], buffers=buffers,
            evaluates=evaluate is not None or calibrate_on is not None, evaluate_every=evaluate_every,
            block_bytes=block_bytes, optimizer_state=optimizer_state, model=type(plain).__name__,
            entries=tuple(flat.entries), n=flat.n, parameters=flat.parameters, dtypes=flat.dtypes,
            t=self._state["t"] if self._state else 0, naming=flat.naming(),
        )  # fmt: skip
        self._meet_the_others(proposal, flat, attachment)

    def _meet_the_others(self, proposal: Proposal, flat: Flat, attachment: Attachment) -> None:
        with contextlib.suppress(BrokenPipeError):  # refused already: the reason can still be read
            self._conn.send(("attach", proposal))
        match self._conn.recv():
            case ("refused", text):
                raise Refusal(text)
            case (_, plan, start, fills):
                pass
        center = Center.attach(plan.layout, recv_handle(self._conn))
        attached = Attached(self.rank, center, plan, flat, attachment, self._post, self._conn, start)
        if fills:
            attached.fill(self._state)
            self._post("filled")
        if not start.joins:
            attached.take_up(start.saved)
        if self._state is not None and start.saved is None:
            attached.restore(self._state)
        attached.bind()
        state, self._attached, self._state = self._state, attached, None
        self._post("ready")
        t = attached.await_start()
        if start.joins:
            attached.join(t)
        if start.saved is None and state is None:
            self._positions.begin_at(attached.t if start.drawn is None else start.drawn)

    # What the loop may say and ask

    def log(self, **values: float | Tensor) -> None:
        """Records numbers, or tensors of one element, at the present step; `loss` is shown as the worker's loss."""
        self._need("log").log(values)

    def center_model(self) -> nn.Module:
        """A copy of the model with the center's values, in evaluation mode; the worker's own model is not touched.

        The center is read while others may write to it, each coordinate being old or new: good for a look at any time.
        For numbers that are the same in every run give `evaluate` to `attach`.
        """
        return self._need("center_model").center_model()

    def sampler(self, dataset: Any, batch_size: int, *, sampling: str = "shard") -> Batches:
        """A batch sampler for this worker: `DataLoader(dataset, batch_sampler=worker.sampler(dataset, 32))`.

        dataset: anything with a length.
        sampling: "shard", each sample once per epoch across the workers, or "independent", every worker draws from the
        whole set.

        The order depends on the run's seed, the rank and the epoch, and a resumed run goes on in mid-epoch:
        `for epoch in range(sampler.epoch, epochs)`. A DataLoader with worker processes reads ahead, which a sampler
        cannot see: then use `loader`. Raises `ValueError` where a batch is larger than the share of a worker.
        """
        if sampling not in SAMPLINGS:
            raise Refusal(f"sampling={sampling}: must be one of {', '.join(SAMPLINGS)}; choose one of them.")
        with refusing():
            order = SAMPLINGS[sampling](self._seed, self.rank, self.workers, batch_size, len(dataset))
        batches = Batches(order, self._next_batch)
        self._positions.add(batches)
        return batches

    def loader(self, dataset: Any, batch_size: int, *, sampling: str = "shard", **options: Any) -> Loader:
        """A DataLoader over `sampler(dataset, batch_size, sampling=sampling)`; `options` are torch's own, but that the
        order is always shuffled and every batch full.

        It counts the batches that the loop has got, so a run resumes at the right one also with num_workers > 0;
        `epoch` is the sampler's.
        """
        for name in ("batch_sampler", "sampler"):
            if options.get(name) is not None:
                raise Refusal(f"{name}: a worker's loader has its own; leave it out, or make a DataLoader yourself.")
        if options.pop("shuffle", True) is False or options.pop("drop_last", True) is False:
            raise Refusal(
                "shuffle=False or drop_last=False: a worker's loader shuffles in every epoch and all its batches are "
                "full; leave them out, or make a DataLoader yourself."
            )
        if options.get("generator") is None:
            options["generator"] = torch.Generator().manual_seed(seed_of(self._seed, self.rank))
        return Loader(dataset, self.sampler(dataset, batch_size, sampling=sampling), **options)

    def _next_batch(self) -> None:
        if self._attached is not None:
            self._attached.between_steps()

    def state_dict(self) -> dict[str, Any]:
        """What belongs to this worker between two steps, for checkpoints of your own: weights, the rule's vectors, the
        states of optimizers, `stateful` objects, generators and samplers, the clock.

        Runs with `checkpoint_every` save it themselves, and the center with it, exactly after a round.
        """
        return self._need("state_dict").state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Starts from what `state_dict` gave; call it before `attach`, in every worker. The center starts from the
        weights of worker 0's state."""
        if self._attached is not None:
            raise Refusal("load_state_dict: the model is attached already; load the state before attach.")
        if not isinstance(state, dict) or "kept" not in state:
            raise Refusal("load_state_dict: this is not what worker.state_dict() gave; load that.")
        self._state = state

    def finish(self) -> None:
        """The loop is over: waits for the others. `launch` calls it when the function returns."""
        if self._attached is None:
            self._post("unattached")
        else:
            self._attached.finish()

    def drain(self) -> None:
        """Returns when everything enqueued on the device is done."""
        if self._attached is not None:
            self._attached.drain()

    def finish_exchange(self) -> None:
        """Before the process ends by an exception: the center has all of an exchange that has begun."""
        if self._attached is not None:
            self._attached.finish_exchange()

    def release(self) -> None:
        """The model outlives the worker: its values are in memory of its own."""
        if self._attached is not None:
            self._attached.release()

    def close(self, *, drained: bool) -> None:
        """Gives the device back; what is not drained is left to the end of the process."""
        if self._attached is not None:
            self._attached.close(drained=drained)

    def _need(self, what: str) -> Attached:
        if self._attached is None:
            raise Refusal(f"{what}: nothing is attached yet; call worker.attach(model, optimizer, rule) before it.")
        return self._attached

    def _post(self, kind: str, *args: Any, **values: Any) -> None:
        self._conn.send((kind, *args, values) if values else (kind, *args))
