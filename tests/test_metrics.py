import json
import math
import sys

import numpy as np
import pytest

from easgd_local import metrics
from easgd_local.metrics import Metrics, read


def write_steps(folder, ts, **options):
    with Metrics(folder, **options) as log:
        for t in ts:
            log.write("center", t=t, seconds=t / 2, train_loss=1 / (1 + t))


def test_what_is_written_is_read_and_heard(tmp_path):
    heard = []
    with Metrics(tmp_path, [heard.append]) as log:
        log.write("worker", t=3, seconds=1.5, rank=0, loss=0.25)
        log.write("warning", t=np.int64(4), seconds=np.float32(2.5), message="é | [red]")
    assert (
        read(tmp_path)
        == heard
        == [
            {"kind": "worker", "t": 3, "seconds": 1.5, "rank": 0, "loss": 0.25},
            {"kind": "warning", "t": 4, "seconds": 2.5, "message": "é | [red]"},
        ]
    )


def test_every_line_is_on_disk_before_the_log_is_closed(tmp_path):
    with Metrics(tmp_path) as log:
        log.write("start", t=0, seconds=0.0, note="x" * 20_000)
        assert len(read(tmp_path)) == 1


def test_a_folder_without_a_log_has_no_events(tmp_path):
    assert read(tmp_path) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_null_on_disk_and_named(tmp_path, bad):
    with Metrics(tmp_path) as log:
        log.write("center", t=1, seconds=0.5, train_loss=bad, test_loss=2.0, test_error=None)
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert (line["train_loss"], line["test_loss"], line["nonfinite"]) == (None, 2.0, ["train_loss"])
    event = read(tmp_path)[0]
    assert math.isnan(event["train_loss"]) and event["test_error"] is None and "nonfinite" not in event


def test_a_list_with_a_value_that_is_not_finite_is_valid_json(tmp_path):
    assert metrics.finite({"a": [1.0, math.nan], "b": {"c": math.inf}, "d": 1}) == {
        "a": [1.0, None],
        "b": {"c": None},
        "d": 1,
        "nonfinite": ["a", "b"],
    }


def tear(folder, tail):
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(tail)


@pytest.mark.parametrize("tail", [b'{"kind": "center", "t": 2, "sec', b"\0\0\0\0", b"{", b'"half'])
def test_a_torn_last_line_is_ignored_by_a_reader_and_dropped_by_the_next_writer(tmp_path, tail):
    write_steps(tmp_path, [0, 1])
    tear(tmp_path, tail)
    assert [e["t"] for e in read(tmp_path)] == [0, 1]
    write_steps(tmp_path, [2])
    assert [e["t"] for e in read(tmp_path)] == [0, 1, 2]


def test_a_last_line_that_lacks_only_its_newline_is_kept(tmp_path):
    write_steps(tmp_path, [0, 1])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    write_steps(tmp_path, [2])
    assert [e["t"] for e in read(tmp_path)] == [0, 1, 2]


def test_a_broken_line_inside_is_an_error_that_names_it(tmp_path):
    write_steps(tmp_path, [0])
    tear(tmp_path, b"{torn\n")
    tear(tmp_path, b'{"kind": "end", "t": 1, "seconds": 0}\n')
    with pytest.raises(ValueError, match="line 2"):
        read(tmp_path)


def test_a_resumed_run_drops_what_it_will_do_again(tmp_path):
    write_steps(tmp_path, [0, 10, 20, 30])
    write_steps(tmp_path, [15, 20], resume_t=10)
    assert [e["t"] for e in read(tmp_path)] == [0, 10, 15, 20]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_that_is_not_installed_is_one_sentence_with_the_remedy(tmp_path, monkeypatch):
    from easgd_local.tensorboard import TensorBoard

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install easgd_local\[tensorboard\]"):
        TensorBoard(tmp_path)


def test_tensorboard_gets_the_losses_by_the_clock_of_the_worker(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from easgd_local.tensorboard import TensorBoard

    with TensorBoard(tmp_path) as board, Metrics(tmp_path, [board]) as log:
        log.write("worker", t=7, seconds=1.0, rank=1, loss=0.5, samples_per_s=None)
        log.write("center", t=9, seconds=1.0, test_error=0.25, train_loss=math.nan)
        log.write("death", t=9, seconds=1.0, rank=1, cause="killed")
    drawn = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(s.step, s.value) for s in drawn.Scalars("worker loss/worker 1")] == [(7, 0.5)]
    assert [(s.step, s.value) for s in drawn.Scalars("center/test error (%)")] == [(9, 25.0)]
    assert math.isnan(drawn.Scalars("center/training loss")[0].value)
