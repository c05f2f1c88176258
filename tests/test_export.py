"""The center as a file: the same bits in plain torch, whichever moment of the run and whatever form of file."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from easgd_local import data, models
from easgd_local.centers import load_center
from easgd_local.cli import main
from easgd_local.export import export
from easgd_local.rules.downpour import MVADownpour
from easgd_local.rules.eamsgd import EAMSGD

Runner = Callable[..., dict[str, Any]]
OF_THE_END = ("center.safetensors", "summary.json")


def plain() -> torch.nn.Module:
    return models.build("mlp", shape=(1, 8, 8), classes=10).eval()


def killed(folder: str) -> Path:
    """The run without what is written at its end."""
    for name in OF_THE_END:
        Path(folder, name).unlink()
    return Path(folder)


def load_pt(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("ending, load", [(".pt", load_pt), (".safetensors", load_file)])
def test_a_state_dict_loads_into_the_plain_module(ending: str, load: Any, run: Runner, tmp_path: Path) -> None:
    folder = run()["folder"]
    said = list(export(folder, str(tmp_path / f"model{ending}")))
    state = load(tmp_path / f"model{ending}")
    plain().load_state_dict(state, strict=True)
    assert {name: one.tolist() for name, one in state.items()} == {
        name: one.tolist() for name, one in load_center(folder).items()
    }
    assert said[0].endswith(f"{folder} at step 40, 17,226 numbers") and "load_state_dict" in said[-1]


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11 about what it has read itself
def test_a_program_holds_the_network_and_takes_any_number_of_pictures(run: Runner, tmp_path: Path) -> None:
    folder = run()["folder"]
    said = list(export(folder, str(tmp_path / "model.pt2")))
    program, model, digits = torch.export.load(tmp_path / "model.pt2").module(), plain(), data.load("digits")
    model.load_state_dict(load_center(folder))
    pictures = torch.from_numpy(data.prepare(digits.test.images[:7], digits))
    for count in (1, 7):
        assert torch.allclose(program(pictures[:count]), model(pictures[:count]), rtol=0, atol=1e-6)
    assert "float32[b, 1, 8, 8]: the middle of a picture, its pixels times 0.0625" in said[2]
    assert said[3].endswith("float32[b, 10], a class each") and f"torch.export.load('{tmp_path}/model.pt2')" in said[4]


@pytest.mark.parametrize("rule", [EAMSGD(tau=3), MVADownpour(tau=2, average_rate=0.1)], ids=lambda rule: rule.name)
def test_the_center_of_a_checkpoint_is_that_of_a_run_that_ended_there(rule: Any, run: Runner, tmp_path: Path) -> None:
    folder = run(rule=rule, steps=40, checkpoint_every=20)["folder"]
    list(export(folder, str(tmp_path / "middle.pt"), step=20))
    assert equal(load_pt(tmp_path / "middle.pt"), load_center(run(rule=rule, steps=20)["folder"]))
    ended = load_center(folder)
    said = list(export(str(killed(folder)), str(tmp_path / "newest.pt")))
    assert equal(load_pt(tmp_path / "newest.pt"), ended) and "at step 40" in said[0]


def test_of_an_end_and_a_later_checkpoint_the_later_is_taken(run: Runner, tmp_path: Path) -> None:
    """As when a run is interrupted, resumed and killed."""
    folder = Path(run(checkpoint_every=20)["folder"])
    values = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(values | {"steps": 13}))
    assert "at step 40" in next(export(str(folder), str(tmp_path / "one.pt")))
    assert "at step 13" in next(export(str(folder), str(tmp_path / "two.pt"), step=13))


def test_the_command_says_how_the_file_is_loaded_and_writes_none_twice(run: Runner, capsys: Any) -> None:
    folder = run()["folder"]
    assert main(["export", folder]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1].startswith(f"file     {folder}/center.pt") and out[2].endswith(f"(torch.load('{folder}/center.pt'))")
    assert main(["export", folder]) == 2
    sentence = "exists already; remove it, or choose another with --to."
    assert capsys.readouterr().err == f"easgd-local: error: to={folder}/center.pt: {sentence}\n"
    assert [path.name for path in Path(folder).iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize("how, sentence", [
    ({"run": "/nowhere"}, "run=/nowhere: no run is there"),
    ({"to": "model.onnx"}, r"to=model.onnx: the ending says what is written: .* choose one of them"),
    ({"to": "/nowhere/model.pt"}, "to=/nowhere/model.pt: there is no folder /nowhere; make it, or"),
    ({"step": 7}, r"step=7: .* holds the center of step 20, 40; choose one of them"),
])  # fmt: skip
def test_what_cannot_be_written_is_said(
    how: dict[str, Any], sentence: str, run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = run(checkpoint_every=20)["folder"]
    with pytest.raises(ValueError, match=f"^{sentence}"):
        list(export(**({"run": folder, "to": "model.pt"} | how)))
    assert not list(tmp_path.glob("*.pt"))


def test_a_run_without_any_center_says_so(run: Runner, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no center yet, neither of its end nor in a checkpoint; wait"):
        list(export(str(killed(run()["folder"])), str(tmp_path / "model.pt")))


def test_a_damaged_checkpoint_is_named(run: Runner, tmp_path: Path) -> None:
    folder = killed(run(checkpoint_every=40)["folder"])
    (folder / "checkpoints" / "step-00000040" / "center.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"center\.safetensors: 4 bytes that are not those that were written"):
        list(export(str(folder), str(tmp_path / "model.pt")))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"steps": null}'])
def test_a_damaged_summary_is_named(text: str, run: Runner, tmp_path: Path) -> None:
    folder = Path(run(steps=2)["folder"])
    (folder / "summary.json").write_text(text)
    with pytest.raises(ValueError, match=r"summary\.json: is damaged \(.*\); remove it to export a checkpoint"):
        list(export(str(folder), str(tmp_path / "model.pt")))


@pytest.mark.parametrize("change", [{"data": "synthetic"}, {"model": "cifar7"}, {"rule": "mvadownpour"}], ids=str)
def test_a_configuration_of_another_run_makes_no_wrong_file(
    change: dict[str, str], run: Runner, tmp_path: Path
) -> None:
    folder = killed(run(steps=4, checkpoint_every=2)["folder"])
    values = json.loads((folder / "config.json").read_text())
    if "rule" in change:
        values["config"]["rule"] = {"name": change["rule"]}
    elif "data" in change:
        values["effective"]["classes"] = 1000
    else:
        values["effective"]["input_shape"], values["config"]["model"] = [3, 32, 32], "cifar7"
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"step-00000004: is of another network or rule than config\.json says"):
        list(export(str(folder), str(tmp_path / "model.pt")))


def test_a_full_disk_is_told_and_leaves_nothing(
    run: Runner, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(steps=2)["folder"]

    def full(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    for ending in (".pt", ".safetensors", ".pt2"):
        assert main(["export", folder, "--to", str(tmp_path / f"model{ending}")]) == 1
        said = f"{tmp_path}/model{ending}: cannot be written (No space left on device); give another --to."
        assert capsys.readouterr().err == f"easgd-local: error: {said}\n"
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_of_a_loop_of_ones_own_there_is_a_state_dict_and_no_program(run: Runner, tmp_path: Path) -> None:
    folder = Path(run()["folder"])
    values = json.loads((folder / "config.json").read_text())
    del values["config"]["data"]  # which the configuration of such a run does not have
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"the model is a loop's own, which knows it alone; choose \.pt or"):
        list(export(str(folder), str(tmp_path / "model.pt2")))
    list(export(str(folder), str(tmp_path / "model.pt")))
    assert len(load_pt(tmp_path / "model.pt")) == 6
