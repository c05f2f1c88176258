"""Whole runs with `device=cuda` on a pretended driver: what they compute, what they survive, what they refuse."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from easgd_local import graphics
from easgd_local.compare import rival_run
from easgd_local.compare.rivals import DDP, PostLocalSGD
from easgd_local.config import Config
from easgd_local.faults import Fault
from easgd_local.graphics import Graphics
from easgd_local.rules.apam import APAM
from easgd_local.rules.downpour import ADownpour, Downpour
from easgd_local.rules.eamsgd import EAMSGD
from easgd_local.rules.easgd import EASGD
from easgd_local.rules.localsgd import LocalSGD
from easgd_local.rules.passm import PASSM
from tests import loops

pytest_plugins = ["tests.fake_cuda"]
pytestmark = pytest.mark.usefixtures("nothing_left", "fake_cuda")
Runner = Callable[..., dict[str, Any]]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_JITTER_US", "100")


def exported(folder: str | Path) -> bytes:
    """What a run reports, which is not always c."""
    return Path(folder, "center.safetensors").read_bytes()


def config_of(summary: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(Path(summary["folder"], "config.json").read_text())["effective"])


@pytest.mark.parametrize("exchange", ["overlap", "zerocopy"])
def test_four_workers_on_one_gpu_compute_what_four_on_the_cpu_do_to_the_bit(
    exchange: str, run: Runner, slow: None
) -> None:
    values = {"rule": EAMSGD(tau=2), "workers": 4, "steps": 30, "eval_every": 10}
    on_cpu, on_gpu = run(**values), run(**values, device="cuda", exchange=exchange)
    assert on_gpu["status"] == "done"
    for name in ("center_sha256", "test_error", "train_loss", "exchanges"):
        assert on_gpu[name] == on_cpu[name], name
    assert config_of(on_gpu)["device"] == f"cuda (1 x Fake GPU 0; {exchange}, memops)"


def test_optimizers_of_torch_and_a_rendezvous_compute_on_the_gpu_what_they_do_on_the_cpu(run: Runner) -> None:
    values = {"rule": LocalSGD(tau=3, inner="adamw"), "workers": 2, "steps": 20}
    assert run(**values)["center_sha256"] == run(**values, device="cuda", exchange="inline")["center_sha256"]


def test_workers_are_spread_over_the_gpus(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "2")
    summary = run(workers=3, steps=10, device="cuda")
    assert summary["status"] == "done"
    assert config_of(summary)["device"].startswith("cuda (1 x Fake GPU 0, 1 x Fake GPU 1;")


def test_a_run_goes_on_from_its_checkpoint_to_the_same_bits(run: Runner) -> None:
    values = {"workers": 2, "device": "cuda", "checkpoint_every": 10, "eval_every": 10}
    whole = run(**values, steps=30)
    part = run(**values, steps=20)
    assert run(**values, steps=30, resume=part["folder"])["center_sha256"] == whole["center_sha256"]


@pytest.mark.parametrize("turns, fault", [
    ("strict", Fault("kill", 1, 7)), ("strict", Fault("kill-in-exchange", 1, 9)), ("strict", Fault("raise", 1, 7)),
    ("free", Fault("kill-in-exchange", 1, 9)),
])  # fmt: skip
def test_when_a_worker_dies_the_others_finish(turns: str, fault: Fault, run: Runner, slow: None) -> None:
    summary = run(workers=3, steps=30, eval_every=10, device="cuda", turns=turns, faults=(fault,), block_bytes=4000)
    assert summary["status"] == "done"
    assert [report["state"] for report in summary["worker_reports"]] == ["finished", "died", "finished"]
    assert np.isfinite(summary["train_loss"])


@pytest.mark.parametrize("rule", [EASGD(tau=2), LocalSGD(tau=2)], ids=lambda rule: rule.name)
def test_a_new_worker_takes_the_place_of_a_dead_one(rule: Any, run: Runner) -> None:
    faults = (Fault("kill", 1, 5), *(Fault("pace", rank, 6, 0.05) for rank in (0, 2)))
    summary = run(rule=rule, workers=3, steps=60, device="cuda", on_failure="respawn", faults=faults)
    assert summary["status"] == "done"
    assert [report["state"] for report in summary["worker_reports"]] == ["finished"] * 3
    assert summary["worker_reports"][1]["steps"] == 60


def test_a_worker_that_is_not_finite_is_reloaded_at_the_same_step_in_every_run(run: Runner, slow: None) -> None:
    def reloaded() -> tuple[str, list[Any]]:
        summary = run(workers=2, steps=40, device="cuda", faults=(Fault("nan", 1, 7),))
        lines = Path(summary["folder"], "metrics.jsonl").read_text().splitlines()
        events = [one for one in map(json.loads, lines) if one["kind"] == "nonfinite"]
        return summary["center_sha256"], [(one["rank"], one["t"], one["count"]) for one in events]

    first, again = reloaded(), reloaded()
    assert first == again
    ((rank, t, count),) = first[1]  # once, though exchanges that were under way meet the same values
    assert rank == 1 and t > 7 and count > 0


@pytest.mark.parametrize("turns", ["free", "none"])
def test_orders_that_are_not_reproducible_train_too(turns: str, run: Runner, slow: None) -> None:
    summary = run(rule=EASGD(tau=2), workers=3, steps=60, eval_every=20, device="cuda", turns=turns)
    assert summary["status"] == "done"
    assert summary["test_error"] < 0.7
    assert config_of(summary)["exchange"] == "zerocopy"


def test_passm_trains_without_turns(run: Runner) -> None:
    summary = run(rule=PASSM(), workers=2, steps=60, device="cuda")
    assert summary["status"] == "done" and summary["test_error"] < 0.7


def test_a_straggler_is_named(run: Runner) -> None:
    for rule in (EASGD(tau=1), LocalSGD(tau=1)):
        summary = run(rule=rule, workers=3, steps=12, device="cuda", faults=(Fault("pace", 2, 0, 0.1),))
        waited = summary["worker_reports"][0]["waited_for_s"]
        assert waited[2] > 0.1 and waited[2] == max(waited)


@pytest.mark.parametrize("precision", ["fp16", "fp16-true", "bf16-true"])
def test_in_half_precision_it_learns_the_same_on_both(precision: str, run: Runner) -> None:
    summary = run(workers=2, steps=30, device="cuda", precision=precision)
    assert summary["status"] == "done" and summary["train_loss"] < 2.2
    again = run(workers=2, steps=30, precision=precision)
    assert again["center_sha256"] == summary["center_sha256"]


def test_what_is_not_finite_in_the_last_exchanges_is_reported_too(run: Runner) -> None:
    summary = run(rule=EASGD(tau=2), workers=2, steps=10, device="cuda", faults=(Fault("nan", 1, 7),))
    assert "worker 1 held values that were not finite in its last exchanges." in summary["warnings"]


# Loops of one's own


@pytest.mark.parametrize("rule", [EASGD(tau=1), LocalSGD(tau=4), Downpour(tau=3)], ids=str)
def test_a_loop_of_ones_own_computes_on_the_gpu_what_it_does_on_the_cpu(rule: Any, launch: Any, slow: None) -> None:
    loop = functools.partial(loops.bare, rule=rule)
    on_cpu, on_gpu = launch(loop, 2), launch(loop, 2, device="cuda")
    assert on_gpu.summary["status"] == "done"
    assert on_gpu.summary["center_sha256"] == on_cpu.summary["center_sha256"]


@pytest.mark.parametrize(
    "rule, half", [(EASGD(tau=4), False), (Downpour(tau=4), True)], ids=["easgd", "downpour, bfloat16"]
)
def test_a_model_of_every_sort_interrupted_and_resumed_ends_with_the_bits_of_the_cpu(
    rule: Any, half: bool, launch: Any
) -> None:
    loop = functools.partial(loops.resumable, rule=rule, half=half)
    whole = launch(loop, 1)
    with pytest.raises(KeyboardInterrupt):
        launch(loop, 1, 9, device="cuda", out=(folder := f"{whole.folder}-stopped"))
    rest = launch(loop, 1, device="cuda", resume=folder)
    assert rest.summary["center_sha256"] == whole.summary["center_sha256"]


@pytest.mark.parametrize("exchange", ["inline", "zerocopy"])
def test_a_loop_of_ones_own_exchanges_as_it_is_told(exchange: str, launch: Any, slow: None) -> None:
    loop = functools.partial(loops.bare, rule=EASGD(tau=2))
    on_cpu, on_gpu = launch(loop, 1), launch(loop, 1, device="cuda", exchange=exchange)
    assert on_gpu.summary["center_sha256"] == on_cpu.summary["center_sha256"]
    assert config_of(on_gpu.summary | {"folder": str(on_gpu.folder)})["exchange"] == exchange
    with pytest.raises(ValueError, match=r"^exchange=inline: says how a GPU reaches the center, but device=cpu; leav"):
        launch(loop, 1, device="cpu", exchange="inline")


def test_a_loop_that_leaves_with_an_exchange_under_way_ends_well(launch: Any) -> None:
    center = launch(functools.partial(loops.bare, rule=EASGD(tau=1), leaves_early=True), 1, device="cuda")
    assert center.summary["status"] == "done"


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_center_is_evaluated_though_a_worker_is_ahead_and_waits_in_the_driver(ahead: int, launch: Any) -> None:
    center = launch(loops.reads_its_loss, device="cuda", faults=(Fault("pace", 1 - ahead, 0, 0.03),))
    events = [json.loads(line) for line in (center.folder / "metrics.jsonl").read_text().splitlines()]
    assert [one["t"] for one in events if one["kind"] == "center"] == [0, 4, 8, 12, 16, 20, 22]


def test_workers_that_wait_in_the_driver_and_die_are_replaced(launch: Any) -> None:
    faults = (Fault("kill", 1, 3), Fault("pace", 0, 0, 0.15))
    center = launch(loops.reads_its_loss, device="cuda", faults=faults, on_failure="respawn")
    assert [one["state"] for one in center.summary["worker_reports"]] == ["finished", "finished"]


def test_a_loop_with_a_loader_of_its_own_that_waits_in_the_driver_stops_with_a_checkpoint(launch: Any) -> None:
    with pytest.raises(KeyboardInterrupt) as stopped:
        launch(loops.reads_its_loss, 5, device="cuda")
    assert len(list((stopped.value.folder / "checkpoints").iterdir())) == 1


def test_when_a_loop_dies_the_others_finish(launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARKER", str(tmp_path / "marker"))
    center = launch(loops.killed, 1, workers=3, device="cuda")
    assert center.summary["status"] == "done"
    assert [one["state"] for one in center.summary["worker_reports"]].count("died") == 1


# What the machine offers


@pytest.mark.parametrize(
    "environment, words",
    [
        ({}, "memops"), ({"FAKE_CUDA_ATTR": "122=0"}, "kernels"),
        ({"FAKE_CUDA_ATTR": "122=0", "FAKE_CUDA_LOSES_WORDS": "1"}, "processor"),
        ({"FAKE_CUDA_FAIL": "cuStreamWriteValue64_v2=801"}, "kernels"),
        ({"FAKE_CUDA_ATTR": "122=0", "FAKE_CUDA_LOSES_WORDS": "1", "FAKE_CUDA_DEVICES": "2"}, "processor"),
    ],
)  # fmt: skip
def test_the_best_way_of_waiting_that_really_works_is_found(
    environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphics, "TRIAL_S", 0.2)
    # What is left of a trial is left to the process, here this one, where it is counted.
    monkeypatch.setattr(graphics.Gpu, "abandon", lambda gpu: gpu.__exit__(None, None, None))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert graphics.look().words == words


def test_a_run_without_operations_on_words_waits_by_kernels(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(workers=2, steps=20)
    monkeypatch.setenv("FAKE_CUDA_ATTR", "122=0")
    crowded = run(workers=2, steps=20, device="cuda")
    assert config_of(crowded)["words"] == "processor"  # where workers share a GPU
    assert crowded["center_sha256"] == expected["center_sha256"]
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "2")
    summary = run(workers=2, steps=20, device="cuda")
    assert config_of(summary)["words"] == "kernels"
    assert summary["center_sha256"] == expected["center_sha256"]


@pytest.mark.parametrize("rule", [APAM(), ADownpour(lr=0.02)], ids=lambda rule: rule.name)
def test_updates_are_counted_as_on_the_cpu_though_the_number_of_workers_has_changed(rule: Any, run: Runner) -> None:
    found = []
    for device in ("cpu", "cuda"):
        first = run(rule=rule, workers=2, steps=6, checkpoint_every=6, device=device)
        values = {"workers": 3, "steps": 12, "checkpoint_every": 6, "device": device}
        found.append(exported(run(rule=rule, **values, resume=first["folder"])["folder"]))
    assert found[0] == found[1]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_rule_that_counts_updates_averages_in_a_loop_what_it_does_on_the_cpu(workers: int, launch: Any) -> None:
    loop = functools.partial(loops.bare, rule=ADownpour(tau=2))
    on_cpu, on_gpu = (launch(loop, workers=workers, device=device) for device in ("cpu", "cuda"))
    assert exported(on_gpu.folder) == exported(on_cpu.folder)


@pytest.mark.parametrize("rule", [DDP(), PostLocalSGD(tau=3, ddp_steps=3)], ids=lambda rule: rule.name)
def test_a_rival_takes_a_gpu_for_each_process(rule: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "2")
    values = {"rule": rule, "workers": 2, "steps": 10, "eval_every": 5}
    on_cpu, on_gpus = (
        rival_run.train(Config(**values, device=device, out=str(tmp_path / device))) for device in ("cpu", "cuda")
    )
    assert on_gpus["status"] == "done"
    assert on_gpus["center_sha256"] == on_cpu["center_sha256"]
    assert config_of(on_gpus)["device"].startswith("cuda (1 x Fake GPU 0, 1 x Fake GPU 1;")
    with pytest.raises(ValueError, match=r"^workers=3: .* on 2 GPUs: NCCL takes one process per GPU; use at most 2,"):
        rival_run.train(Config(**values | {"workers": 3}, device="cuda", out=str(tmp_path / "three")))


REFUSED: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "no driver": ({"EASGD_LIBCUDA": "/nowhere/libcuda.so.1"}, {}, "NVIDIA's driver was not found .* or use the CPU"),
    "an old driver": ({"FAKE_CUDA_VERSION": "11040"}, {}, "supports CUDA 11.4: the exchange needs at least 11.7"),
    "no device": ({"FAKE_CUDA_DEVICES": "0"}, {}, "finds 0 devices: at least 1 is needed"),
    "memory that cannot be pinned": (
        {"FAKE_CUDA_FAIL": "cuMemHostRegister_v2=801"}, {}, "cuMemHostRegister_v2 failed with CUDA_ERROR_NOT_SUPPORTED",
    ),
    "no room for so many workers": (
        {"FAKE_CUDA_FREE_MIB": "1000"}, {"workers": 4},
        r"workers=4: 4 of them would be on GPU 0 \(Fake GPU 0\).* only 1.0 GiB are free; choose fewer workers",
    ),
    "one process at a time": (
        {"FAKE_CUDA_ATTR": "20=3"}, {"workers": 1},
        r"workers=1: 2 processes, the one that evaluates .*, would be on GPU 0 \(Fake .*\), which takes one .*; let it",
    ),
    "a GPU that is taken": (
        {"FAKE_CUDA_FAIL": "cuDevicePrimaryCtxRetain=46"}, {}, r"DEVICE_UNAVAILABLE \(46\): .*; another process",
    ),
    "whole blocks without turns": (
        {}, {"rule": EASGD(), "turns": "none", "exchange": "overlap"}, "exchange=overlap with turns=none: whole blocks",
    ),
    "what nobody knows before its turn": (
        {}, {"rule": APAM(), "turns": "free"}, "turns=free with the rule apam: each of its updates depends on how many",
    ),
    "an exchange on the CPU": ({}, {"device": "cpu", "exchange": "inline"}, "exchange=inline: says how a GPU reaches"),
    "TF32 on the CPU": ({}, {"device": "cpu", "tf32": True}, "tf32=True: says how a GPU computes, but device=cpu"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_missing_is_said_before_training(
    what: str, run: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment, values, said = REFUSED[what]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((ValueError, MemoryError), match=said) as refusal:
        run(**{"device": "cuda", "out": str(tmp_path / "out"), **values})
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_a_missing_cupy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(name: str, capability: tuple[int, int]) -> bytes:
        raise ModuleNotFoundError("No module named 'cupy'")

    monkeypatch.setattr(graphics, "compiled", compiled)
    with pytest.raises(ValueError, match=r"device=cuda: CuPy, .* cannot be imported \(No module named 'cupy'\); pip"):
        graphics.look()


def test_a_torch_that_cannot_use_the_driver_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device=cuda: torch .* finds no GPU that it can use, while the driver"):
        graphics._check_torch(graphics.Driver.open())


def test_an_active_mps_is_warned_of(run: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    summary = run(workers=2, steps=5, device="cuda")
    assert any(one.startswith("MPS is active") for one in summary["warnings"])


def test_launches_that_block_are_warned_of_and_no_kernel_waits(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    monkeypatch.setenv("FAKE_CUDA_ATTR", "122=0")
    summary = run(workers=2, steps=5, device="cuda")
    assert any(one.startswith("CUDA_LAUNCH_BLOCKING is set") for one in summary["warnings"])
    assert json.loads(Path(summary["folder"], "config.json").read_text())["effective"]["words"] == "processor"


def test_a_gpu_that_takes_one_process_at_a_time_has_room_for_one_worker_of_a_loop(found: Graphics) -> None:
    two = replace(found, names=("A", "B"), capabilities=((9, 0), (9, 0)), exclusive=(1,))
    two.check_processes(2)
    two.check_processes(2, evaluator=True)  # beside worker 0 on the first one, which takes them all
    with pytest.raises(ValueError, match=r"workers=4: 2 processes would be on GPU 1 \(B\), .* CUDA_VISIBLE_DEVICES\.$"):
        two.check_processes(4)
    replace(two, mps=True).check_processes(4)


def test_a_worker_for_which_the_gpu_has_no_memory_is_reported_by_the_drivers_error(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = graphics.look()
    monkeypatch.setattr("easgd_local.gpus.ask", lambda function: found)
    monkeypatch.setenv("FAKE_CUDA_FAIL", "cuMemAlloc_v2=2")
    summary = run(workers=2, steps=5, device="cuda")
    assert summary["status"] == "failed"
    assert "cuMemAlloc_v2 failed with CUDA_ERROR_OUT_OF_MEMORY (2): out of memory; free some" in (
        summary["failures"][0]["cause"]
    )
