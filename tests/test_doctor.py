"""What `easgd-local doctor` says of a machine: of this one, and of ones that are pretended."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from easgd_local import cli, doctor, hardware

pytest_plugins = ["tests.fake_cuda"]


def test_without_a_driver_it_says_what_is_missing_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASGD_LIBCUDA", "libno.so")
    driver = next(iter(doctor.graphics()))
    assert (driver.subject, driver.found) == ("GPU driver", "none that can be used")
    assert "libno.so: cannot open" in driver.remedy and "install it, give" in driver.remedy


def test_each_gpu_is_told_with_what_the_exchange_needs(fake_cuda: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "2")
    found = [one for one in doctor.graphics() if one.subject.startswith("GPU ")]
    assert [one.subject for one in found] == ["GPU driver", *["GPU 0"] * 3, *["GPU 1"] * 3]
    assert re.fullmatch(r"for CUDA \d+\.\d+", found[0].found)
    assert found[1].found == "Fake GPU 0, sm_90, at 0000:10:00.0, link not told"
    assert found[2].found.startswith("waits for and writes of 64-bit words in streams: yes; ")
    assert found[3].found == "no peer access (none is needed)"
    assert not any(one.remedy for one in found)
    monkeypatch.setenv("FAKE_CUDA_PEERS", "1")
    assert [one.found for one in doctor.graphics() if one.subject == "GPU 1"][2] == "peer access to GPU 0"


def test_an_exchange_is_measured_on_the_gpu_too(fake_cuda: Path, nothing_left: None) -> None:
    told = list(doctor.examine(model="mlp", data="digits", workers=2, tau=5, batch_size=8))
    on_gpu = [one.found for one in told if one.subject == "on a GPU"]
    assert re.match(r"\d+\.\d\d ms a step of 8 samples", on_gpu[0])
    assert re.match(r"\d+\.\d{3} ms an exchange \(zerocopy\), \d", on_gpu[1])
    assert told[-1].found.startswith("`--device cuda` uses cuda (1 x Fake GPU 0")


def test_a_gpu_without_64_bit_words_in_streams_is_told_so(fake_cuda: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_ATTR", "122=0")
    needs = [one for one in doctor.graphics() if one.subject == "GPU 0"][1]
    assert "in streams: no;" in needs.found and "update the driver" in needs.remedy


def test_a_gpu_that_takes_one_process_at_a_time_is_told_so(fake_cuda: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_ATTR", "20=3")
    mode = [one for one in doctor.graphics() if one.subject == "GPU 0"][2]
    assert mode.found.startswith("takes one process at a time") and "nvidia-smi -c 0" in mode.remedy


def test_mps_is_seen_where_its_pipe_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert [one.found for one in doctor.graphics() if one.subject == "MPS"] == ["active"]
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "none"))
    assert [one.found for one in doctor.graphics() if one.subject == "MPS"] == ["not active"]


def test_missing_cupy_comes_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "versions", lambda: {"python": "3"})
    (cupy,) = [one for one in doctor.graphics() if one.subject == "CuPy"]
    assert cupy.found == "not installed" and "pip install 'easgd_local[cuda13]'" in cupy.remedy


def test_more_workers_than_cores_are_advised_against(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cores", lambda: 2)
    assert next(iter(doctor.machine(3))).remedy.endswith("try --workers 2")
    assert next(iter(doctor.machine(2))).remedy == ""


def test_the_prediction_follows_from_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = iter([0.010, 0.002])
    monkeypatch.setattr(doctor, "median_s", lambda work: next(timings))
    model, step, exchange, predicted = doctor.exchange(model="mlp", data="digits", workers=2, tau=4, batch_size=8)
    assert "17,226 parameters" in model.found
    assert step.found.startswith("10.00 ms for 8 samples")
    assert exchange.found.startswith("2.000 ms on the CPU, 0.1 GB/s")
    assert predicted.found.startswith("at tau=4 the exchange costs 5.00 % of a step")
    assert predicted.remedy == "a larger tau costs less: 1 % at --tau 20"


def test_the_command_prints_it_all_and_ends_with_what_will_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EASGD_LIBCUDA", "libno.so")
    assert cli.main(["doctor", "--workers", "1", "--batch-size", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("processor ") and re.search(r"\d cores for 1 workers", lines[0])
    assert any(re.match(r"exchange +\d+\.\d+ ms on the CPU, \d", line) for line in lines)
    assert lines[-1] == "So          `train` and `launch` run on the CPU here"


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--tau", "0"], "tau=0, batch_size=32, workers=4: each must be at least 1."),
    (["--model", "resnet19"], "resnet19"),
    (["--data", "digit"], "did you mean 'digits'"),
    (["--batch-size", "many"], "'many' is not a whole number"),
])  # fmt: skip
def test_what_cannot_be_timed_is_refused_in_one_sentence(flags: list[str], sentence: str, capsys: object) -> None:
    try:
        code = cli.main(["doctor", *flags])
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    error = capsys.readouterr().err  # type: ignore[attr-defined]
    assert code == 2 and sentence in error and error.count("\n") == 1
