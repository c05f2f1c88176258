"""`easgd-local compare` with its processes: what is computed, what fails, what an interrupt leaves."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from easgd_local import cli, data, metrics, models, training
from easgd_local.chronicle import Chronicle
from easgd_local.compare import command, rival_run
from easgd_local.compare.measuring import Interrupted, measure
from easgd_local.compare.saved import saved_state
from easgd_local.data import prepare, shard, step_rng
from easgd_local.evaluate import evaluate
from tests.conftest import unpainted

STEPS, BATCH, WORKERS, LR, MOMENTUM, DECAY = 12, 6, 2, 0.05, 0.8, 0.01
SMALL: dict[str, Any] = {
    "entries": ["easgd tau=3", "msgd", f"ddp lr={LR} momentum={MOMENTUM}", "post-local-sgd tau=2 ddp_steps=3 lr=0.05"],
    "steps": STEPS, "batch_size": BATCH, "workers": WORKERS, "weight_decay": DECAY, "seeds": 1, "eval_every": 6,
    "threads": 1, "eval_samples": 50, "target_error": 0.5,
}  # fmt: skip
TIMES = {"seconds", "wall_s", "evaluate_s", "samples_per_s", "exchange_s", "wait_s", "curve", "load"}


def compare(out: Path, **changed: Any) -> list[Any]:
    """A small comparison; the pictures are composed but not painted."""
    with unpainted():
        return list(command.execute(out=str(out), **(SMALL | changed)))


def without_times(folder: Path) -> list[dict[str, Any]]:
    """The records but for what a clock has measured."""
    found = []
    for one in sorted(saved_state(folder)["records"], key=lambda one: (one["label"], one["seed"])):
        curve = [{name: value for name, value in each.items() if name != "seconds"} for each in one["curve"]]
        found.append({name: value for name, value in one.items() if name not in TIMES} | {"scores": curve})
    return found


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison that is over. Read-only."""
    folder = tmp_path_factory.mktemp("compare") / "over"
    compare(folder)
    return folder


def record_of(folder: Path, label: str) -> dict[str, Any]:
    return next(one for one in saved_state(folder)["records"] if one["label"].startswith(label))


def test_every_entry_has_its_run_folder_its_curve_and_its_numbers(compared: Path) -> None:
    state = saved_state(compared)
    assert [one["status"] for one in state["records"]] == ["done"] * 4
    for one in state["records"]:
        assert [each["t"] for each in one["curve"]] == [0, 6, 12]
        assert one["samples"] == one["curve"][-1]["samples"] == STEPS * BATCH * one["workers"]
        assert 0 == one["curve"][0]["seconds"] < one["curve"][1]["seconds"] <= one["seconds"] < one["wall_s"]
    for name in SMALL["entries"]:
        folder = compared / name.replace(" ", ",") / "seed-0"
        assert {"config.json", "metrics.jsonl", "summary.json", "report.md"} <= {each.name for each in folder.iterdir()}
        assert metrics.read(folder)[-1]["kind"] == "end" and not (folder / "meeting").exists()
    assert {"results.json", "report.md", "comparison.png"} <= {each.name for each in compared.iterdir()}
    assert [one["label"] for one in state["standings"]] == SMALL["entries"] and "processor" in state["hardware"]


def test_all_entries_start_from_the_same_model(compared: Path) -> None:
    starts = [tuple(sorted(one["curve"][0].items())) for one in saved_state(compared)["records"]]
    assert len(set(starts)) == 1


def test_a_comparison_made_twice_gives_the_same_numbers(compared: Path, tmp_path: Path, nothing_left: None) -> None:
    compare(tmp_path / "again")
    again = without_times(tmp_path / "again")
    assert again == without_times(compared) and all(one["center_sha256"] for one in again)


