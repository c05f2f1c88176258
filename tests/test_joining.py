"""`join`: the same runs under torchrun, whose processes the launcher does not own."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch

import easgd_local as easgd
from easgd_local import joining
from tests import loops
from tests.conftest import eventually, unpainted

pytest_plugins = ["tests.fake_cuda"]
ROOT = Path(__file__).parents[1]
SCRIPT = """
import pathlib
import torch
import easgd_local as easgd
from tests import loops

with easgd.join(view=False, **OPTIONS) as worker:
    LOOP
pathlib.Path(f"after-{worker.rank}").write_text(f"{worker.center.folder.name} {len(worker.center)}")
if "model" in globals():
    torch.save(model.state_dict(), f"model-{worker.rank}.pt")
"""


def torchrun(folder: Path, loop: str, options: str = "", processes: int = 2) -> subprocess.Popen[str]:
    """A script that joins, under torchrun, in a process group of its own."""
    script = folder / "script.py"
    script.write_text(SCRIPT.replace("**OPTIONS", f"out='run', {options}").replace("LOOP", loop))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", script]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip


def ended(one: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, output and errors; nothing of it may be left."""
    folder = psutil.Process(one.pid).cwd()  # where all of it runs, in sessions of their own
    try:
        out, err = one.communicate(timeout=45)
    finally:
        left = [process for process in psutil.process_iter(["cwd"]) if process.info["cwd"] == folder]
        for process in left:
            process.kill()
    assert not left, left
    return one.returncode, out, err


def test_a_run_under_torchrun_on_gpus_is_the_same_as_a_launched_one_on_the_cpu(tmp_path, fake_cuda):
    code, _, err = ended(torchrun(tmp_path, "model = loops.train(worker)", "device='cuda', exchange='inline'"))
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["effective"]["exchange"] == "inline"
    assert [(tmp_path / f"after-{rank}").read_text() for rank in range(2)] == ["run 9", "run 9"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    with unpainted():
        launched = easgd.launch(loops.train, workers=2, threads=1, view=False, out=tmp_path / "launched")
    assert summary["center_sha256"] == launched.summary["center_sha256"]
    assert [report["state"] for report in summary["worker_reports"]] == ["finished", "finished"]
    # Saved after the block: the worker's own memory is given back.
    left = torch.load(tmp_path / "model-0.pt", weights_only=True)
    assert torch.isfinite(left["1.weight"]).all() and left["1.weight"].any()


def test_a_signal_to_torchrun_stops_the_run_with_a_checkpoint(tmp_path):
    stops = "loops.epochs_forever(worker)"
    one = torchrun(tmp_path, stops)
    assert eventually(lambda: (tmp_path / "run" / "under-way").exists(), 30)
    one.send_signal(signal.SIGTERM)
    code, _, err = ended(one)
    assert code != 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted", err
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert {path.name for path in saved.iterdir()} == {
        "manifest.json", "center.safetensors", "worker-0.pt", "worker-1.pt"
    }  # fmt: skip


def test_workers_with_different_models_are_told_in_one_sentence_each(tmp_path):
    code, _, err = ended(torchrun(tmp_path, "loops.different_shapes(worker)"))
    assert code == 1
    assert "Refusal: model: weight has shape (2, 3), strides (3, 1) in worker 0 and (3, 3)" in err
    assert not (tmp_path / "run").exists()


def test_what_fails_in_one_block_is_told_to_all_and_a_script_may_join_again(tmp_path):
    leader_fails = (
        "try:\n"
        "    with easgd.join(view=False, out='failed') as again:\n"
        "        loops.leader_fails(again)\n"
        "except (KeyError, SystemExit) as error:\n"
        "    pathlib.Path(f'fails-{worker.rank}').write_text(repr(error))\n"
    )
    again = f"loops.train(worker)\n{leader_fails}" + "".join(
        "try:\n"
        f"    with easgd.join(view=False, {options}) as again:\n"
        "        loops.train(again)\n"
        "except ValueError as error:\n"
        f"    pathlib.Path(f'{name}-{{worker.rank}}').write_text(str(error))\n"
        for name, options in {"taken": "out='run'", "differs": "device='cuda' if worker.rank else 'cpu'"}.items()
    ) + (
        "try:\n"
        "    with easgd.join(view=False, out='nothing'):\n"
        "        pass\n"
        "except ValueError as error:\n"
        "    pathlib.Path(f'nothing-{worker.rank}').write_text(str(error))\n"
    )
    code, _, err = ended(torchrun(tmp_path, again))
    assert code == 0, err
    assert "No such file" not in err
    differs = "join: device=cpu in process 0 and cuda in process 1; give every process the same options."
    for rank in range(2):
        assert (tmp_path / f"taken-{rank}").read_text().startswith("out=run: exists already and is not an empty f")
        assert (tmp_path / f"differs-{rank}").read_text() == differs
        assert (tmp_path / f"nothing-{rank}").read_text().startswith("fn: was over in worker")
    assert not (tmp_path / "nothing").exists()
    assert (tmp_path / "fails-0").read_text() == "KeyError('no such column')"
    assert (tmp_path / "fails-1").read_text() == "SystemExit(130)"
    summary = json.loads((tmp_path / "failed" / "summary.json").read_text())
    assert summary["status"] == "failed" and summary["failures"][0]["rank"] == 0
    (saved,) = (tmp_path / "failed" / "checkpoints").iterdir()
    assert (saved / "worker-1.pt").exists()


def test_who_waits_long_for_the_others_says_so(monkeypatch, capsys):
    monkeypatch.setattr(joining, "PATIENCE_S", 0.0)
    ours, leader = multiprocessing.Pipe()
    thread = threading.Timer(0.05, leader.send, [("graphics", None)])
    thread.start()
    assert joining._graphics(ours) is None
    thread.join()
    assert capsys.readouterr().err == "easgd_local: join waits for processes that have not come to it yet.\n"


def test_without_torchrun_join_says_what_to_do(monkeypatch):
    for name in joining.NEEDED:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"^join: RANK, .* are not set, so torchrun has not started this process; use"):
        with easgd.join():
            pass


def test_join_refuses_several_machines(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ValueError, match=r"^join: 4 of 8 processes are on this machine; the center is in the memory"):
        with easgd.join():
            pass
