"""Workers and launchers that die, stall or diverge: the others go on, the summary says so, nothing stays behind."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import safetensors.torch

from easgd_local import checkpoint, metrics, overhead
from easgd_local.faults import Fault
from easgd_local.rules.downpour import ADownpour
from easgd_local.rules.eamsgd import EAMSGD
from easgd_local.rules.easgd import EASGD
from tests.conftest import children, eventually

pytestmark = pytest.mark.usefixtures("nothing_left")
Runner = Callable[..., dict[str, Any]]


def center_is_finite(summary: dict[str, Any]) -> bool:
    state = safetensors.torch.load_file(Path(summary["folder"], "center.safetensors"))
    return all(bool(np.isfinite(tensor.numpy()).all()) for tensor in state.values())


def states(summary: dict[str, Any]) -> list[str]:
    return [report["state"] for report in summary["worker_reports"]]


@pytest.mark.parametrize("turns", ["strict", "free"])
@pytest.mark.parametrize(
    "fault",
    [Fault("kill", 1, 0), Fault("kill", 0, 25), Fault("kill-in-exchange", 2, 9), Fault("kill-in-exchange", 1, 0)],
)
def test_when_a_worker_is_killed_the_others_finish(turns: str, fault: Fault, run: Runner) -> None:
    values = {"workers": 3, "steps": 60, "eval_every": 10, "checkpoint_every": 20, "block_bytes": 4000}
    summary = run(**values, turns=turns, faults=(fault,))
    assert summary["status"] == "done"
    (failure,) = summary["failures"]
    assert (failure["rank"], failure["t"]) == (fault.rank, fault.t)
    assert "SIGKILL" in failure["cause"]
    assert states(summary) == ["died" if rank == fault.rank else "finished" for rank in range(3)]
    assert center_is_finite(summary)
    assert summary["test_error"] < 0.6


def test_two_of_four_workers_may_die_at_different_moments(run: Runner) -> None:
    faults = (Fault("kill-in-exchange", 3, 6), Fault("kill", 1, 31))
    summary = run(workers=4, steps=60, eval_every=3, faults=faults, block_bytes=4000)
    assert states(summary) == ["finished", "died", "finished", "died"]
    assert center_is_finite(summary)


@pytest.mark.parametrize("attempt", range(4))
def test_a_worker_killed_at_any_moment_from_outside_stops_nobody(attempt: int, run: Runner) -> None:
    moment_s = [0.0, 0.02, 0.05, 0.1, 0.2, 0.4][attempt]
    victims: list[int] = []

    def kill() -> None:
        assert eventually(lambda: bool(workers()), 20)
        time.sleep(moment_s)
        victims.append(workers()[attempt % len(workers())].pid)
        os.kill(victims[0], signal.SIGKILL)

    def workers() -> list[psutil.Process]:
        found = sorted(children(), key=lambda process: process.pid)
        return found[-3:] if len(found) >= 4 else []  # the first one is the evaluator

    thread = threading.Thread(target=kill)
    thread.start()
    summary = run(workers=3, steps=400, eval_every=50, rule=EAMSGD(tau=1))
    thread.join()
    assert victims
    assert summary["status"] == "done"
    assert states(summary).count("finished") >= 2
    assert center_is_finite(summary)


def test_a_worker_that_raises_is_named_with_its_exception_and_its_log_has_the_traceback(run: Runner) -> None:
    summary = run(faults=(Fault("raise", 1, 7),))
    assert summary["failures"] == [{"rank": 1, "t": 7, "cause": "RuntimeError: injected fault"}]
    assert "Traceback" in Path(summary["folder"], "logs", "worker-1.log").read_text()


def test_when_all_workers_die_the_run_has_failed(run: Runner) -> None:
    summary = run(faults=(Fault("raise", 0, 7), Fault("kill", 1, 3)), drawn=True)
    assert summary["status"] == "failed"
    assert states(summary) == ["died", "died"]


@pytest.mark.parametrize("turns", ["strict", "free"])
def test_with_respawn_a_dead_worker_is_replaced_from_the_center(turns: str, run: Runner) -> None:
    pace = tuple(Fault("pace", rank, seconds=0.01) for rank in (0, 2))  # leaves the new worker time to start
    faults = (Fault("kill-in-exchange", 1, 6), *pace)
    summary = run(workers=3, steps=150, turns=turns, faults=faults, on_failure="respawn", eval_every=40)
    assert summary["status"] == "done"
    assert states(summary) == ["finished"] * 3
    assert [failure["rank"] for failure in summary["failures"]] == [1]
    (respawn,) = [event for event in metrics.read(summary["folder"]) if event["kind"] == "respawn"]
    assert 6 <= respawn["t"] <= 150
    assert center_is_finite(summary)


@pytest.mark.parametrize("turns", ["strict", "free"])
def test_a_death_just_before_the_end_holds_nobody_up(turns: str, run: Runner) -> None:
    """Whether a replacement still finds a step to make depends on how far the others are when it is ready."""
    summary = run(workers=3, steps=40, turns=turns, faults=(Fault("kill", 1, 39),), on_failure="respawn")
    assert (summary["status"], summary["steps"]) == ("done", 40)
    assert states(summary) in (["finished"] * 3, ["finished", "died", "finished"])


def test_with_stop_a_death_ends_the_run_with_a_checkpoint_of_the_others(run: Runner) -> None:
    summary = run(workers=3, steps=400, faults=(Fault("kill", 1, 20),), on_failure="stop")
    assert summary["status"] == "failed"
    assert states(summary) == ["stopped", "died", "stopped"]
    again = run(workers=3, steps=400, resume=summary["folder"])
    assert again["status"] == "done"
    assert any("worker 1 had died" in warning for warning in again["warnings"])


def test_values_that_are_not_finite_stay_out_of_the_center_and_the_worker_is_reloaded(run: Runner) -> None:
    summary = run(workers=3, steps=60, rule=EAMSGD(tau=4), faults=(Fault("nan", 1, 14),))
    assert summary["status"] == "done"
    assert center_is_finite(summary)
    (event,) = [event for event in metrics.read(summary["folder"]) if event["kind"] == "nonfinite"]
    assert event["rank"] == 1
    assert event["t"] == 16  # the first exchange after the fault
    assert event["count"] > 8000
    losses = [e["loss"] for e in metrics.read(summary["folder"]) if e["kind"] == "worker" and e["rank"] == 1]
    assert np.isfinite(losses[-1])


def test_an_interrupt_between_the_first_and_the_last_to_finish_lets_the_last_finish(
    tmp_path: Path, run: Runner
) -> None:
    """Worker 0 finishes its 100 steps while worker 1 is held up at step 80 of them, within the same round."""
    values = {"rule": EASGD(tau=50), "steps": 100}
    folder = tmp_path / "run"

    def interrupt() -> None:
        def first_is_done() -> bool:
            return folder.exists() and any(e["kind"] == "worker" and e["t"] == 100 for e in metrics.read(folder))

        assert eventually(first_is_done, 20)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    stopped = run(**values, faults=(Fault("pace", 1, t=80, seconds=0.1),), out=str(folder))
    thread.join()
    assert stopped["status"] == "done" and stopped["test_error"] is not None
    assert [report["steps"] for report in stopped["worker_reports"]] == [100, 100]
    longer = values | {"steps": 150}
    assert run(**longer, resume=str(folder))["center_sha256"] == run(**longer)["center_sha256"]


def test_a_run_that_diverges_stops_says_so_and_leaves_no_checkpoint_of_the_ruin(run: Runner) -> None:
    summary = run(rule=EAMSGD(tau=3, lr=1e4), steps=2000, eval_every=20, drawn=True)
    assert summary["status"] == "failed"
    assert summary["steps"] < 2000
    assert any("diverged; try less than lr=10000" in warning for warning in summary["warnings"])
    assert not list(Path(summary["folder"], "checkpoints").glob("*"))


def test_a_run_of_which_no_worker_can_compute_anything_stops_as_diverged(run: Runner) -> None:
    summary = run(rule=EAMSGD(tau=3, lr=5e4), steps=2000, eval_every=500)
    assert summary["status"] == "failed"
    assert summary["steps"] < 200
    said = "no worker had finite values in 5 exchanges one after the other: diverged; try less than lr="
    assert any(warning.startswith(said) for warning in summary["warnings"]), summary["warnings"]


def test_a_run_that_ends_worse_than_it_began_says_so(run: Runner) -> None:
    summary = run(rule=EAMSGD(tau=3, lr=10.0), steps=60)
    assert summary["status"] == "done"
    (warning,) = [one for one in summary["warnings"] if "at the end, above" in one]
    assert warning.endswith("of the beginning: the run has not learned, or has diverged; try less than lr=10.0.")


# Replacements


def test_a_replacement_leaves_the_centers_batch_norm_statistics_as_they_are(run: Runner) -> None:
    values = {
        "data": "synthetic", "model": "shufflenet_v2_x0_5", "rule": EASGD(tau=1, lr=1e-6), "steps": 6, "batch_size": 8,
        "workers": 1, "eval_samples": 8,
    }  # fmt: skip
    whole, replaced = run(**values), run(**values, on_failure="respawn", faults=(Fault("kill", 0, 3),))
    variances = [
        safetensors.torch.load_file(Path(one["folder"], "center.safetensors"))["conv1.1.running_var"].mean()
        for one in (whole, replaced)
    ]
    assert 0.5 * variances[0] < variances[1] < 2 * variances[0]


def test_a_replacement_that_would_come_after_the_last_step_is_not_admitted(run: Runner) -> None:
    summary = run(workers=2, steps=60, rule=EASGD(tau=100), on_failure="respawn", faults=(Fault("kill", 1, 5),))
    assert (summary["status"], summary["steps"]) == ("done", 60)
    assert [(report["state"], report["steps"]) for report in summary["worker_reports"]] == [
        ("finished", 60),
        ("died", 5),
    ]


def test_an_interrupt_does_not_wait_for_a_replacement_whose_first_turn_is_far_ahead(
    run: Runner, tmp_path: Path
) -> None:
    folder = tmp_path / "run"

    def interrupt() -> None:
        def is_admitted() -> bool:
            return folder.exists() and any(event["kind"] == "respawn" for event in metrics.read(folder))

        if eventually(is_admitted, 20):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    summary = run(
        workers=2, steps=5000, rule=EASGD(tau=2000), on_failure="respawn", out=str(folder),
        faults=(Fault("kill", 1, 5), Fault("pace", 0, seconds=0.005)),
    )  # fmt: skip
    thread.join()
    assert summary["status"] == "interrupted"
    assert summary["worker_reports"][0]["steps"] < 2000
    assert run(workers=2, steps=5000, rule=EASGD(tau=2000), resume=str(folder))["status"] == "done"


def test_what_a_dead_worker_has_done_is_counted_with_that_of_its_replacement(run: Runner) -> None:
    summary = run(
        workers=2, steps=400, rule=ADownpour(lr=0.01), on_failure="respawn", faults=(Fault("kill", 1, 10),),
        checkpoint_every=400,
    )  # fmt: skip
    (_, second) = summary["worker_reports"]
    (joined,) = [event["t"] for event in metrics.read(summary["folder"]) if event["kind"] == "respawn"]
    # A worker reports at least every 4 steps here, so the dead one's last steps may be missing.
    assert 0 <= (400 - joined - 1 + 10) * 8 - second["samples"] < 4 * 8
    saved = checkpoint.load_vectors(Path(summary["folder"], "checkpoints", "step-00000400"), "center.safetensors")
    assert set(saved["updates"]) == {400 + 10 + (400 - joined - 1)}  # joining is no update


def test_a_tau_that_is_never_reached_is_warned_about(run: Runner) -> None:
    (warning,) = run(workers=2, steps=20, rule=EASGD(tau=20))["warnings"]
    assert warning.startswith("tau=20 with steps=20: ") and "the center stays as it starts" in warning


def test_exchanges_that_do_not_hide_are_warned_about_once_in_the_log_and_in_the_end(run: Runner, monkeypatch) -> None:
    """Every share of the time is too much here, and every window long enough."""
    monkeypatch.setattr(overhead, "THRESHOLD", 0.0)
    monkeypatch.setattr(overhead, "WINDOW_S", 0.0)
    summary = run(workers=2, steps=40, rule=EASGD(tau=2))
    (warning,) = summary["warnings"]
    said, _, remedy = warning.rpartition(": ")
    assert re.match(r"tau=2: exchange.* take .* % of the time even of worker [01], ", said)
    assert re.match(r"tau=\d+ would bring|a larger tau would lower", remedy)  # as the run's length allows
    assert [one["message"] for one in metrics.read(summary["folder"]) if one["kind"] == "warning"] == [warning]
    assert warning in Path(summary["folder"], "report.md").read_text("utf-8")


# A straggler


def test_free_turns_do_not_wait_for_a_slow_worker_and_strict_turns_say_whom_they_wait_for(run: Runner) -> None:
    """A step lasts 20 ms, the slow worker's six times that, whatever the cores are doing."""
    pace = tuple(Fault("pace", rank, seconds=0.02) for rank in range(3))
    slow = (*pace[:2], Fault("pace", 2, seconds=0.12))
    values = {"workers": 3, "steps": 20, "rule": EASGD(tau=5)}
    together = steps_per_s(run(**values, turns="free", faults=pace))
    free = run(**values, turns="free", faults=slow)
    assert min(steps_per_s(free)[:2]) >= 0.9 * min(together[:2])
    strict = run(**values, turns="strict", faults=slow)
    assert max(steps_per_s(strict)[:2]) <= 20 / (15 * 0.12)  # at step 15 they wait for its step 15
    for report in strict["worker_reports"][:2]:
        waited = report["waited_for_s"]
        assert waited[2] > 0.8 * sum(waited)
        assert waited[2] > 0.5 * strict["seconds"]
    assert "2 (" in Path(strict["folder"], "report.md").read_text()


