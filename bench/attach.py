"""What does attach cost a training loop? ResNet-18, τ = 10, beside the same loop without it.

Each worker has two copies of the network, one attached and one not, and trains them by turns, τ steps of the one and
τ steps of the other, so that a machine that slows down for a while slows both; a block of τ attached steps holds one
whole exchange, waiting for the other worker included. `overhead_share` is taken block by block.

First the result is checked: with α = 0 the exchange changes nothing, so both copies end with the same bits.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import torch
from harness import Row, about, arguments, record, spread
from torch import nn

import easgd_local as easgd

TAU = 10
SIDE, CLASSES = 32, 10


def network(width: int) -> nn.Module:
    """ResNet-18 for small pictures; for --quick one of the same sort with less to do."""
    torch.manual_seed(0)
    if width == 64:
        from torchvision.models import resnet18

        return resnet18(num_classes=CLASSES)
    body = [nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(width, CLASSES))


def loops(worker: easgd.LoopWorker, width: int, batch_size: int, blocks: int, folder: str) -> None:
    """What a worker does: `blocks` times τ steps of each of the two, timed."""
    models = [network(width), network(width)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9) for model in models]
    worker.attach(models[1], optimizers[1], easgd.EASGD(tau=TAU, alpha=0.0), buffers="local")
    seconds: list[list[float]] = [[], []]
    for block in range(blocks + 1):  # the first is not counted
        for which in (0, 1):
            generator = torch.Generator().manual_seed(block)
            began = time.perf_counter()
            for _ in range(TAU):
                inputs = torch.randn(batch_size, 3, SIDE, SIDE, generator=generator)
                targets = torch.randint(CLASSES, (batch_size,), generator=generator)
                optimizers[which].zero_grad()
                nn.functional.cross_entropy(models[which](inputs), targets).backward()
                optimizers[which].step()
            seconds[which].append((time.perf_counter() - began) / TAU)
    assert all(torch.equal(one, other) for one, other in zip(*(m.parameters() for m in models), strict=True))
    Path(folder, f"{worker.rank}.json").write_text(json.dumps([times[1:] for times in seconds]))


def measure(workers: int, threads: int, width: int, batch_size: int, blocks: int) -> Row:
    """One row: all workers' blocks together."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (width, batch_size, blocks, folder)
        center = easgd.launch(
            loops, workers=workers, threads=threads, args=arguments, out=Path(folder, "run"), view=False
        )  # fmt: skip
        times = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(workers)]
    plain, attached = ([second for one in times for second in one[which]] for which in (0, 1))
    return {
        "entry": f"{workers} {'workers' if workers > 1 else 'worker'}, batches of {batch_size}",
        "parameters": center.summary["parameters"], "batch_size": batch_size, "threads": threads, "tau": TAU,
        "step_s": spread(plain), "attached_step_s": spread(attached),
        "overhead_share": spread(a / p - 1 for a, p in zip(attached, plain, strict=True)),
    }  # fmt: skip


def main() -> None:
    given = arguments("What does attach cost a training loop?").parse_args()
    common = about("attach")
    width, batch_sizes, blocks = (4, (2,), 2) if given.quick else (64, (32, 128), 9)
    blocks = given.repetitions or blocks
    settings = [(p, size) for size in batch_sizes for p in ((2,) if given.quick else (1, 2))]
    record([measure(p, max(1, 2 // p), width, size, blocks) for p, size in settings], common, given)


if __name__ == "__main__":
    main()
