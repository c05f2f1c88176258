import io
import math

import pytest
from rich.console import Console

from easgd_local.view import Lines, Screen, open_view, summary_table

START = {
    "kind": "start",
    "t": 0,
    "seconds": 0.0,
    "rule": "easgd",
    "model": "mlp",
    "data": "mnist",
    "workers": 8,
    "steps": 1000,
    "parameters": 1199882,
    "threads": 1,
    "device": "cpu",
}
SUMMARY = {
    "status": "done",
    "rule": "easgd",
    "workers": 3,
    "steps": 1000,
    "seconds": 10.0,
    "wait_s": 3.0,
    "train_loss": 0.125,
    "test_loss": math.nan,
    "test_error": 0.0234,
    "center_sha256": "9f" * 32,
    "warnings": ["[odd] markup"],
    "failures": [{"rank": 1, "t": 500, "cause": "killed by signal 9"}],
    "worker_reports": [
        {
            "rank": 0,
            "state": "finished",
            "steps": 1000,
            "exchanges": 100,
            "samples_per_s": 31.5,
            "wait_s": 3.0,
            "exchange_s": 0.5,
            "waited_for_s": [0.0, 1.0, 2.0],
        }
    ],
}


class Clock:
    """Time that passes only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def worker(rank, t, **values):
    return {
        "kind": "worker",
        "t": t,
        "seconds": t / 10,
        "rank": rank,
        "loss": 0.5,
        "samples_per_s": 300.0,
        "wait_s": t / 40,
        **values,
    }


def center(t, error, loss=0.25):
    return {"kind": "center", "t": t, "seconds": t / 10, "train_loss": loss, "test_loss": 0.375, "test_error": error}


def screen(width=80, height=40):
    clock = Clock()
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)
    return Screen(console, clock), clock


def drawn(view):
    """What is on the screen: lines of text."""
    console = view.console
    with console.capture() as capture:
        console.print(view.render())
    return [line.rstrip() for line in capture.get().splitlines()]


def plain():
    clock, file = Clock(), io.StringIO()
    return Lines(Console(file=file, width=80), clock), clock, file


@pytest.mark.parametrize("width", [80, 120])
def test_eight_workers_fit_one_line_each(width):
    view, _ = screen(width)
    view(START)
    view(center(900, 0.05))
    for rank in range(8):
        view(worker(rank, 990))
    view.tick([990] * 8, waiting_for={7: 6})
    lines = drawn(view)
    assert all(len(line) <= width for line in lines)
    assert sum("25 %" in line and "0.5000" in line for line in lines) == 8
    assert sum(line.endswith("waiting for worker 6") for line in lines) == 1
    assert "worker loss" in lines[0] and any("center training loss 0.2500" in line for line in lines)


def test_the_best_test_error_is_remembered_with_its_step():
    view, _ = screen(120)
    view(START)
    for event in (center(10, 0.5), center(20, 0.125), center(30, 0.25), center(40, math.nan, loss=math.nan)):
        view(event)
    text = "\n".join(drawn(view))
    assert "best 12.50 % at step 20" in text
    assert "center training loss NaN" in text and "test error NaN" in text


def test_a_dead_worker_makes_no_progress_and_a_respawned_one_does():
    view, _ = screen()
    view({**START, "workers": 1})
    view({"kind": "death", "t": 31, "seconds": 3.0, "rank": 0, "cause": "killed by signal 9"})
    view.tick([500])
    assert view.board.rows[0].t == 31 and drawn(view)[1].endswith("died")
    view({"kind": "respawn", "t": 31, "seconds": 3.0, "rank": 0})
    view.tick([32])
    assert view.board.rows[0].t == 32 and drawn(view)[1].endswith("training")


def test_a_loss_that_is_not_a_number_is_shown_and_then_forgotten():
    view, _ = screen()
    view({**START, "workers": 1})
    view(worker(0, 10, loss=math.nan))
    assert "NaN" in drawn(view)[1]
    view(worker(0, 20, loss=0.75))
    assert "0.7500" in drawn(view)[1]


def test_the_time_left_is_not_known_before_anything_moved():
    view, clock = screen()
    view({**START, "workers": 1})
    view.tick([0])
    assert any("left not known yet" in line for line in drawn(view))
    clock.now += 10
    view.tick([100])  # 10 steps/s, 900 to go
    assert any("left about 0:01:30" in line for line in drawn(view))


def test_with_more_workers_than_lines_the_dead_and_the_late_are_shown():
    view, _ = screen(height=12)
    view({**START, "workers": 64})
    view({"kind": "death", "t": 31, "seconds": 3.0, "rank": 40, "cause": "killed"})
    view.tick([100] * 50 + [7] + [100] * 13)
    lines = drawn(view)
    assert len(lines) <= 12
    assert lines[3].split()[:2] == ["50", "7"] and any(line.endswith("died") for line in lines)
    assert any("and 61 more: 61 training" in line for line in lines)


def test_a_live_screen_ends_with_its_last_state():
    view, _ = screen()
    with view:
        view({**START, "workers": 1})
        view.tick([999])
        view({"kind": "finished", "t": 1000, "seconds": 9.0, "rank": 0})
    last = view.console.file.getvalue().rpartition("worker loss")[2]
    assert "1,000" in last and "finished" in last


def test_a_bar_that_is_full_looks_so():
    view, _ = screen()
    view({**START, "workers": 1})
    view.tick([1000])
    (bar,) = list(view._bars(view.board.rows.values()).columns)[2].cells
    assert bar.finished_style == bar.complete_style != bar.style


def test_while_the_center_is_evaluated_a_line_says_so():
    view, clock, file = plain()
    view({**START, "workers": 2})
    clock.now += 11
    view.tick([0, 0], evaluating=[0, 1])
    assert "workers at step 0, evaluating the center" in file.getvalue()


def test_without_a_terminal_there_are_plain_lines():
    assert isinstance(open_view(io.StringIO()), Lines)
    view, _, file = plain()
    view(START)
    view(worker(0, 10))
    view(center(20, 0.0234))
    view({"kind": "death", "t": 31, "seconds": 3.0, "rank": 2, "cause": "killed by\nsignal 9 [SIGKILL]"})
    lines = file.getvalue().splitlines()
    assert len(lines) == 3 and "\r" not in file.getvalue() and "\x1b" not in file.getvalue()
    assert "center training loss 0.2500" in lines[1] and "test error 2.34 %" in lines[1]
    assert lines[2].endswith("worker 2 died at step 31: killed by signal 9 [SIGKILL]")


def test_plain_progress_comes_at_most_every_ten_seconds():
    view, clock, file = plain()
    view({**START, "workers": 2})
    for second in range(31):
        clock.now = 100.0 + second
        view.tick([10 * second, 20 * second])
    lines = file.getvalue().splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["0:00:10", "0:00:20", "0:00:30"]
    assert "workers at step 100 to 200" in lines[0] and "left about 0:01:30" in lines[0]


def test_plain_progress_tells_nan_from_numbers():
    view, clock, file = plain()
    view({**START, "workers": 2})
    view(worker(0, 10))
    view(worker(1, 10, loss=math.nan))
    clock.now += 10
    view.tick([10, 10])
    assert "worker loss 0.5000, NaN in 1 of 2 workers" in file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_the_summary_fits_and_shows_where_the_picture_is(width):
    file = io.StringIO()
    Console(file=file, width=width).print(summary_table(SUMMARY, "runs/a"))
    text = file.getvalue()
    assert all(len(line) <= width for line in text.splitlines())
    for words in (
        "0.1250",
        "NaN",
        "2.34 %",
        "10.0 % of their time",
        "9f" * 32,
        "2 (2.00 s)",
        "[odd] markup",
        "worker 1 died at step 500: killed by signal 9",
        "runs/a/curves.png",
    ):
        assert words in text


def test_how_to_go_on_with_an_interrupted_run_is_said_where_there_is_a_checkpoint(tmp_path):
    def shown():
        file = io.StringIO()
        Console(file=file, width=500).print(summary_table({**SUMMARY, "status": "interrupted"}, tmp_path))
        return next(line for line in file.getvalue().splitlines() if line.startswith("go on with "))

    assert shown() == "go on with  nothing: it was stopped before there was a checkpoint"
    (tmp_path / "checkpoints" / "step-00000012").mkdir(parents=True)
    assert shown() == f"go on with  easgd-local train --resume {tmp_path}"


def test_an_empty_summary_is_not_known():
    file = io.StringIO()
    Console(file=file, width=80).print(summary_table({}))
    assert "not known" in file.getvalue()
