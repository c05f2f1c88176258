"""On a real GPU: what the pretended driver has shown, once more, and what only a real one can show.

Run by `python -m pytest tests/test_gpu.py`; skipped where there is no GPU. Four processes share the first one.
"""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import easgd_local as easgd
from easgd_local import data, doctor
from easgd_local.backend.cpu import CpuOps
from easgd_local.backend.cuda import CudaOps, Gpu, Transfer
from easgd_local.backend.operations import OPERATIONS
from easgd_local.compare import rival_run
from easgd_local.compare.rivals import DDP, PostLocalSGD
from easgd_local.config import Config
from easgd_local.data import OnDevice
from easgd_local.faults import Fault
from easgd_local.fork_server import ask, warm_up
from easgd_local.graphics import ORDER, Graphics, look
from easgd_local.link import EXCHANGES
from easgd_local.rules.diloco import DiLoCo
from easgd_local.rules.downpour import Downpour
from easgd_local.rules.eamsgd import EAMSGD
from easgd_local.rules.easgd import EASGD
from easgd_local.rules.localsgd import LocalSGD
from easgd_local.rules.passm import PASSM
from easgd_local.training import train
from tests import loops, test_joining
from tests import test_stream_turns as shown
from tests.conftest import unpainted


def missing() -> str:
    """Why these tests cannot run; "" where they can."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return str(error)
    return "" if torch.cuda.is_available() else "torch finds no GPU"


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(missing()), reason=f"no GPU: {missing()}")]


@pytest.fixture(scope="session")
def found() -> Graphics:
    """What the driver offers."""
    warm_up("easgd_local.preload_loop")
    graphics: Graphics = ask(look)
    return graphics


@pytest.fixture(scope="session", autouse=True)
def context() -> None:
    """This process keeps the device's context, so that not every test makes one anew."""
    torch.zeros(1, device="cuda")


@pytest.fixture
def slow() -> None:
    """A real GPU is not made slower."""


run, gpu, alone = shown.run, shown.gpu, shown.alone
for _name in [
    "test_processes_that_exchange_in_stream_order_compute_the_listing_to_the_bit",
    "test_a_rendezvous_in_stream_order_computes_the_listing_to_the_bit",
    "test_every_way_of_exchanging_and_of_waiting_computes_the_same",
    "test_nothing_is_lost_where_blocks_are_granted_as_they_are_asked_for",
    "test_without_turns_what_a_worker_alone_writes_is_never_lost",
    "test_with_more_processes_and_a_snapshot_of_every_round_too",
    "test_a_worker_killed_in_mid_exchange_holds_nobody_up_and_scribbles_nothing_afterwards",
    "test_every_operation_enqueued_equals_that_of_the_cpu",
    "test_copy_and_fill_are_those_of_the_cpu_and_nothing_is_enqueued_for_nothing",
    "test_the_host_enqueues_no_more_than_two_exchanges_ahead_and_says_whom_it_waits_for",
]:
    globals()[_name] = getattr(shown, _name)


# The machine


def test_the_driver_waits_for_words_by_itself(found: Graphics) -> None:
    assert found.words == "memops" and not found.pretended
    assert len(found.names) == len(found.capabilities) == len(found.free_bytes) >= 1


def test_the_doctor_describes_the_gpu(found: Graphics) -> None:
    told = [one.found for one in doctor.graphics()]
    assert any(found.names[0] in one for one in told)


# Operations


