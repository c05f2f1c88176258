"""Training functions for `launch`: at the top level of a module, where new processes find them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import easgd_local as easgd
from easgd_local import data
from easgd_local.halves import narrow
from easgd_local.loop import LoopWorker


def digits() -> tuple[TensorDataset, TensorDataset]:
    """The bundled digits for training and for testing."""
    dataset = data.load("digits")
    first, second = (
        TensorDataset(torch.from_numpy(data.prepare(split.images, dataset)), torch.from_numpy(split.labels))
        for split in (dataset.train, dataset.test)
    )
    return first, second


def network() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10)
    )


class Odd(nn.Module):
    """BatchNorm, dropout, tied weights, a frozen layer and an unused head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 32)
        self.norm = nn.BatchNorm1d(32)
        self.square = nn.Linear(32, 32)
        self.again = nn.Linear(32, 32)
        self.again.weight = self.square.weight
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.head = nn.Linear(32, 10)
        self.unused = nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.dropout(torch.relu(self.norm(self.first(x.flatten(1).to(self.first.weight.dtype)))), 0.1, self.training)
        return self.head(torch.relu(self.frozen(torch.relu(self.again(torch.relu(self.square(h))))))).float()


def scores(model: nn.Module) -> dict[str, Any]:
    device = next(model.parameters()).device
    inputs, targets = (one.to(device) for one in digits()[1].tensors)
    answers = model(inputs)
    return {"test_loss": F.cross_entropy(answers, targets), "test_error": (answers.argmax(1) != targets).float().mean()}


def epochs_of(
    worker: LoopWorker, model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any, epochs: int, after: Any = None
) -> None:
    """What everybody's loop does."""
    for _ in range(loader.epoch, epochs):
        for inputs, targets in loader:
            inputs, targets = inputs.to(worker.device), targets.to(worker.device)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            worker.log(loss=loss)
            if after:
                after()


def train(
    worker: LoopWorker, epochs: int = 1, rule: Any = None, buffers: str = "average", **options: Any
) -> nn.Module:
    model = network().to(worker.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainset = digits()[0]
    if buffers == "recalibrate":
        options["calibrate_on"] = DataLoader(trainset, batch_size=100)
    worker.attach(
        model, optimizer, rule or easgd.EASGD(tau=4, beta=0.9), buffers=buffers, evaluate=scores, **options
    )  # fmt: skip
    epochs_of(worker, model, optimizer, worker.loader(trainset, 32), epochs)
    return model


def bare(
    worker: LoopWorker, epochs: int = 1, rule: Any = None, leaves_early: bool = False, evaluate_every: int = 0
) -> None:
    """Without buffers, so that on a GPU exchanges go on beside the gradient."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).to(worker.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = rule or easgd.EASGD(tau=4, beta=0.9)
    worker.attach(model, optimizer, rule, evaluate=scores, evaluate_every=evaluate_every)
    loader = worker.loader(digits()[0], 32)
    epochs_of(worker, model, optimizer, loader, epochs)
    if leaves_early:
        next(iter(loader))  # a batch for which no step is made


def reads_its_loss(worker: LoopWorker, stop_at: int = 0) -> None:
    """On a pretended GPU; as `loss.item()` does on a real one, it waits in the driver for all that is enqueued, and
    meanwhile answers nobody. With `stop_at` by a loader of its own, so that nobody hears when a step begins."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    worker.attach(model, optimizer, easgd.EASGD(tau=2), evaluate=scores, evaluate_every=4)
    place: Any = worker._attached._place  # type: ignore[union-attr]

    def touch(reads: Any, writes: Any) -> None:
        place.ops.order(list(reads), list(writes))
        place.gpu.training.synchronize()

    place.touch = touch
    place.gpu.training.synchronize()  # as memory for the first forward pass may
    if not stop_at:
        epochs_of(worker, model, optimizer, worker.loader(digits()[0], 32), 1)
        return
    for inputs, targets in DataLoader(digits()[0], 32):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        if worker.t == stop_at and worker.rank == 1:
            os.kill(int(os.environ["LAUNCHER"]), signal.SIGINT)
        time.sleep(0.02)  # here the stop comes


def scaled(worker: LoopWorker, epochs: int, fused: bool = False, half: bool = False) -> None:
    """float16 with a GradScaler, whose first steps overflow and are skipped; `half`: in parameters too."""
    kind = worker.device.type
    model = network().to(worker.device)
    model = narrow(model, torch.float16) if half else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=fused)
    scaler = torch.amp.GradScaler(kind, init_scale=2.0**24)
    worker.attach(model, optimizer, easgd.EASGD(tau=2), stateful=[scaler])
    for _ in range(epochs):
        for inputs, targets in worker.loader(digits()[0], 32, pin_memory=kind == "cuda"):
            inputs, targets = inputs.to(worker.device), targets.to(worker.device)
            optimizer.zero_grad()
            with torch.autocast(kind, torch.float16):
                loss = F.cross_entropy(model(inputs).float(), targets)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            worker.log(loss=loss)


