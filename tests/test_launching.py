"""`launch`: whole runs of users' loops in real processes, their ends good and bad, and what the result holds."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import easgd_local as easgd
from easgd_local import metrics
from easgd_local.faults import Fault
from tests import loops
from tests.conftest import children, eventually

pytestmark = pytest.mark.usefixtures("nothing_left")
Launch = Callable[..., easgd.CenterState]


def sha(center: easgd.CenterState) -> str:
    return center.summary["center_sha256"]


def test_a_loop_of_ones_own_learns_and_its_center_loads_into_the_plain_model(launch):
    center = launch(functools.partial(loops.train, evaluate_every=20), 6)
    assert center.summary["status"] == "done" and center.summary["test_error"] < 0.1
    model = loops.network()
    assert list(center) == list(model.state_dict())
    model.load_state_dict(center, strict=True)
    with torch.no_grad():
        assert float(loops.scores(model.eval())["test_error"]) == pytest.approx(center.summary["test_error"], abs=1e-6)
    again = easgd.load_center(center.folder)
    assert again.folder == center.folder and all(torch.equal(again[name], center[name]) for name in center)
    names = {path.name for path in center.folder.iterdir()}
    assert {"config.json", "metrics.jsonl", "summary.json", "report.md", "curves.png", "center.safetensors"} <= names
    events = metrics.read(center.folder)
    assert [event["t"] for event in events if event["kind"] == "center"][:4] == [0, 20, 40, 60]
    assert any(event["kind"] == "log" and "loss" in event for event in events)
    assert all(event["loss"] > 0 for event in events if event["kind"] == "worker")


def test_two_runs_are_the_same_to_the_bit_and_another_seed_is_another_run(launch):
    first, second, other = launch(loops.train), launch(loops.train), launch(loops.train, seed=1)
    assert sha(first) == sha(second) != sha(other)


@pytest.mark.parametrize("rule", [easgd.EASGD(tau=4), easgd.LocalSGD(tau=4), easgd.Downpour(tau=4)])
@pytest.mark.parametrize("stop_at", [6, 25])
def test_a_model_of_every_sort_interrupted_and_resumed_ends_with_the_same_bits(launch, rule, stop_at):
    whole = launch(functools.partial(loops.resumable, rule=rule), 2)
    with pytest.raises(KeyboardInterrupt):
        launch(functools.partial(loops.resumable, rule=rule), 2, stop_at, out=(folder := f"{whole.folder}-stopped"))
    assert json.loads((Path(folder) / "summary.json").read_text())["status"] == "interrupted"
    rest = launch(functools.partial(loops.resumable, rule=rule), 2, resume=folder)
    assert rest.summary["status"] == "done" and rest.summary["steps"] == whole.summary["steps"]
    assert sha(rest) == sha(whole)
    assert all(torch.equal(rest[name], whole[name]) for name in whole)
    loops.Odd().load_state_dict(rest, strict=True)


def test_a_loader_that_reads_ahead_resumes_at_the_batch_that_the_loop_had_come_to(launch):
    whole = launch(functools.partial(loops.resumable, loader_workers=1), 1)
    with pytest.raises(KeyboardInterrupt):
        launch(functools.partial(loops.resumable, loader_workers=1), 1, 6, out=(folder := f"{whole.folder}-stopped"))
    rest = launch(functools.partial(loops.resumable, loader_workers=1), 1, resume=folder)
    assert sha(rest) == sha(whole)


def test_a_finished_run_goes_on_with_a_longer_loop_as_if_it_had_never_ended(launch):
    whole = launch(loops.resumable, 2, checkpoint_every=10)
    half = launch(loops.resumable, 1, checkpoint_every=10)
    rest = launch(loops.resumable, 2, resume=half.folder, checkpoint_every=10)
    assert sha(rest) == sha(whole)


@pytest.mark.parametrize("buffers", ["average", "recalibrate", "local"])
def test_under_each_policy_for_buffers_the_center_of_a_network_with_batch_norm_is_good(launch, buffers):
    center = launch(functools.partial(loops.train, buffers=buffers), 4)
    assert center.summary["test_error"] < 0.1
    fresh = loops.network()
    fresh.load_state_dict(center)
    assert float(loops.scores(fresh.eval())["test_error"]) == pytest.approx(center.summary["test_error"], abs=1e-6)
    assert int(center["2.num_batches_tracked"]) == center.summary["steps"]  # a count is no average


def test_a_worker_that_is_killed_stops_nobody(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("MARKER", str(tmp_path / "killed"))
    center = launch(loops.killed, 2, workers=3)
    assert center.summary["status"] == "done"
    assert [(death["rank"], "SIGKILL" in death["cause"]) for death in center.summary["failures"]] == [(1, True)]


def test_a_killed_worker_is_replaced_if_so_wanted(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("MARKER", str(tmp_path / "killed"))
    center = launch(loops.killed, 8, workers=3, on_failure="respawn")
    assert [event["rank"] for event in metrics.read(center.folder) if event["kind"] == "respawn"] == [1]
    assert center.summary["worker_reports"][1]["state"] == "finished"


def test_a_loop_may_keep_checkpoints_of_its_own(launch, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    launch(loops.keeps_its_own_checkpoints, str(folder), 1)
    assert [(folder / f"{rank}.txt").read_text() for rank in range(2)] == ["0 22", "0 22"]
    half = torch.load(folder / "0.pt", weights_only=False)["kept"]["x"]
    center = launch(loops.keeps_its_own_checkpoints, str(folder), 2)
    assert [(folder / f"{rank}.txt").read_text() for rank in range(2)] == ["22 44", "22 44"]
    assert center.summary["steps"] == 44 and center.summary["exchanges"] == 2 * 5  # at steps 24, 28, 32, 36, 40
    assert not torch.equal(torch.load(folder / "0.pt", weights_only=False)["kept"]["x"], half)


def test_workers_see_the_variables_that_torchrun_sets(launch, tmp_path):
    launch(loops.environment, str(tmp_path))
    assert [(tmp_path / f"{rank}").read_text() for rank in range(2)] == ["0 0 2 2", "1 1 2 2"]


@pytest.mark.parametrize("fn, kind, message", [
    (loops.attach_twice, ValueError, r"^worker \d: attach: this worker has a model attached already"),
    (loops.different_shapes, ValueError, r"^model: weight has shape \(2, 3\).* in worker 0 and \(3, 3\)"),
    (loops.different_names, ValueError, r"^model: worker 1's differs from worker 0's \(1\.\w+ is only in one"),
    (loops.different_rules, ValueError, r"^rule: worker 0 attached EASGD\(.*tau=10.* and worker 1 EASGD\(.*tau=11"),
    (loops.wrong_type, ValueError, r"^worker 1: weight has dtype torch.float64.*call model.float\(\)"),
    (loops.different_types, ValueError, r"^model: weight is float32 in worker 0 and bfloat16 in worker 1; build"),
    (loops.wrong_device, ValueError, r"^worker \d: weight is on meta .* computes on cpu; write model.to"),
    (loops.another_models_optimizer, ValueError, r"^worker \d: optimizer: 2 of its 2 parameters do not belong"),
    (loops.replaced_after_attach, ValueError, r"^worker 1: weight: was replaced after attach"),
    (loops.nothing_attached, ValueError, r"^fn: was over in worker 0 without worker.attach"),
    (loops.fails_before, RuntimeError, r"^worker 1 ended before the run had begun: KeyError: 'no such"),
    (loops.fails_after, RuntimeError, r"^all workers died, the last of them worker \d: RuntimeError: .*mat1 and mat2"),
    (loops.bad_evaluation, ValueError, r"^worker 0: evaluate: raised TypeError"),
    (loops.bad_calibration, ValueError, r"^worker 0: calibrate_on: raised RuntimeError: .*mat1 and mat2"),
    (loops.exits, RuntimeError, r"^worker \d ended before the run had begun: exited with code 3\.$"),
    (loops.steps_another_optimizer, ValueError, r"^worker \d: attach: the loop is over, and the attached opt"),
])  # fmt: skip
def test_a_mistake_ends_all_workers_with_one_sentence(launch, tmp_path, fn, kind, message):
    with pytest.raises(kind, match=message) as caught:
        launch(fn)
    assert "\n" not in str(caught.value)
    assert eventually(lambda: not children(), 5)
    if "metrics.jsonl" not in {path.name for path in tmp_path.rglob("*")}:
        assert list(tmp_path.iterdir()) == []  # not even a folder


def test_what_a_worker_raised_is_shown_in_full_as_the_cause(launch):
    with pytest.raises(RuntimeError) as caught:
        launch(loops.fails_before)
    assert 'raise KeyError("no such column")' in str(caught.value.__cause__)


def outside() -> Any:
    def local(worker: Any) -> None: ...

    return local


@pytest.mark.parametrize("fn, args, message", [
    (lambda worker: None, (), r"^fn=<lambda>: new processes import.*define it at the top level of a module\.$"),
    (outside(), (), r"^fn=outside\.<locals>\.local: new processes import"),
    (loops.train, (open(os.devnull),), r"^fn=train: it or its args cannot be handed to new processes \(TypeError"),
    (7, (), r"^fn=7: must be a function of one worker"),
])  # fmt: skip
def test_a_function_that_new_processes_cannot_import_is_refused_at_once(launch, tmp_path, fn, args, message):
    with pytest.raises(ValueError, match=message):
        launch(fn, *args)
    assert list(tmp_path.iterdir()) == []


def test_a_function_of_a_notebook_is_refused(launch, monkeypatch):
    cell = type(sys)("__main__")
    exec("def train(worker): ...", vars(cell))
    monkeypatch.setitem(sys.modules, "__main__", cell)
    with pytest.raises(ValueError, match=r"^fn=train: defined in a notebook .* write it to a file"):
        launch(cell.train)


@pytest.mark.parametrize("options, message", [
    ({"workers": 0}, r"^workers=0: must be at least 1"),
    ({"device": "tpu"}, r"^device=tpu: must be one of auto, cpu, cuda; choose one of them"),
    ({"device": "cuda"}, r"^device=cuda: NVIDIA's driver was not found .libno.so: .*; install it"),
    ({"on_failure": "panic"}, r"^on_failure=panic: must be one of continue, respawn, stop"),
    ({"checkpoint_every": -1}, r"^checkpoint_every=-1: must be at least 0"),
    ({"resume": "nowhere"}, r"^resume=nowhere: no such run"),
    ({"resume": "nowhere", "out": "here"}, r"^out=here and resume=nowhere: a resumed run stays in its folder"),
])  # fmt: skip
def test_options_that_cannot_work_are_refused_before_a_process_starts(launch, options, message, monkeypatch):
    monkeypatch.setenv("EASGD_LIBCUDA", "libno.so")
    with pytest.raises(ValueError, match=message):
        launch(loops.train, **options)


def test_a_loop_that_leaves_after_drawing_a_batch_at_a_checkpoint_can_be_resumed(launch):
    half = launch(loops.leaves_at, 10, checkpoint_every=5)
    assert launch(loops.leaves_at, 20, resume=half.folder).summary["status"] == "done"


def test_a_resumed_run_stays_what_it_was(launch):
    half = launch(loops.resumable, 1, checkpoint_every=10)
    with pytest.raises(ValueError, match=r"^seed=1: the run in .* was started with seed=0, and a resumed run stays"):
        launch(loops.resumable, 2, resume=half.folder, seed=1)
    with pytest.raises(ValueError, match=r"^rule=.*tau.*7.*: the run in .* was started with rule="):
        launch(functools.partial(loops.resumable, rule=easgd.EASGD(tau=7)), 2, resume=half.folder)


# Loops of unequal length, and odd moments


def test_a_worker_whose_loop_is_over_still_brings_its_part_of_checkpoints(launch):
    center = launch(loops.short_and_long, (20, 60), checkpoint_every=10, keep=2)
    saved = sorted((center.folder / "checkpoints").iterdir())
    assert [path.name for path in saved] == ["step-00000050", "step-00000060"]
    clocks = [json.loads((path / "manifest.json").read_text())["clocks"] for path in saved]
    assert clocks == [{"0": 20, "1": 50}, {"0": 20, "1": 60}]
    longer = launch(loops.short_and_long, (40, 80), resume=center.folder, checkpoint_every=10)
    assert [report["steps"] for report in longer.summary["worker_reports"]] == [40, 80]
    assert longer.summary["failures"] == []


def test_an_interrupt_when_some_loops_are_over_saves_and_can_be_resumed(launch, tmp_path):
    with pytest.raises(KeyboardInterrupt) as caught:
        launch(loops.short_and_long, (20, 10**6), 50)
    folder = caught.value.folder
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    (saved,) = (folder / "checkpoints").iterdir()
    assert json.loads((saved / "manifest.json").read_text())["clocks"].keys() == {"0", "1"}
    rest = launch(loops.short_and_long, (20, 70), resume=folder)
    assert [report["steps"] for report in rest.summary["worker_reports"]] == [0, 70]  # of this launch
    assert rest.summary["failures"] == [] and rest.summary["warnings"] == []


def test_workers_that_die_one_after_the_other_are_replaced_though_nobody_comes_to_the_next_evaluation(launch):
    """The first exchange of the new workers waits for the center of step 12 to be taken, where no clock is yet."""
    faults = (Fault("kill", 0, 10), Fault("kill", 1, 11))
    center = launch(functools.partial(loops.bare, evaluate_every=2, rule=easgd.SMA(tau=1)), 1, faults=faults,
                    on_failure="respawn")  # fmt: skip
    assert center.summary["status"] == "done" and len(center.summary["failures"]) == 2


@pytest.mark.parametrize("every", [1, 2])
def test_a_stop_where_a_checkpoint_is_or_would_be_leaves_one_that_resumes_to_the_same_bits(every, launch):
    """Worker 0 has long finished, and has saved its part of checkpoints at or after the step where worker 1 stops."""
    whole, slow = launch(loops.short_and_long, (8, 40), checkpoint_every=every), (Fault("pace", 1, 0, 0.02),)
    folder = f"{whole.folder}-stopped"
    with pytest.raises(KeyboardInterrupt):
        launch(loops.short_and_long, (8, 40), 22, out=folder, checkpoint_every=every, faults=slow)
    rest = launch(loops.short_and_long, (8, 40), resume=folder, checkpoint_every=every)
    assert sha(rest) == sha(whole)


def test_a_replacement_that_cannot_start_is_not_tried_again_and_again(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("MARKER", str(tmp_path / "killed"))
    center = launch(loops.never_recovers, workers=3, on_failure="respawn")
    assert center.summary["status"] == "done"
    assert [("not again" in one["cause"]) for one in center.summary["failures"]] == [False, True]


def test_an_exception_in_evaluate_ends_the_run_even_if_the_loop_catches_it(launch):
    with pytest.raises(ValueError, match=r"^worker 0: evaluate: raised KeyError: 'no such metric'\.$"):
        launch(loops.swallows_exceptions)


def test_processes_of_the_loops_own_start_as_they_would_without_launch(launch, tmp_path):
    launch(loops.start_method, str(tmp_path))
    assert {(tmp_path / f"{rank}").read_text() for rank in range(2)} == {multiprocessing.get_start_method()}


def test_assigned_buffers_extra_state_and_a_warm_up_from_zero_are_resumed_too(launch):
    whole = launch(loops.extras, 2)
    assert whole["_extra_state"] == ["new", "trained"] and 0.99 < float(whole["mean"]) <= 1
    loops.WithExtras().load_state_dict(whole)
    with pytest.raises(KeyboardInterrupt) as caught:
        launch(loops.extras, 2, 25)
    state = easgd.load_center(caught.value.folder)
    assert int(state["body.2.num_batches_tracked"]) >= 25  # of the stop, not of the start
    rest = launch(loops.extras, 2, resume=caught.value.folder)
    assert sha(rest) == sha(whole) and torch.equal(rest["mean"], whole["mean"])


def test_exchanges_of_rules_that_replace_x_are_all_counted_and_the_end_is_evaluated_once(launch):
    center = launch(loops.diloco, 2)
    assert center.summary["exchanges"] == 2 * 4 and center.summary["steps"] == 44
    assert [event["t"] for event in metrics.read(center.folder) if event["kind"] == "center"] == [0, 11, 22, 33, 44]


def test_a_run_folder_is_named_after_the_script_or_module(launch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    center = launch(functools.partial(loops.train, buffers="local"), out=None)
    assert center.folder.parent.name == "runs" and center.folder.name.endswith("-loops")
