"""The command line: one sentence for each mistake, exit code 2, nothing left behind; and what --help says."""

import contextlib
import errno
import fcntl
import gc
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from easgd_local import __version__, checkpoint, cli, hardware, models
from easgd_local.config import Config
from easgd_local.fork_server import warm_up
from easgd_local.rules import RULES
from tests.conftest import children, eventually

FLAGS = (
    "lr tau alpha beta rho beta-per momentum first average-rate beta1 beta2 epsilon delay full-steps inner "
    "center-momentum outer-lr outer-momentum "
    "workers device data data-dir image-size memory-budget model steps epochs batch-size weight-decay sampling seed "
    "turns schedule warmup lr-step lr-decay "
    "precision compile tf32 nondeterministic exchange channels-last buffers block-bytes threads eval-every "
    "eval-samples checkpoint-every keep out on-failure tensorboard resume"
).split()

Refused = Callable[..., str]


def descriptors() -> dict[str, str]:
    """The open descriptors of this process and what they lead to."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that listed them
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return found


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True, scope="module")
def nothing_to_collect() -> None:
    """Centers that other tests have left to the garbage collector must not go while descriptors are compared."""
    gc.collect()


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command line that must be refused with one sentence and leave nothing behind; returns the sentence."""
    warm_up("easgd_local.preload_loop")

    def attempt(*arguments: str) -> str:
        before, files = descriptors(), sorted(here.rglob("*"))
        try:
            code = cli.main(arguments)
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        assert code == 2
        assert not said.out or (said.out.startswith("loading ") and said.out.count("\n") == 1)
        assert re.fullmatch(r"easgd-local: error: [^\n]+[.?]\n", said.err), said.err
        assert descriptors().items() <= before.items()  # of an earlier test something may be collected meanwhile
        assert eventually(lambda: not children())  # the fork server may still be starting
        assert sorted(here.rglob("*")) == files
        return said.err.removeprefix("easgd-local: error: ").rstrip("\n")

    return attempt


class Reached(Exception):
    """A command line has been accepted: the run would start now."""