def steps_per_s(summary: dict[str, Any]) -> list[float]:
    """Each worker's own speed: its steps over the seconds until its last report."""
    ends = {event["rank"]: event for event in metrics.read(summary["folder"]) if event["kind"] == "worker"}
    return [ends[rank]["t"] / ends[rank]["seconds"] for rank in sorted(ends)]


# The launcher


def start_command(folder: Path, *flags: str, **how: Any) -> subprocess.Popen[str]:
    words = ["train", "eamsgd", "--workers", "3", "--steps", "100000", "--out", str(folder), *flags]
    command = [sys.executable, "-m", "easgd_local", *words]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | how
    return subprocess.Popen(command, text=True, start_new_session=True, **how)


def is_training(folder: Path) -> bool:
    return any(event["kind"] == "worker" for event in metrics.read(folder)) if folder.exists() else False


def group_is_gone(pids: list[int]) -> bool:
    def gone(pid: int) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        return True

    return all(gone(pid) for pid in pids)


STUCK = """
from easgd_local.config import Config
from easgd_local.faults import Fault
from easgd_local.rules.easgd import EASGD
from easgd_local.training import train
train(Config(rule=EASGD(tau=1), workers=3, out={out!r}, faults=(Fault("pace", 0, t=20, seconds=1000.0),)))
"""


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary folder of processes started from here, its path short enough for a socket's in it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