@pytest.mark.parametrize("n", [1, 3, 31, 65_537, 4_000_003])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_equals_that_of_the_cpu_at_odd_sizes_and_offsets(
    name: str, offset: int, n: int, gpu: Gpu
) -> None:
    kind, rng = OPERATIONS[name], np.random.default_rng([n, offset])
    count = len(kind.roles) + kind.optional
    arrays = [np.exp(3 * rng.standard_normal(n)).astype(np.float32) for _ in range(count)]
    if kind.guarded and n > 20:
        arrays[-1][7::31], arrays[0][11::37] = np.inf, np.nan
    scalars = [0.3, 0.9, 0.99, 1e-3][: kind.scalars]
    ops, transfer = CudaOps(gpu), Transfer(gpu)
    vectors = [gpu.allocate(n + 4)[offset : offset + n] for _ in arrays]
    for vector, array in zip(vectors, arrays, strict=True):
        transfer.load(vector, array)
    required = len(kind.roles)
    getattr(ops, name)(*vectors[:required], *scalars, *vectors[required:])
    expected = CpuOps()
    with np.errstate(all="ignore"):
        getattr(expected, name)(*arrays[:required], *scalars, *arrays[required:])
    for vector, array in zip(vectors, arrays, strict=True):
        assert np.array_equal(transfer.host(vector), array, equal_nan=True)
    gpu.fetch_counter(gpu.training, 0)
    gpu.training.synchronize()
    assert gpu.fetched(0) == expected.nonfinite


def test_torch_sees_the_same_memory(gpu: Gpu) -> None:
    transfer, vector = Transfer(gpu), gpu.allocate(1003)
    transfer.load(vector, np.arange(1003, dtype=np.float32))
    tensor = torch.as_tensor(vector[3:], device="cuda")
    assert tensor.data_ptr() == vector.address + 12
    tensor.add_(1)
    torch.cuda.synchronize()
    assert np.array_equal(transfer.host(vector)[3:], np.arange(4, 1004, dtype=np.float32))


def test_pictures_on_the_device_are_cut_as_in_main_memory() -> None:
    dataset = data.make_synthetic(0)
    on_device = OnDevice(dataset.train, dataset, torch.device("cuda"))
    indices = np.array([5, 0, 77, 5])
    inputs, labels = on_device.batch(indices, data.step_rng(1, 0, 3))
    images, wanted = dataset.train.read(indices)
    assert np.array_equal(inputs.cpu().numpy(), data.prepare(images, dataset, data.step_rng(1, 0, 3)))
    assert np.array_equal(labels.cpu().numpy(), wanted)


# Whole runs

Runner = Callable[..., dict[str, Any]]


@pytest.fixture
def training(tmp_path: Path) -> Runner:
    count = iter(range(1000))

    def start(*, resume: str | None = None, **values: Any) -> dict[str, Any]:
        usual = {"rule": EAMSGD(tau=3), "workers": 4, "steps": 60, "eval_every": 20, "device": "cuda", "threads": 1}
        values = usual | values
        values["out"] = resume or str(tmp_path / f"run-{next(count)}")
        with unpainted():
            return train(Config(**values), resume=resume)

    return start


LARGE = {"model": "cifar7", "data": "synthetic", "steps": 30, "eval_every": 0}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("values", [{}, LARGE, LARGE | {"precision": "bf16"}], ids=["mlp", "cifar7", "cifar7 bf16"])
def test_four_workers_on_one_gpu_give_the_same_center_twice(values: dict[str, Any], training: Runner) -> None:
    first, again = training(**values), training(**values)
    assert first["status"] == again["status"] == "done"
    assert first["center_sha256"] == again["center_sha256"]