def reference(local_from: int, tau: int) -> torch.nn.Module:
    """The rivals in one process, by their definition: SGD on p copies, gradients averaged before step `local_from` and
    parameters after it, every τ steps."""
    dataset = data.load("digits")
    torch.manual_seed(0)
    model = models.build("mlp", shape=dataset.input_shape, classes=10)
    x = [[p.detach().clone() for p in model.parameters()] for _ in range(WORKERS)]
    v = [[torch.zeros_like(p) for p in each] for each in x]
    for t in range(STEPS):
        g = []
        for rank in range(WORKERS):
            indices = shard(0, rank, WORKERS, BATCH, len(dataset.train)).indices(t)
            images, labels = dataset.train.read(indices)
            inputs = torch.from_numpy(prepare(images, dataset, step_rng(0, rank, t)))
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), x[rank], strict=True):
                    parameter.copy_(value)
            loss = F.cross_entropy(model(inputs), torch.from_numpy(labels))
            g.append(torch.autograd.grad(loss, list(model.parameters())))
        if t < local_from:
            g = [[sum(each) / WORKERS for each in zip(*g, strict=True)]] * WORKERS  # type: ignore[list-item, arg-type]
        for rank in range(WORKERS):
            for k in range(len(x[rank])):
                decayed = g[rank][k] + DECAY * x[rank][k]
                v[rank][k] = MOMENTUM_OF[local_from] * v[rank][k] + decayed
                x[rank][k] = x[rank][k] - LR * (decayed + MOMENTUM_OF[local_from] * v[rank][k])
        if t >= local_from and (t - local_from) % tau == 0:
            x = [[sum(each) / WORKERS for each in zip(*x, strict=True)]] * WORKERS  # type: ignore[list-item, misc]
            x = [list(each) for each in x]
    with torch.no_grad():
        for parameter, *values in zip(model.parameters(), *x, strict=True):
            parameter.copy_(sum(values) / WORKERS)
    return model


MOMENTUM_OF = {STEPS: MOMENTUM, 3: 0.9}


@pytest.mark.parametrize("label, local_from", [("ddp", STEPS), ("post-local-sgd", 3)])
def test_a_rival_equals_its_definition_in_one_process(compared: Path, label: str, local_from: int) -> None:
    expected = reference(local_from, tau=2)
    folder = compared / record_of(compared, label)["label"].replace(" ", ",") / "seed-0"
    found = load_file(folder / "center.safetensors")
    assert found.keys() == expected.state_dict().keys()
    largest = max(float(value.abs().max()) for value in found.values())
    tolerance = STEPS * 8 * np.finfo(np.float32).eps * largest  # each step rounds a few times, in another order
    for name, value in expected.state_dict().items():
        assert float((found[name] - value).abs().max()) <= tolerance, name
    scores = evaluate(expected, data.load("digits"), samples=50)
    assert abs(record_of(compared, label)["test_loss"] - scores.test_loss) < 1e-5


def test_a_comparison_that_goes_on_skips_what_is_done(
    compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_left: None
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(compared, folder)
    state = json.loads((folder / "results.json").read_text())
    state["records"] = [one for one in state["records"] if not one["label"].startswith("ddp")]  # its folder is there
    (folder / "results.json").write_text(json.dumps(state))
    said = compare(folder)
    assert [line.split(",")[0] for line in said if isinstance(line, str)][1:-1] == [SMALL["entries"][2]]
    assert without_times(folder) == without_times(compared)
    assert record_of(folder, "easgd") == record_of(compared, "easgd")  # the times too: it was not run


def test_a_diverging_entry_is_reported_and_the_rest_goes_on(tmp_path: Path, nothing_left: None) -> None:
    entries = ["ddp lr=1e30", "easgd lr=1e5 tau=1", "msgd"]
    compare(tmp_path / "out", entries=entries)
    records = {one["label"]: one for one in saved_state(tmp_path / "out")["records"]}
    assert [records[label]["status"] for label in entries] == ["diverged", "diverged", "done"]
    assert records["ddp lr=1e30"]["steps"] == 6  # the first evaluation that shows it ends it
    assert (
        "| ddp lr=1e30 | 0 | diverged | the training loss is not finite |" in (tmp_path / "out/report.md").read_text()
    )


def test_a_rival_whose_process_dies_is_reported_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], nothing_left: None
) -> None:
    take = rival_run.RivalRun._take

    def kill_one(self: Any, rank: int, message: Any) -> None:
        if message[:2] == ("center", 6):
            self._launcher.kill(next(one for one in self._launcher.alive if one.rank == 1))
        take(self, rank, message)

    monkeypatch.setattr(rival_run.RivalRun, "_take", kill_one)
    words = ["ddp", "sgd", "--steps", "100000", "--workers", "2", "--seeds", "1", "--eval-every", "6", "--threads", "1"]
    alone = patched_steps(monkeypatch)
    with unpainted():
        assert cli.main(["compare", *words, "--out", str(tmp_path / "out")]) == cli.FAILED
    assert alone
    said = capsys.readouterr()
    assert "ddp, seed 0: failed (worker 1 died at step 6: killed by SIGKILL" in said.out and "1 of 2 over, " in said.out
    assert "sgd, seed 0: test error" in said.out and "easgd-local: error: ddp seed 0: failed; --resume" in said.err