def leaves_at(worker: LoopWorker, steps: int) -> None:
    """Draws one batch more than it makes steps."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    worker.attach(model, optimizer, easgd.EASGD(tau=2))
    for inputs, targets in worker.loader(digits()[0], 32):
        if worker.t >= steps:
            break
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def resumable(
    worker: LoopWorker, epochs: int, stop_at: int = 0, rule: Any = None, loader_workers: int = 0, half: bool = False
) -> None:
    """A model of every sort, an optimizer with state, a schedule, noise from the worker's own generator; `stop_at`
    presses Ctrl-C in the launcher. In `half` the parameters are bfloat16, but BatchNorm's."""
    model = (narrow(Odd(), torch.bfloat16) if half else Odd()).to(worker.device)

    def noisy(model: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        x, own = inputs[0], worker.generator
        return x + 0.1 * torch.randn(x.shape, generator=own, device=own.device)

    model.register_forward_pre_hook(noisy)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.003)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    worker.attach(model, optimizer, rule or easgd.EASGD(tau=4), stateful=[schedule])
    loader = worker.loader(digits()[0], 32, num_workers=loader_workers)

    def after() -> None:
        schedule.step()
        if stop_at and worker.rank == 1 and worker.t == stop_at:
            os.kill(int(os.environ["LAUNCHER"]), signal.SIGINT)

    epochs_of(worker, model, optimizer, loader, epochs, after)


def killed(worker: LoopWorker, epochs: int) -> None:
    """Worker 1 dies as by the out-of-memory killer, in its second launch not."""
    model = network().to(worker.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    worker.attach(model, optimizer, easgd.EASGD(tau=4))
    marker = Path(os.environ["MARKER"])

    def after() -> None:
        if worker.rank == 1 and worker.t == 9 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    epochs_of(worker, model, optimizer, worker.loader(digits()[0], 32), epochs, after)


# Mistakes


def attach_twice(worker: LoopWorker) -> None:
    model = nn.Linear(3, 2)
    for other in (model, nn.Linear(5, 2)):
        worker.attach(other, torch.optim.SGD(other.parameters(), lr=0.1), easgd.EASGD())


def different_shapes(worker: LoopWorker) -> None:
    model = nn.Linear(3, 2 + worker.rank)
    worker.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), easgd.EASGD())


def different_names(worker: LoopWorker) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)) if worker.rank else nn.Sequential(nn.Linear(3, 2))
    worker.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), easgd.EASGD())


def different_rules(worker: LoopWorker) -> None:
    model = nn.Linear(3, 2)
    worker.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), easgd.EASGD(tau=10 + worker.rank))


def wrong_type(worker: LoopWorker) -> None:
    model = nn.Linear(3, 2).double() if worker.rank else nn.Linear(3, 2)
    worker.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), easgd.EASGD())


def different_types(worker: LoopWorker) -> None:
    model = nn.Linear(3, 2).bfloat16() if worker.rank else nn.Linear(3, 2)
    worker.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), easgd.EASGD())


def wrong_device(worker: LoopWorker) -> None:
    model = nn.Linear(3, 2, device="meta")
    worker.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), easgd.EASGD())


def another_models_optimizer(worker: LoopWorker) -> None:
    worker.attach(nn.Linear(3, 2), torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.1), easgd.EASGD())


def replaced_after_attach(worker: LoopWorker) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    worker.attach(model, optimizer, easgd.EASGD(tau=2))
    for t in range(100):
        if worker.rank == 1 and t == 5:
            model.weight = nn.Parameter(torch.zeros(2, 3))
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()


def nothing_attached(worker: LoopWorker) -> None:
    if worker.rank:
        model = nn.Linear(3, 2)
        worker.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), easgd.EASGD())


def fails_before(worker: LoopWorker) -> None:
    if worker.rank:
        raise KeyError("no such column")
    time.sleep(60)


def fails_after(worker: LoopWorker) -> None:
    model = nn.Linear(3, 2)
    worker.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), easgd.EASGD())
    model(torch.ones(1, 4))


def leader_fails(worker: LoopWorker) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    worker.attach(model, optimizer, easgd.EASGD(tau=4))

    def after() -> None:
        if worker.rank == 0 and worker.t == 9:
            raise KeyError("no such column")

    epochs_of(worker, model, optimizer, worker.loader(digits()[0], 32), 10**6, after)