@pytest.mark.timeout(180)
def test_every_exchange_and_every_way_of_waiting_gives_the_same_center(
    training: Runner, found: Graphics, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = {exchange: training(exchange=exchange)["center_sha256"] for exchange in EXCHANGES}
    for words in ORDER[1:]:
        monkeypatch.setattr("easgd_local.gpus.ask", lambda function, w=words: replace(found, words=w))
        hashes[words] = training(exchange="overlap")["center_sha256"]
    assert len(set(hashes.values())) == 1, hashes


@pytest.mark.timeout(180)
@pytest.mark.parametrize("rule", [EASGD(tau=2), LocalSGD(tau=3, inner="adamw"), DiLoCo(tau=5)], ids=lambda r: r.name)
def test_training_on_the_gpu_learns_what_training_on_the_cpu_does(rule: Any, training: Runner) -> None:
    on_gpu, on_cpu = training(rule=rule), training(rule=rule, device="cpu")
    assert on_gpu["status"] == "done"
    assert on_gpu["train_loss"] == pytest.approx(on_cpu["train_loss"], rel=0.02)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("rule", [DDP(), PostLocalSGD(tau=3, ddp_steps=20)], ids=lambda rule: rule.name)
def test_a_rival_learns_on_the_gpu_what_it_does_on_the_cpu(rule: Any, tmp_path: Path) -> None:
    values = {"rule": rule, "workers": 1, "steps": 60, "eval_every": 20}
    on_gpu, on_cpu = (
        rival_run.train(Config(**values, device=device, out=str(tmp_path / device))) for device in ("cuda", "cpu")
    )
    assert on_gpu["status"] == "done"
    assert on_gpu["train_loss"] == pytest.approx(on_cpu["train_loss"], rel=0.02)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("turns", ["strict", "free"])
@pytest.mark.parametrize("kind", ["kill", "kill-in-exchange"])
def test_when_a_worker_is_killed_the_others_finish(kind: str, turns: str, training: Runner) -> None:
    summary = training(workers=3, turns=turns, faults=(Fault(kind, 1, 21),), block_bytes=4000)
    assert summary["status"] == "done"
    assert [report["state"] for report in summary["worker_reports"]] == ["finished", "died", "finished"]


@pytest.mark.timeout(180)
def test_a_new_worker_takes_the_place_of_a_dead_one(training: Runner) -> None:
    faults = (Fault("kill", 1, 5), *(Fault("pace", rank, 6, 0.1) for rank in (0, 2)))
    summary = training(rule=EASGD(tau=2), workers=3, steps=150, on_failure="respawn", faults=faults)
    assert [report["state"] for report in summary["worker_reports"]] == ["finished"] * 3


@pytest.mark.timeout(180)
def test_a_run_goes_on_from_its_checkpoint_to_the_same_bits(training: Runner) -> None:
    values = {"workers": 2, "checkpoint_every": 20}
    whole, part = training(**values, steps=60), training(**values, steps=40)
    assert training(**values, steps=60, resume=part["folder"])["center_sha256"] == whole["center_sha256"]


@pytest.mark.timeout(180)
def test_a_worker_that_is_not_finite_is_reloaded_at_the_same_step_in_every_run(training: Runner) -> None:
    def events() -> list[Any]:
        summary = training(workers=2, faults=(Fault("nan", 1, 7),))
        lines = Path(summary["folder"], "metrics.jsonl").read_text().splitlines()
        found = [one for one in map(json.loads, lines) if one["kind"] == "nonfinite"]
        return [summary["center_sha256"], *((one["rank"], one["t"], one["count"]) for one in found)]

    assert events() == events()


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "values",
    [
        {"precision": "fp16"}, {"precision": "bf16", "channels_last": True}, {"precision": "fp16-true"},
        {"precision": "bf16-true", "model": "resnet18", "workers": 2}, {"tf32": True, "nondeterministic": True},
        {"compile": True, "workers": 1}, {"rule": PASSM()}, {"turns": "free"}, {"turns": "none", "rule": EASGD()},
        {"buffers": "recalibrate", "model": "resnet18", "workers": 2, "batch_size": 8},
    ],
    ids=str,
)  # fmt: skip
def test_a_run_learns(values: dict[str, Any], training: Runner) -> None:
    summary = training(**({"model": "cifar7", "data": "synthetic", "steps": 40} | values))
    assert summary["status"] == "done" and np.isfinite(summary["train_loss"])


# Loops of one's own

Launch = Callable[..., easgd.CenterState]


@pytest.fixture
def launch(launch: Launch) -> Launch:
    """As elsewhere, on the GPU."""
    return functools.partial(launch, device="cuda")


def sha(center: easgd.CenterState) -> str:
    return str(center.summary["center_sha256"])