def patched_steps(monkeypatch: pytest.MonkeyPatch) -> bool:
    """Rules make few steps, whatever is asked for: only the rival is to have time to die."""
    from easgd_local.compare import contest

    def few(entry: Any, config: Any, dataset: Any) -> dict[str, Any]:
        from dataclasses import replace

        return measure(entry, config if entry.is_rival else replace(config, steps=6), dataset)

    monkeypatch.setattr(contest, "measure", few)
    return True


@pytest.mark.parametrize("during, number", [
    ("a rule", signal.SIGINT), ("a rival", signal.SIGINT), ("a rival", signal.SIGTERM),
])  # fmt: skip
def test_an_interrupted_comparison_leaves_no_process_and_can_go_on(
    compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], during: str,
    number: int, nothing_left: None,
) -> None:  # fmt: skip
    entries = ["msgd", SMALL["entries"][0 if during == "a rule" else 2]]
    out, flags = tmp_path / "out", {name: value for name, value in SMALL.items() if name != "entries"}
    words = [*entries, *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items())]
    with monkeypatch.context() as patch, unpainted():
        interrupt_at(patch, 6, during, number)
        assert cli.main(["compare", *words, "--out", str(out)]) == cli.INTERRUPTED
    said = capsys.readouterr()
    assert said.err == f"easgd-local: error: interrupted; go on with easgd-local compare --resume {out}\n"
    assert [one["label"] for one in saved_state(out)["records"]] == ["msgd"]
    with unpainted():
        assert cli.main(["compare", "--resume", str(out)]) == cli.DONE
    expected = [one for one in without_times(compared) if one["label"] in entries]
    assert without_times(out) == expected


def interrupt_at(patch: pytest.MonkeyPatch, t: int, during: str, number: int) -> None:
    """Ctrl-C, or a signal like it, when a run of more than one worker has been evaluated at t."""
    kind, name = (Chronicle, "event") if during == "a rule" else (rival_run.RivalRun, "_event")
    write: Callable[..., None] = getattr(kind, name)

    def strike(self: Any, event: str, **values: Any) -> None:
        write(self, event, **values)
        at = values.get("t", getattr(self, "_t", None))
        workers = len(self._ranks) if during == "a rule" else self._plan.workers
        if event == "center" and at == t and workers > 1:
            os.kill(os.getpid(), number)

    patch.setattr(kind, name, strike)


def test_an_interrupted_run_is_told_apart_from_a_failed_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    comparison = command.make_comparison(**SMALL)
    monkeypatch.setattr(training, "train", lambda config, dataset: {"status": "interrupted"})
    config = comparison.config(comparison.entries[0], steps=3, out=str(tmp_path / "run"))
    with pytest.raises(Interrupted):
        measure(comparison.entries[0], config)
    with contextlib.suppress(Interrupted):
        monkeypatch.setattr(training, "train", lambda config, dataset: (_ for _ in ()).throw(RuntimeError("boom")))
        assert measure(comparison.entries[0], config)["cause"] == "RuntimeError: boom"