def bad_evaluation(worker: LoopWorker) -> None:
    model = nn.Linear(3, 2)
    worker.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), easgd.EASGD(), evaluate=lambda model: model(1))


def bad_calibration(worker: LoopWorker) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    worker.attach(
        model, torch.optim.SGD(model.parameters(), lr=0.1), easgd.EASGD(), buffers="recalibrate",
        calibrate_on=[torch.ones(2, 5)],
    )  # fmt: skip


def exits(worker: LoopWorker) -> None:
    sys.exit(3)


def environment(worker: LoopWorker, folder: str) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    (Path(folder) / f"{worker.rank}").write_text(" ".join(os.environ[name] for name in names))
    train(worker)


def epochs_forever(worker: LoopWorker) -> None:
    """Leaves a mark in the run folder when it is under way."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    worker.attach(model, optimizer, easgd.EASGD(tau=4))

    def after() -> None:
        if worker.t == 10:
            Path("run", "under-way").touch()

    epochs_of(worker, model, optimizer, worker.loader(digits()[0], 32), 10**6, after)


def keeps_its_own_checkpoints(worker: LoopWorker, folder: str, epochs: int) -> None:
    """Saves its state itself at the end, and starts from what it finds."""
    model = Odd()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.003)
    file = Path(folder, f"{worker.rank}.pt")
    if file.exists():
        worker.load_state_dict(torch.load(file, weights_only=False))
    worker.attach(model, optimizer, easgd.EASGD(tau=4))
    began = worker.t
    epochs_of(worker, model, optimizer, worker.loader(digits()[0], 32), epochs)
    torch.save(worker.state_dict(), file)
    Path(folder, f"{worker.rank}.txt").write_text(f"{began} {worker.t}")


def short_and_long(worker: LoopWorker, steps: tuple[int, ...], stop_at: int = 0, evaluate: Any = None) -> None:
    """Each worker makes its own number of steps; a loop that is longer now goes on."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    worker.attach(model, optimizer, easgd.EASGD(tau=4), evaluate=evaluate, evaluate_every=20 if evaluate else 0)
    loader = worker.loader(digits()[0], 32)
    while worker.t < steps[worker.rank]:
        for inputs, targets in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            if worker.t == stop_at and worker.rank == 1:
                os.kill(int(os.environ["LAUNCHER"]), signal.SIGINT)
            if worker.t == steps[worker.rank]:
                break


def start_method(worker: LoopWorker, folder: str) -> None:
    (Path(folder) / f"{worker.rank}").write_text(multiprocessing.get_start_method())
    train(worker)


def never_recovers(worker: LoopWorker) -> None:
    """Worker 1 dies after some steps, and in every later life before it has attached."""
    marker = Path(os.environ["MARKER"])
    if worker.rank == 1 and marker.exists():
        raise RuntimeError("not again")
    killed(worker, 2)


def broken(model: nn.Module) -> dict[str, Any]:
    raise KeyError("no such metric")


def swallows_exceptions(worker: LoopWorker) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    worker.attach(model, optimizer, easgd.EASGD(tau=4), evaluate=broken_later, evaluate_every=8)
    for inputs, targets in worker.loader(digits()[0], 32):
        try:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        except Exception:
            continue


calls = 0


def broken_later(model: nn.Module) -> dict[str, Any]:
    global calls
    calls += 1
    return broken(model) if calls > 1 else {}


class WithExtras(nn.Module):
    """A buffer assigned in forward, and state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.words = network(), ["new"]
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = 0.5 * self.mean + 0.5
        return self.body(x)

    def get_extra_state(self) -> list[str]:
        return self.words

    def set_extra_state(self, state: list[str]) -> None:
        self.words = state


def extras(worker: LoopWorker, epochs: int, stop_at: int = 0) -> None:
    model = WithExtras()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, t / 5))
    worker.attach(model, optimizer, easgd.EASGD(tau=4), stateful=[warm_up], evaluate=mean_of)
    model.words.append("trained")

    def after() -> None:
        warm_up.step()
        if stop_at and worker.rank == 1 and worker.t == stop_at:
            os.kill(int(os.environ["LAUNCHER"]), signal.SIGINT)

    epochs_of(worker, model, optimizer, worker.loader(digits()[0], 32), epochs, after)


def mean_of(model: nn.Module) -> dict[str, Any]:
    return {"mean": model.mean}


def diloco(worker: LoopWorker, epochs: int) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    worker.attach(model, optimizer, easgd.DiLoCo(tau=11), evaluate=scores, evaluate_every=11)
    epochs_of(worker, model, optimizer, worker.loader(digits()[0], 32), epochs)


def steps_another_optimizer(worker: LoopWorker) -> None:
    model = nn.Linear(3, 2)
    worker.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), easgd.EASGD())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
