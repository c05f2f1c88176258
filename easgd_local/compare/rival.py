"""One process of a rival's run: PyTorch's own data-parallel training, over gloo on the CPU and NCCL on GPUs, as its
users write it.

Start, minibatches, crops and flips, weight decay and evaluation are those of our workers, so nothing but the way of
averaging differs.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from easgd_local import data, hardware, models
from easgd_local.compare.rivals import DDP, PostLocalSGD, Rival
from easgd_local.computing import Computing
from easgd_local.data import Dataset, Sampler
from easgd_local.devices import take_seat
from easgd_local.evaluate import evaluate
from easgd_local.graphics import Graphics
from easgd_local.learning_rate import LearningRate
from easgd_local.minibatches import Minibatches
from easgd_local.randomness import seed_model
from easgd_local.summary import Clock

PATIENCE = timedelta(days=365)  # of processes that wait for each other: when one dies, the launcher ends them all


@dataclass(frozen=True, kw_only=True)
class RivalPlan:
    """What a process needs to know: a function of the configuration."""

    rival: Rival
    learning_rate: LearningRate
    workers: int
    steps: int
    evaluate_every: int
    model: str
    batch_size: int
    sampling: str
    seed: int
    weight_decay: float
    computing: Computing
    graphics: Graphics | None
    threads: int
    evaluation_samples: int
    folder: Path

    def sampler(self, rank: int, samples: int) -> Sampler:
        """The order of samples of process `rank`."""
        return data.SAMPLINGS[self.sampling](self.seed, rank, self.workers, self.batch_size, samples)


def main(conn: Connection, fds: list[int], rank: int, plan: RivalPlan, description: dict[str, Any]) -> None:
    """Sets up, says "ready", waits for the word to go, trains; the first process tells of evaluations and the end."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(plan.threads)
    plan.computing.set_up()
    device = take_seat(plan.graphics, rank)
    dataset = data.from_memfd(fds[0] if fds else None, description)
    store = dist.FileStore(str(plan.folder / "meeting"), plan.workers)
    over = {"backend": "gloo"} if device.type == "cpu" else {"backend": "nccl", "device_id": device}
    dist.init_process_group(**over, store=store, rank=rank, world_size=plan.workers, timeout=PATIENCE)
    try:
        torch.manual_seed(plan.seed)
        model = models.build(plan.model, shape=dataset.input_shape, classes=len(dataset.classes))
        run = RivalProcess(rank, plan, model.to(device), dataset, device, conn.send)
        conn.send(("ready",))
        conn.recv()
        run.train()
    finally:
        dist.destroy_process_group()


class RivalProcess:
    """The training loop of one process; the clock is the first process's, and stands while the model is evaluated."""

    def __init__(
        self,
        rank: int,
        plan: RivalPlan,
        model: nn.Module,
        dataset: Dataset,
        device: torch.device,
        post: Callable[[tuple[Any, ...]], None],
    ) -> None:
        self._rank, self._plan, self._dataset, self._device, self._post = rank, plan, dataset, device, post
        self._module, self._clock = model, Clock(0.0)
        self._model = nn.parallel.DistributedDataParallel(model, None if device.type == "cpu" else [device])
        self._optimizer = optimizer_of(plan, self._model)
        self._minibatch = Minibatches(  # those that our worker of the same rank would get
            dataset, plan.sampler(rank, len(dataset.train)), rank=rank, computing=plan.computing, device=device
        )

    def train(self) -> None:
        """All steps, with evaluations between them."""
        plan = self._plan
        self._evaluate(0)
        for t in range(plan.steps):
            self._step(t)
            done = t + 1
            if done == plan.steps or (plan.evaluate_every and done % plan.evaluate_every == 0):
                if not self._evaluate(done):
                    break
        self._minibatch.close()
        self._clock.stop()
        if self._rank == 0:
            tensors = {name: one.contiguous() for name, one in self._averaged().state_dict().items()}
            safetensors.torch.save_file(tensors, plan.folder / "center.safetensors")
        else:
            self._averaged()
        self._post(("finished", done, self._clock.seconds))

    def _step(self, t: int) -> None:
        inputs, targets, seed = self._minibatch(t)
        seed_model(seed, self._device)
        for group in self._optimizer.param_groups:
            group["lr"] = self._plan.learning_rate(t)
        self._optimizer.zero_grad()
        with self._plan.computing.context():
            loss = F.cross_entropy(self._model(inputs), targets)
        loss.backward()
        self._optimizer.step()

    def _evaluate(self, t: int) -> bool:
        """Scores the model with the clock stopped, by the first process on all cores; whether to go on."""
        self._meet()  # everybody has made step t
        self._clock.stop()
        averaged, sound = self._averaged(), torch.ones(1, device=self._device)
        if self._rank == 0:
            with _threads(hardware.cores(), self._plan.threads):
                scores = evaluate(
                    averaged, self._dataset, samples=self._plan.evaluation_samples, computing=self._plan.computing
                )
            self._post(("center", t, self._clock.seconds, asdict(scores)))
            sound[0] = math.isfinite(scores.train_loss)
        dist.broadcast(sound, 0)
        self._meet()
        self._clock.start()
        return bool(sound)

    def _meet(self) -> None:
        """Returns when all processes, and their GPUs, are here."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        dist.barrier()

    @torch.no_grad()
    def _averaged(self) -> nn.Module:
        """The model to evaluate and to keep: the mean of the processes' copies where these may differ."""
        model = copy.deepcopy(self._module)
        if isinstance(self._plan.rival, PostLocalSGD):
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    dist.all_reduce(tensor)
                    tensor /= self._plan.workers
        return model


def optimizer_of(plan: RivalPlan, model: nn.parallel.DistributedDataParallel) -> Any:
    """torch's own; for post-local SGD as torch's documentation wraps its SGD."""
    rival = plan.rival
    assert isinstance(rival, DDP | PostLocalSGD)
    usual = {"lr": rival.lr, "weight_decay": plan.weight_decay}
    if isinstance(rival, DDP) and rival.optimizer != "sgd":
        kind = torch.optim.AdamW if rival.optimizer == "adamw" else torch.optim.Adam
        return kind(model.parameters(), amsgrad=rival.optimizer == "amsgrad", **usual)
    sgd = torch.optim.SGD(model.parameters(), momentum=rival.momentum, nesterov=rival.momentum > 0, **usual)
    if isinstance(rival, DDP):
        return sgd
    from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    state = PostLocalSGDState(None, None, rival.ddp_steps, post_local_gradient_allreduce=False)  # then gradients stay
    model.register_comm_hook(state, post_localSGD_hook)
    return PostLocalSGDOptimizer(sgd, PeriodicModelAverager(rival.tau, rival.ddp_steps))


@contextlib.contextmanager
def _threads(meanwhile: int, afterwards: int) -> Iterator[None]:
    torch.set_num_threads(meanwhile)
    try:
        yield
    finally:
        torch.set_num_threads(afterwards)