@pytest.mark.timeout(180)
@pytest.mark.parametrize("rule", [EASGD(tau=1), LocalSGD(tau=4), Downpour(tau=3), DiLoCo(tau=5)], ids=str)
def test_a_loop_ends_with_the_same_bits_twice_and_near_those_of_the_cpu(rule: Any, launch: Launch) -> None:
    loop = functools.partial(loops.bare, rule=rule)
    first, again, on_cpu = launch(loop, 2), launch(loop, 2), launch(loop, 2, device="cpu")
    assert first.summary["status"] == "done" and sha(first) == sha(again)
    for name in on_cpu:
        torch.testing.assert_close(first[name], on_cpu[name], rtol=1e-2, atol=1e-3)


@pytest.mark.timeout(180)
def test_every_exchange_of_a_loop_gives_the_same_center(launch: Launch) -> None:
    loop = functools.partial(loops.bare, rule=EASGD(tau=2))
    assert len({sha(launch(loop, 1, exchange=one)) for one in EXCHANGES}) == 1


@pytest.mark.timeout(90)
@pytest.mark.parametrize("ahead", [0, 1])
def test_the_center_is_evaluated_while_the_loops_are_at_different_steps(ahead: int, launch: Launch) -> None:
    loop = functools.partial(loops.bare, rule=EASGD(tau=2), evaluate_every=4)
    center = launch(loop, 1, faults=(Fault("pace", 1 - ahead, 0, 0.03),))
    events = [json.loads(line) for line in (center.folder / "metrics.jsonl").read_text().splitlines()]
    assert [one["t"] for one in events if one["kind"] == "center"] == [0, 4, 8, 12, 16, 20, 22]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("buffers", ["average", "recalibrate", "local"])
def test_a_loop_with_batch_norm_is_the_same_twice_and_its_statistics_are_finite(buffers: str, launch: Launch) -> None:
    first, again = (launch(loops.train, 2, None, buffers) for _ in range(2))
    assert sha(first) == sha(again) and all(value.isfinite().all() for value in first.values())


@pytest.mark.timeout(180)
@pytest.mark.parametrize("rule, half", [(EASGD(tau=4), False), (Downpour(tau=4), True)], ids=["easgd", "bfloat16"])
def test_a_loop_interrupted_and_resumed_ends_with_the_same_bits(rule: Any, half: bool, launch: Launch) -> None:
    loop = functools.partial(loops.resumable, rule=rule, half=half)  # dropout and noise: generators go on too
    whole = launch(loop, 1)
    with pytest.raises(KeyboardInterrupt):
        launch(loop, 1, 9, out=(folder := f"{whole.folder}-stopped"))
    assert sha(launch(loop, 1, resume=folder)) == sha(whole)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("fused, half", [(False, False), (True, False), (True, True)])
def test_steps_that_a_scaler_skips_are_none(fused: bool, half: bool, launch: Launch) -> None:
    center = launch(functools.partial(loops.scaled, fused=fused, half=half), 2)
    assert center.summary["status"] == "done" and 0 < center.summary["steps"] < 44
    assert all(value.isfinite().all() for value in center.values())


@pytest.mark.timeout(120)
def test_when_a_loop_is_killed_the_others_finish(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARKER", str(tmp_path / "marker"))
    center = launch(loops.killed, 1, workers=3)
    assert center.summary["status"] == "done"
    assert [one["state"] for one in center.summary["worker_reports"]].count("died") == 1


@pytest.mark.timeout(120)
def test_a_run_under_torchrun_is_the_launched_one_and_its_model_outlives_it(launch: Launch, tmp_path: Path) -> None:
    code, _, err = test_joining.ended(test_joining.torchrun(tmp_path, "model = loops.train(worker)", "device='cuda'"))
    assert code == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["center_sha256"] == sha(launch(loops.train))
    left = torch.load(tmp_path / "model-0.pt", weights_only=True, map_location="cpu")
    assert all(value.isfinite().all() for value in left.values())
