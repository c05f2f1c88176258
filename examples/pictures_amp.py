"""ResNet-18 with mixed precision on a folder of pictures, DIR/train/CLASS/*.png and DIR/test/CLASS/*.png.

    python examples/pictures_amp.py                      # some pictures of patterns, made for the purpose
    python examples/pictures_amp.py --data DIR --size 224 --epochs 30
    python examples/pictures_amp.py --resume runs/...    # after Ctrl-C; give the other options as before

It shows autocast with a GradScaler, a learning-rate schedule, the three policies for BatchNorm's statistics, the
evaluation of the center during the run, and runs that go on where they were interrupted.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18

import easgd_local as easgd


def pictures(folder, size):
    """The pictures for training, cut and flipped at random, and those for testing."""
    changed = transforms.Compose([
        transforms.RandomResizedCrop(size, scale=(0.5, 1.0)), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
    ])  # fmt: skip
    unchanged = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()])
    return ImageFolder(Path(folder) / "train", changed), ImageFolder(Path(folder) / "test", unchanged)


def train(worker, options):
    trainset, testset = pictures(options.data, options.size)
    device = worker.device.type
    half = torch.float16 if device == "cuda" else torch.bfloat16

    model = resnet18(num_classes=len(trainset.classes)).to(worker.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    scaler = torch.amp.GradScaler(device)

    def evaluate(model):
        """Of the center: called in one worker, without gradients."""
        losses, errors = 0.0, 0
        for inputs, targets in DataLoader(testset, batch_size=64):
            inputs, targets = inputs.to(worker.device), targets.to(worker.device)
            answers = model(inputs)
            losses += F.cross_entropy(answers, targets, reduction="sum").item()
            errors += (answers.argmax(1) != targets).sum().item()
        return {"test_loss": losses / len(testset), "test_error": errors / len(testset)}

    worker.attach(
        model, optimizer, easgd.EASGD(tau=4, beta=0.9), stateful=[schedule, scaler],
        buffers=options.buffers,
        calibrate_on=DataLoader(trainset, batch_size=64, shuffle=True) if options.buffers == "recalibrate" else None,
        evaluate=evaluate, evaluate_every=20,
    )  # fmt: skip
    loader = worker.loader(trainset, batch_size=16, num_workers=options.readers)
    for _ in range(loader.epoch, options.epochs):  # a resumed run begins in the epoch in which it was interrupted
        for inputs, targets in loader:
            inputs, targets = inputs.to(worker.device), targets.to(worker.device)
            optimizer.zero_grad()
            with torch.autocast(device, dtype=half):
                loss = F.cross_entropy(model(inputs), targets)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            worker.log(loss=loss)
        schedule.step()


def draw(folder, train=64, test=16, size=32):
    """Stripes, checks and rings in noise, the same in every run: so many of each for training and for testing."""
    y, x = np.mgrid[:size, :size]
    rng = np.random.default_rng(0)
    for name, count in (("train", train), ("test", test)):
        for number in range(count):
            shift, width = rng.uniform(0, 8), rng.uniform(3, 6)
            patterns = {
                "checks": np.sin((x + shift) / width * 3) * np.sin((y + shift) / width * 3),
                "columns": np.sin((x + shift) / width * 3),
                "rings": np.sin((np.hypot(x - size / 2, y - size / 2) + shift) / width * 3),
                "rows": np.sin((y + shift) / width * 3),
            }
            for pattern, values in patterns.items():
                bright, noise = rng.uniform(20, 60, size=3), rng.normal(0, 40, size=(size, size, 3))
                picture = (128 + values[..., None] * bright + noise).clip(0, 255).astype(np.uint8)
                file = Path(folder) / name / pattern / f"{number:04}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(file)


def main(options):
    try:
        center = easgd.launch(
            train, workers=options.workers, device=options.device, args=(options,), out=options.out,
            resume=options.resume,
        )  # fmt: skip
    except KeyboardInterrupt:  # the run is saved
        sys.exit(130)
    print(f"test error of the center: {center.summary['test_error']:.1%}")
    print(f"run folder: {center.folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="folder of pictures; default: patterns made for the purpose")
    parser.add_argument("--size", type=int, default=32, help="side of a picture as the network sees it, in pixels")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training pictures")
    parser.add_argument("--workers", type=int, default=2, help="worker processes")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where they compute")
    parser.add_argument("--readers", type=int, default=0, help="processes of each worker that read pictures")
    parser.add_argument("--buffers", choices=["average", "recalibrate", "local"], default="average",
                        help="what becomes of BatchNorm's statistics at the center")  # fmt: skip
    parser.add_argument("--out", metavar="FOLDER", help="the run folder; default runs/TIME-train")
    parser.add_argument("--resume", metavar="FOLDER", help="go on with the interrupted run in this folder")
    options = parser.parse_args()

    if options.data:
        main(options)
    else:
        with tempfile.TemporaryDirectory() as options.data:
            draw(options.data)
            main(options)