@pytest.mark.parametrize("moment", ["while all train", "while all wait for a turn"])
def test_when_the_launcher_is_killed_its_workers_are_gone_within_seconds(
    moment: str, tmp_path: Path, short: Path
) -> None:
    folder = tmp_path / "run"
    if moment == "while all train":
        process = start_command(folder)
    else:
        process = subprocess.Popen([sys.executable, "-c", STUCK.format(out=str(folder))])
    try:
        assert eventually(lambda: is_training(folder), 40)
        time.sleep(0.2)
        family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        assert len(family) >= 6  # fork server, resource tracker, evaluator, three workers
        assert len(list(short.iterdir())) == 1  # where the fork server's socket lies
    finally:
        process.kill()
        process.communicate()
    assert eventually(lambda: group_is_gone(family), 5)
    assert eventually(lambda: not list(short.iterdir()), 5)


@pytest.mark.parametrize("how", ["killed", "the whole group terminated"])
def test_a_command_that_ends_while_torch_is_imported_leaves_nothing_either(
    how: str, tmp_path: Path, short: Path
) -> None:
    process = start_command(tmp_path / "run")
    try:
        assert eventually(lambda: bool(list(short.glob("*/listener-*"))), 20)
        if how == "killed":
            time.sleep(0.3)
        family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        if how != "killed":  # at once: the fork server is not even a Python yet
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(10)
    finally:
        process.kill()
        process.communicate()
    assert eventually(lambda: group_is_gone(family), 20)
    assert not list(short.iterdir())