@pytest.fixture
def accepted(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs a command line up to the start of the run; returns what was prepared."""

    def attempt(*arguments: str) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def start(self: Any, prepared: Any, listeners: Any) -> None:
            found.update(vars(prepared))
            raise Reached

        with monkeypatch.context() as patch:
            patch.setattr("easgd_local.training.Training.__init__", start)
            with pytest.raises(Reached):
                cli.main(arguments)
        return found

    return attempt


# Wrong words


@pytest.mark.parametrize("line, sentence", [
    ("", "COMMAND is missing: give one of train, compare, theory, simulate, export, doctor; see easgd-local --help."),
    ("trian easgd", "COMMAND=trian: must be one of .* doctor, did you mean train; see easgd-local --help."),
    ("train", "RULE is missing: give the algorithm: easgd, eamsgd, .*; see easgd-local train --help."),
    ("train --tau 3", "RULE is missing"),
    ("train easgdd", r"rule=easgdd: the rules are easgd, .*; did you mean easgd\?"),
    ("train adagrad", "rule=adagrad: the rules are easgd, .*; choose one of them."),
    ("train easgd msgd", "msgd: not understood.* one RULE; leave it out"),
    ("train easgd --stepps 5", "--stepps: there is no such flag, did you mean --steps; see easgd-local train --help."),
    ("train easgd --mom 0.3", "--mom: there is no such flag, did you mean --momentum"),
    ("train easgd --batch-siz=3", "--batch-siz: there is no such flag, did you mean --batch-size"),
    ("train easgd --xyz 3", "--xyz: there is no such flag; see"),
    ("train --xyz 3 easgd", "--xyz: there is no such flag; see"),
    ("train easgd -w 3", "-w: there is no such flag, did you mean --workers"),
    ("train easgd --lr", "--lr: a value must follow; one that begins with a minus is written --lr=VALUE."),
    ("train easgd --lr -inf", "--lr: a value must follow"),
    ("train easgd --lr --tau 3", "--lr: a value must follow"),
    ("train easgd --tensorboard=yes", "--tensorboard: takes no value; write --tensorboard alone."),
    ("train easgd --steps 1.5", "--steps: '1.5' is not a whole number; write it in digits"),
    ("train easgd --tau ten", "--tau: 'ten' is not a whole number"),
    ("train easgd --lr small", "--lr: 'small' is not a number; write it like 0.05"),
])  # fmt: skip
def test_a_wrong_word_is_answered_with_one_sentence(line: str, sentence: str, refused: Refused) -> None:
    assert re.match(sentence, refused(*line.split()))


def test_flags_cannot_be_abbreviated(refused: Refused) -> None:
    for flag in FLAGS:
        if flag[:-1] not in FLAGS:
            assert refused("train", "easgd", f"--{flag[:-1]}", "1").startswith(f"--{flag[:-1]}: there is no such flag")


# Wrong values


@pytest.mark.parametrize("line, sentence", [
    ("easgd --tau 0", "tau=0: a worker visits the center every tau steps, so tau must be at least 1; .*alpha=0."),
    ("easgd --tau -3", "tau=-3: .* tau must be at least 1"),
    ("easgd --alpha 1.01", r"alpha=1.01: the moving rate must lie in \[0, 1\]; leave it out for .*0.9/workers."),
    ("easgd --alpha -0.1", "alpha=-0.1: the moving rate"),
    ("easgd --alpha nan", "alpha=nan: the moving rate"),
    ("easgd --alpha 0.1 --beta 0.9", "alpha=0.1 and beta=0.9: .* give only one"),
    ("easgd --beta 0.4 --rho 0.9", "beta=0.4 and rho=0.9: .* give only one"),
    ("easgd --beta 9", r"beta=9.0: α = β/p = 2.25, but .* \[0, 1\]; choose beta at most p = 4."),
    ("easgd --beta 2.5 --workers 2", "beta=2.5: α = β/p = 1.25, .* at most p = 2."),
    ("eamsgd --rho 30", r"rho=30.0: α = ηρ = 1.5, but .* \[0, 1\]; choose rho at most 1/lr = 20."),
    ("easgd --beta -1", "beta=-1.0: must be at least 0"),
    ("easgd --rho inf", "rho=inf: must be at least 0"),
    ("eamsgd --momentum 1", "momentum=1.0: δ must be at least 0 and below 1, .*; try 0.9."),
    ("msgd --momentum -0.1", "momentum=-0.1: δ must be at least 0"),
    ("msgd --momentum nan", "momentum=nan: δ"),
    ("easgd --lr 0", "lr=0.0: the step size must be positive and finite; try 0.05."),
    ("sgd --lr nan", "lr=nan: the step size"),
    ("sgd --lr inf", "lr=inf: the step size"),
    ("sgd --lr=-1e-3", "lr=-0.001: the step size"),
    ("easgd --momentum 0.9", "momentum=0.9: the rule easgd has no momentum, only lr, tau.*; leave --momentum out, .*"),
    ("sgd --tau 10", "tau=10: the rule sgd has no tau, only lr; .* a rule that has it: easgd, eamsgd"),
    ("sgd --workers 4", "workers=4: the rule sgd is sequential; use workers=1, or the rule easgd."),
    ("easgd --workers 0", "workers=0: must be at least 1"),
    ("easgd --workers 100", "workers=100: one machine runs at most 64"),
    ("easgd --workers 8 --batch-size 200", "batch_size=200 x workers=8 = 1600 samples a step, but there are 1437"),
    ("sgd --batch-size 1438 --sampling independent", "batch_size=1438, but there are 1437 samples"),
    ("easgd --batch-size 0", "batch_size=0: must be at least 1"),
    ("easgd --steps 100 --epochs 3", "steps=100 and epochs=3.0: both fix the length of the run; give one."),
    ("easgd --steps 0", "steps=0: must be at least 1"),
    ("easgd --steps 1000000000001", r"steps=1000000000001: must be at most 10\^12"),
    ("easgd --epochs -1", "epochs=-1.0: must be positive"),
    ("easgd --epochs nan", "epochs=nan: must be positive"),
    ("easgd --epochs 1e308", r"epochs=1e\+308: that is more than 10\^12 steps; choose a smaller value."),
    ("easgd --weight-decay -1", "weight_decay=-1.0: must be at least 0 and finite; 0 switches it off."),
    ("easgd --weight-decay nan", "weight_decay=nan: must be"),
    ("easgd --seed -1", "seed=-1: must be at least 0"),
    ("easgd --seed 9223372036854775808", r"seed=9223372036854775808: must be below 2\^63"),
    ("easgd --threads 0", "threads=0: must be at least 1"),
    ("easgd --threads 5000", "threads=5000: must be at most 1024; leave it out for cores / workers."),
    ("easgd --keep 0", "keep=0: must be at least 1"),
    ("easgd --eval-every -1", "eval_every=-1: must be at least 0"),
    ("easgd --eval-samples 0", "eval_samples=0: must be at least 1"),
    ("easgd --checkpoint-every -1", "checkpoint_every=-1: must be at least 0"),
    ("easgd --block-bytes 3", "block_bytes=3: must be at least 64"),
    ("easgd --turns loose", "turns=loose: must be one of strict, free"),
    ("ddp", "rule=ddp: is PyTorch's own way and no rule; compare rules with it: easgd-local compare eamsgd ddp."),
    ("easgd --precision fp8", "precision=fp8: must be one of fp32, bf16, fp16, bf16-true, fp16-true"),
    ("easgd --sampling all", "sampling=all: must be one of shard, independent"),
    ("easgd --buffers local", "buffers=local: must be one of average, recalibrate"),
    ("easgd --on-failure panic", "on_failure=panic: must be one of continue, respawn, stop"),
    ("easgd --device tpu", "device=tpu: must be one of auto, cpu, cuda"),
    ("easgd --model resnet_18", "model 'resnet_18' is not known, did you mean 'resnet18': ours are mlp, cifar7"),
    ("easgd --model resnet18", "ResNet does not take pictures of 1 channel and 8 x 8 pixels: .*; use pictures of"),
    ("easgd --model cifar7", "cifar7 has nothing left of a picture of 1 channel and 8 x 8 pixels: .* larger pictures"),
    ("easgd --data digit", "data 'digit' is not known, did you mean 'digits': it must be one of digits, cifar10"),
    ("easgd --data mnist", "data 'mnist' is not known: it must be one of digits, cifar10.* for your own pictures"),
    ("easgd --data-dir .", r"data_dir=\.: digits is read from no folder; leave data_dir out, or use imagefolder."),
    ("easgd --image-size 32", "image_size=32: the pictures of digits have a fixed size; .* only with imagefolder."),
    ("easgd --memory-budget 2", r"memory_budget=2 \(GiB\): digits is always held in memory; .* only with imagefolder."),
    ("easgd --data imagefolder", "data_dir=None: an image folder has no default place; give the folder"),
    ("easgd --data imagefolder --data-dir missing", "data_dir=missing: there is no such folder; give the folder"),
    ("easgd --data imagefolder --data-dir .", r"data_dir=\.: it has no folder train/; .* train/<class>/"),
    ("easgd --data imagefolder --data-dir . --image-size 7", "image_size=7: must be at least 8"),
    ("easgd --data imagefolder --data-dir . --memory-budget 0", "memory_budget=0.0: must be positive"),
])  # fmt: skip
def test_a_wrong_value_is_answered_with_one_sentence(line: str, sentence: str, refused: Refused) -> None:
    assert re.match(sentence, refused("train", *line.split()))


def test_device_cuda_is_refused_without_a_driver(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASGD_LIBCUDA", "libnowhere.so")
    said = refused("train", "easgd", "--device", "cuda")
    assert re.match("device=cuda: NVIDIA's driver was not found .libnowhere.so: .*; install it, .* use the CPU.", said)


def test_wrong_flags_are_told_before_torch_is_imported_and_a_process_started() -> None:
    for line in ("train easgd --tau 0", "train sgd --alpha 1", "train easgd --workers 0", "train easgd --x", "train"):
        code = (
            "import sys\nfrom easgd_local import cli\n"
            f"try: code = cli.main({line.split()})\nexcept SystemExit as end: code = end.code\n"
            "sys.exit(code if not {'torch', 'multiprocessing.forkserver'} & set(sys.modules) else 99)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "easgd_local", "train", "sgd", "--lr", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "easgd-local: error: lr=0.0: the step size must be positive and finite; try 0.05.\n"


# The run folder


def test_a_folder_with_another_run_in_it_is_refused(here: Path, refused: Refused) -> None:
    (here / "old").mkdir()
    (here / "old" / "config.json").touch()
    sentence = refused("train", "easgd", "--out", "old")
    assert re.match("out=old: exists already and is not an empty folder; choose another, or .* --resume old.", sentence)


def test_a_file_in_place_of_the_folder_is_refused(here: Path, refused: Refused) -> None:
    (here / "file").touch()
    assert re.match("out=file: exists already and is not an empty folder", refused("train", "easgd", "--out", "file"))
    sentence = refused("train", "easgd", "--out", "file/run")
    assert re.match("out=file/run: cannot be created \\((file: )?(File exists|Not a directory)\\); choose", sentence)


def test_a_current_folder_that_is_no_more_is_told(here: Path, refused: Refused) -> None:
    here.rmdir()
    assert refused("doctor") == "the current folder has been deleted; change into another one."


@pytest.mark.parametrize("out", ["/proc/easgd/run", "a/" * 3 + "b" * 300])
def test_an_impossible_place_is_refused_and_no_parent_is_left(out: str, refused: Refused) -> None:
    sentence = refused("train", "easgd", "--out", out)
    assert re.match(f"out={out}: cannot be created .*; choose with --out a place", sentence)


def test_without_a_place_for_runs_the_default_folder_is_refused(here: Path, refused: Refused) -> None:
    (here / "runs").touch()
    assert re.match(r"out=runs: cannot be created \(File exists\); choose with --out", refused("train", "easgd"))


def test_a_folder_that_must_not_be_written_is_refused(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", forbidden)
        assert re.match("out=new: cannot be created .*Permission denied", refused("train", "easgd", "--out", "new"))
        assert re.match("out=runs: cannot be created .*Permission denied", refused("train", "easgd"))
    monkeypatch.setattr(Path, "write_text", forbidden)
    assert re.match("a/new: cannot be written to .*Permission", refused("train", "easgd", "--out", "a/new"))


def test_runs_that_begin_in_the_same_second_get_folders_of_their_own(
    here: Path, accepted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.strftime", lambda pattern: "20200101-120000")
    folders = [accepted("train", "sgd")["plan"].folder for _ in range(3)]
    assert [folder.name for folder in folders] == ["20200101-120000-sgd" + end for end in ("", "-2", "-3")]


def test_an_empty_folder_is_taken(here: Path, accepted: Callable[..., Any]) -> None:
    (here / "empty").mkdir()
    assert accepted("train", "sgd", "--out", "empty")["plan"].folder == Path("empty")


# Memory and packages


def test_a_center_without_room_is_refused(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "available_bytes", lambda: 100_000)
    sentence = refused("train", "easgd")
    assert re.match("workers=4: .* take [0-9,]+ bytes and only 100,000 are available; choose fewer workers", sentence)


def test_data_without_room_is_refused(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = iter([2**30, 2**30, 1000])  # enough for the vectors and the center, not for the data
    monkeypatch.setattr(hardware, "available_bytes", lambda: next(rooms))
    assert re.match(r"data set digits takes 0.0 GiB of shared memory: .*; free memory", refused("train", "easgd"))


def test_memory_that_the_system_refuses_is_told(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, offset: int, size_bytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    assert refused("train", "easgd").startswith("center of ")


def test_a_model_without_room_is_refused(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes.")

    monkeypatch.setattr("easgd_local.models.build", refuse)
    assert re.match("model=mlp: there is no memory .*; choose a smaller model", refused("train", "easgd"))


def test_tensorboard_is_missed_before_the_training(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    sentence = refused("train", "easgd", "--tensorboard", "--out", "run")
    assert re.match(r"tensorboard=True: the package .* pip install 'easgd_local\[tensorboard\]', or leave", sentence)


def test_an_interrupt_before_the_training_ends_quietly(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("easgd_local.prepare.prepare", interrupt)
    assert cli.main(["train", "easgd"]) == 130
    assert capsys.readouterr().err == "easgd-local: error: interrupted before the training began.\n"


# A run, and going on with it


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A run of 20 steps with checkpoints at 10 and 20, α beyond the stability bound; and what the command printed."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    line = f"train easgd --alpha 1 --tau 3 --workers 2 --batch-size 8 --steps 20 --checkpoint-every 10 --out {folder}"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main([*line.split(), "--eval-every", "0", "--threads", "1"]) == 0
    yield folder, printed.getvalue()


@pytest.fixture
def old(finished: tuple[Path, str], here: Path) -> Path:
    """A copy of that run, under the name `old`."""
    shutil.copytree(finished[0], here / "old")
    return Path("old")


def test_a_run_prints_its_result_and_where_it_is(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    flat = re.sub(r"\s+", " ", printed)
    assert "done" in flat and "center test error" in flat
    assert json.loads((folder / "summary.json").read_text())["center_sha256"] in flat


def test_alpha_beyond_the_stability_bound_is_only_warned_about(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    [warning] = json.loads((folder / "summary.json").read_text())["warnings"]
    found = re.match(r"alpha=1 is beyond the stability bound .* = (0\.\d+) of easgd with turns=strict at lr", warning)
    assert found and found[1] in printed
    effective = json.loads((folder / "config.json").read_text())["effective"]
    room = 2 - 0.2 * effective["curvature"]
    assert float(found[1]) == pytest.approx(2 * room / (2 + room), abs=1e-4)


RESUME = ("train", "easgd", "--resume", "old")


@pytest.mark.parametrize("line, sentence", [
    ("train eamsgd", "rule=eamsgd: the run in old was started with rule=easgd, .*; name easgd, or start a new run."),
    ("train easgd --lr 0.1", "lr=0.1: the run in old was started with lr=0.2, and .*; leave --lr out, or start"),
    ("train easgd --tau 4", "tau=4: the run in old was started with tau=3"),
    ("train easgd --alpha 0.5", "alpha=0.5: the run in old was started with alpha=1.0"),
    ("train easgd --beta 0.5", "beta=0.5: the run in old was started without beta"),
    ("train easgd --momentum 0.5", "momentum=0.5: the rule easgd has no momentum"),
    ("train easgd --seed 1", "seed=1: the run in old was started with seed=0"),
    ("train easgd --batch-size 9", "batch_size=9: the run in old was started with batch_size=8, .* leave --batch-"),
    ("train easgd --data synthetic", "data=synthetic: the run in old was started with data=digits"),
    ("train easgd --model cifar7", "model=cifar7: the run in old was started with model=mlp"),
    ("train easgd --weight-decay 0", "weight_decay=0.0: the run in old was started with weight_decay=0.0001"),
    ("train easgd --sampling independent", "sampling=independent: the run in old"),
    ("train easgd --precision bf16", "precision=bf16: the run in old"),
    ("train easgd --turns free", "turns=free: the run in old"),
    ("train easgd --threads 2", "threads=2: the run in old was started with threads=1"),
    ("train easgd --block-bytes 64", "block_bytes=64: the run in old"),
    ("train easgd --out new", "out=new: a resumed run goes on in its own folder old; leave --out out."),
    ("train easgd", "steps=20: the run in old has its newest checkpoint at step 20, so nothing .* give more --steps."),
    ("train easgd --steps 7", "steps=7: .* newest checkpoint at step 20, so nothing is left to do; give more --steps."),
    ("train easgd --epochs 0.01", "epochs=0.01: .* newest checkpoint at step 20, so nothing is left .* more --epochs."),
    ("train easgd --steps 40 --epochs 9", "steps=40 and epochs=9.0: both"),
    ("train easgd --steps 40 --workers 0", "workers=0: must be at least 1"),
    ("train easgd --steps 40 --workers 200", "workers=200: one machine"),
])  # fmt: skip
def test_a_run_is_not_resumed_as_another_one(line: str, sentence: str, old: Path, refused: Refused) -> None:
    assert re.match(sentence, refused(*line.split(), "--resume", "old"))


def test_what_does_not_change_the_run_may_change_when_it_is_resumed(old: Path, accepted: Callable[..., Any]) -> None:
    line = "--steps 40 --lr 0.2 --eval-every 7 --checkpoint-every 9 --keep 5 --on-failure stop --out ./old"
    prepared = accepted(*RESUME, *line.split())
    assert prepared["t"] == 20 and prepared["plan"].calendar.steps == 40 and sorted(prepared["starts"]) == [0, 1]
    assert all(start.saved == Path("old/checkpoints/step-00000020") for start in prepared["starts"].values())
    # What holds from here on is recorded, so that the next continuation needs no flags.
    again = accepted(*RESUME)
    assert (again["config"].keep, again["config"].on_failure, again["plan"].calendar.steps) == (5, "stop", 40)


def test_a_run_is_resumed_for_some_epochs_and_then_for_some_steps(old: Path, accepted: Callable[..., Any]) -> None:
    assert accepted(*RESUME, "--epochs", "1")["plan"].calendar.steps == 90  # ⌈1437 / (8 · 2)⌉
    assert accepted(*RESUME)["plan"].calendar.steps == 90
    assert accepted(*RESUME, "--steps", "33")["plan"].calendar.steps == 33


def test_another_number_of_workers_is_warned_about(old: Path, accepted: Callable[..., Any]) -> None:
    prepared = accepted(*RESUME, "--steps", "40", "--workers", "3")
    assert any("with 3 workers instead of 2" in warning for warning in prepared["warnings"])
    assert all(start.saved is None and start.t == 20 for start in prepared["starts"].values())


def test_a_resumed_run_goes_on_and_writes_for_tensorboard(old: Path) -> None:
    threads = threading.active_count()
    assert cli.main([*RESUME, "--steps", "22", "--tensorboard"]) == 0
    assert json.loads((old / "summary.json").read_text())["steps"] == 22
    assert json.loads((old / "config.json").read_text())["config"]["steps"] == 22
    assert list((old / "tensorboard").glob("events.*"))
    assert threading.active_count() == threads  # its writer is closed


def test_a_folder_that_is_no_run_is_not_resumed(here: Path, refused: Refused) -> None:
    (here / "empty").mkdir()
    (here / "file").touch()
    for name, why in (("missing", "No such file"), ("file", "Not a directory"), ("empty", "No such file")):
        sentence = refused("train", "easgd", "--resume", name)
        assert re.match(rf"resume={name}: no run is there \(config.json: {why}.*\); name the folder of", sentence)


def test_a_run_without_checkpoint_is_not_resumed(old: Path, refused: Refused) -> None:
    shutil.rmtree(old / "checkpoints")
    sentence = refused(*RESUME, "--steps", "40")
    assert re.match("resume=old: this run has no checkpoint .*; start it again, .*--checkpoint-every", sentence)


def test_a_run_in_progress_is_not_resumed(old: Path, refused: Refused, accepted: Callable[..., Any]) -> None:
    fd = os.open(old, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    for arguments in (("--steps", "40"), ()):
        assert re.match("resume=old: this run is still in progress; wait for its end", refused(*RESUME, *arguments))
    os.close(fd)
    accepted(*RESUME, "--steps", "40")


def test_a_run_holds_its_folder_while_it_lasts(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(self: Any, prepared: Any, listeners: Any) -> None:
        fd = os.open(prepared.plan.folder, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Reached from None
        finally:
            os.close(fd)

    monkeypatch.setattr("easgd_local.training.Training.__init__", look)
    with pytest.raises(Reached):
        cli.main(["train", "sgd", "--out", "new"])


@pytest.mark.parametrize("name", ["worker-1.safetensors", "center.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_named_with_what_to_remove(name: str, old: Path, refused: Refused) -> None:
    folder = old / "checkpoints" / "step-00000020"
    whole = (folder / name).read_bytes()
    place = random.Random(name).randrange(len(whole))
    for damage in (whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :], whole[:-1], b"", None):
        (folder / name).unlink()
        if damage is not None:
            (folder / name).write_bytes(damage)
        sentence = refused(*RESUME, "--steps", "40")
        assert re.match(f"{folder}/{name}: .*remove {folder} to use the checkpoint before it", sentence)
        (folder / name).write_bytes(whole)


def test_removing_the_damaged_checkpoint_helps(old: Path, accepted: Callable[..., Any]) -> None:
    shutil.rmtree(old / "checkpoints" / "step-00000020")
    assert accepted(*RESUME, "--steps", "40")["t"] == 10


def test_a_configuration_that_was_changed_by_hand_is_refused(old: Path, refused: Refused) -> None:
    path = old / "config.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 8'))
    sentence = refused(*RESUME, "--steps", "40")
    assert sentence.startswith("old/config.json: says seed=8, but the checkpoint was written with seed=0; put")


def test_a_checkpoint_of_another_model_is_refused(old: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    build = models.build
    monkeypatch.setattr(models, "build", lambda name, shape, classes: build(name, shape=shape, classes=classes + 1))
    sentence = refused(*RESUME, "--steps", "40")
    assert re.match("old/checkpoints/step-00000020: holds a model of 17,.* the data folder or the model has", sentence)


def test_a_checkpoint_of_another_version_is_not_resumed(old: Path, refused: Refused, monkeypatch: Any) -> None:
    load = checkpoint.load_vectors
    older = lambda folder, name: {key: value for key, value in load(folder, name).items() if key != "updates"}  # noqa: E731
    monkeypatch.setattr(checkpoint, "load_vectors", older)
    sentence = refused(*RESUME, "--steps", "40")
    assert re.match(".*step-00000020: lacks updates, so another version .* wrote it; ", sentence)


@pytest.mark.parametrize("text", [
    "", "[]", "5", "null", "{", '{"config": 5}', '{"config": {}}', '{"config": {"rule": 5}}', "\udcff",
    '{"config": {"rule": {"name": "easgd", "gamma": 1}}}', '{"config": {"rule": {"name": "easgd"}, "color": "red"}}',
    '{"config": {"rule": {"name": "easgd", "lr": "0.1"}}}', '{"config": {"rule": {"name": "easgd", "lr": -1}}}',
    '{"config": {"rule": {"name": "easgd"}, "steps": "20"}}', '{"config": {"rule": {"name": "easgd"}, "faults": [{}]}}',
    '{"config": {"rule": {"name": "dogsgd"}}}', '{"config": {"rule": {"name": ["easgd"]}}}',
    '{"config": {"rule": {"name": "easgd"}, "data_dir": 5}}',
])  # fmt: skip
def test_a_broken_configuration_is_not_resumed(text: str, old: Path, refused: Refused) -> None:
    (old / "config.json").write_text(text, errors="surrogateescape")
    sentence = refused(*RESUME, "--steps", "40")
    assert re.match("resume=old: its config.json is damaged or .*; restore it, or start a new run.", sentence)


def test_no_flipped_bit_of_the_configuration_crashes(
    old: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(self: Any, prepared: Any, listeners: Any) -> None:
        raise Reached

    monkeypatch.setattr("easgd_local.training.Training.__init__", start)
    whole, rng = (old / "config.json").read_bytes(), random.Random(0)
    places = rng.sample(range(whole.index(b'"versions"')), 40)  # what comes after is not read
    for place in places:
        flipped = bytes([whole[place] ^ 1 << rng.randrange(8)])
        (old / "config.json").write_bytes(whole[:place] + flipped + whole[place + 1 :])
        with contextlib.suppress(Reached):  # another value may be a valid one
            refused(*RESUME, "--steps", "40")
        capsys.readouterr()


# Help


def help_of(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, "--help"])
    said = capsys.readouterr()
    assert (end.value.code, said.err) == (0, "")
    return said.out


def test_the_flags_of_train_are_these() -> None:
    [commands] = [action for action in cli.parser()._actions if action.dest == "command"]
    known = {flag for action in commands.choices["train"]._actions for flag in action.option_strings}
    assert known == {"-h", "--help", *(f"--{flag}" for flag in FLAGS)}


def test_help_describes_every_flag_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of("train", capsys=capsys)
    paragraphs = dict(re.findall(r"^  --([a-z0-9-]+)(.*?)(?=^  --|^\S|\Z)", text, re.M | re.S))
    assert list(paragraphs) == FLAGS
    for one in [*fields(Config), *(one for rule in RULES.values() for one in fields(rule))]:
        name = one.name.replace("_", "-")
        if name in FLAGS:
            text = re.sub(r"\s+", " ", paragraphs[name])
            assert re.sub(r"\s+", " ", one.metadata["help"])[:40] in text
            if one.default not in (None, False):
                assert re.search(rf"\((.*: |default ){re.escape(str(one.default))}[;)]", text)
            elif name not in {"rho", "epochs", "seed", "checkpoint-every", "lr-step"} and one.default is None:
                assert "default" in text


def test_help_says_the_zeros_too(capsys: pytest.CaptureFixture[str]) -> None:
    text = re.sub(r"\s+", " ", help_of("train", capsys=capsys))
    assert "crops, flips and dropout (default 0)" in text and "0 only when interrupted (default 0)" in text


@pytest.mark.parametrize("columns, widest", [("80", 80), ("100", 100), ("300", 100)])
def test_help_fits_the_terminal(columns: str, widest: int, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for arguments in ((), ("train",)):
        assert max(map(len, help_of(*arguments, capsys=capsys).splitlines())) <= widest


def test_help_of_the_command_names_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys=capsys)
    assert "train     train a model" in text and "--version" in text and "COMMAND --help" in text


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, f"easgd_local {__version__}\n")


def test_flags_reach_the_configuration(accepted: Callable[..., Any]) -> None:
    """Each at a value that is not its default."""
    values = {
        "rule": RULES["eamsgd"](lr=0.03, tau=7, rho=0.25, momentum=0.5), "workers": 3, "device": "cpu",
        "data": "synthetic", "model": "mlp", "steps": 31, "batch_size": 5, "weight_decay": 0.5,
        "sampling": "independent", "seed": 11, "turns": "free", "precision": "bf16", "buffers": "recalibrate",
        "block_bytes": 128, "threads": 2, "eval_every": 9, "eval_samples": 77, "checkpoint_every": 8, "keep": 2,
        "out": "here", "on_failure": "respawn",
    }  # fmt: skip
    line = "train eamsgd --lr 0.03 --tau 7 --rho 0.25 --momentum 0.5".split()
    for name, value in values.items():
        if name != "rule":
            line += ["--" + name.replace("_", "-"), str(value)]
    prepared = accepted(*line)
    assert prepared["config"] == Config(**values)
    plan = prepared["plan"]
    assert (plan.layout.workers, plan.calendar.tau, plan.calendar.steps, plan.threads, plan.seed) == (3, 7, 31, 2, 11)
    assert np.isclose(plan.rule.moving_rate(3), 0.0075)


def test_a_process_killed_while_it_starts_is_not_called_a_full_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: Any) -> NoReturn:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", killed)
    assert cli.main(["train", "easgd", "--workers", "1", "--steps", "3", "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert said == (
        f"easgd-local: error: {tmp_path}/run: a process of the run was killed while it started; see logs/ there, and "
        "start it again.\n"
    )


def test_a_full_disk_is_told_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", no_room)
    words = ["train", "easgd", "--workers", "1", "--steps", "3", "--eval-every", "0", "--out", str(tmp_path / "run")]
    assert cli.main(words) == 1
    complaint = capsys.readouterr().err
    assert "the run folder cannot be written to (No space left on device); make room" in complaint
    assert complaint.count("\n") == 1