WARM_UP = "from easgd_local import fork_server; fork_server.warm_up(); print('warm')"


def test_a_long_name_of_the_temporary_folder_is_no_hindrance(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    environment = os.environ | {"TMPDIR": str(long)}
    assert subprocess.check_output([sys.executable, "-c", WARM_UP], env=environment, timeout=50) == b"warm\n"
    assert not list(long.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_ends_the_command_in_order(number: int, tmp_path: Path) -> None:
    process = start_command(tmp_path / "run")
    assert eventually(lambda: is_training(tmp_path / "run"), 40)
    family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    began = time.monotonic()
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=30)
    assert time.monotonic() - began < 15
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1
    assert eventually(lambda: group_is_gone(family), 5)


def test_a_run_whose_terminal_is_closed_saves_its_state_and_leaves(tmp_path: Path) -> None:
    ours, terminal = os.openpty()

    def take_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    ends = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    process = start_command(tmp_path / "run", **ends, preexec_fn=take_terminal)
    os.close(terminal)
    assert eventually(lambda: is_training(tmp_path / "run"), 40)
    os.close(ours)  # upon which the kernel tells the leader of the session
    for _ in range(2):  # as a shell would, and the kernel at the shell's end
        os.killpg(process.pid, signal.SIGHUP)
        time.sleep(0.01)
    assert process.wait(30) == 130
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1


def test_a_run_goes_on_when_whoever_reads_its_output_has_left(tmp_path: Path) -> None:
    with start_command(tmp_path / "run", "--steps", "100", stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline() == "loading digits\n"
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 0, said
    assert said == "easgd-local: error: nobody takes the output any more; the command goes on without.\n"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "done"


def test_a_run_started_with_its_standard_streams_closed_takes_no_harm(tmp_path: Path) -> None:
    command = f"{sys.executable} -m easgd_local train easgd --workers 2 --steps 2 --out {tmp_path}/run <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], timeout=50).returncode == 0


def test_a_second_interrupt_does_not_wait_for_the_workers(tmp_path: Path, run: Runner) -> None:
    folder = tmp_path / "run"

    def interrupt_twice() -> None:
        assert eventually(lambda: is_training(folder), 20)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    thread = threading.Thread(target=interrupt_twice)
    thread.start()
    began = time.monotonic()
    stuck = tuple(Fault("pace", rank, seconds=3.0) for rank in range(2))  # steps of three seconds
    summary = run(out=str(folder), steps=100_000, faults=stuck, rule=EASGD(tau=10))
    thread.join()
    assert summary["status"] == "interrupted"
    assert time.monotonic() - began < 25
