import json
import math

import pytest

from easgd_local import curves, report, wording
from easgd_local.metrics import Metrics, finite, read

CONFIG = {
    "config": {"rule": "easgd", "model": "mlp", "data": "mnist", "workers": 3, "tau": 7, "lr": 0.05},
    "versions": {"torch": "2.x"},
    "hardware": {"cpu": "a | b"},
}
SUMMARY = {
    "status": "done",
    "rule": "easgd",
    "workers": 3,
    "steps": 100,
    "seconds": 10.0,
    "train_loss": 0.125,
    "test_error": 0.0234,
    "wait_s": 3.0,
    "center_sha256": "9f" * 32,
    "vectors": {"shared": {"c": 4000}, "local": {"x": 4000, "v": 8000}},
    "worker_reports": [
        {
            "rank": 0,
            "state": "finished",
            "steps": 100,
            "exchanges": 10,
            "samples_per_s": 31.5,
            "wait_s": 3.0,
            "exchange_s": 0.5,
            "waited_for_s": [0.0, 1.0, 2.0],
        }
    ],
    "failures": [{"rank": 1, "t": 50, "cause": "killed by signal 9"}],
    "warnings": ["small | odd"],
}


def run_folder(folder, losses=(), workers=(), summary=SUMMARY):
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if summary:
        (folder / "summary.json").write_text(json.dumps(finite(summary)))
    with Metrics(folder) as log:
        for t, loss in enumerate(workers, 1):
            log.write("worker", t=t, seconds=t / 10, rank=t % 3, loss=loss)
        for t, loss in enumerate(losses, 1):
            log.write(
                "center", t=t, seconds=t / 10, train_loss=loss, test_loss=2 * loss, test_error=min(1.0, loss / 10)
            )
    return folder


def panels(folder):
    config, summary = (report._object(folder / name) for name in ("config.json", "summary.json"))
    return curves.figure(config, summary, read(folder))


def test_both_files_are_written(tmp_path):
    report.write(run_folder(tmp_path, [1.0, 0.5], workers=[1.0, 2.0, 3.0]))
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for words in (
        "# easgd,  mlp on mnist,  p = 3,  τ = 7",
        "| center test error | 2.34 % |",
        "10.0 % of their time",
        "](curves.png)",
        "| best center test error | 5.00 % at step 2, 0.2 s |",
        "| 0 | finished | 100 | 10 | 31.5 | 0.50 | 3.00 | 2 (2.00 s), 1 (1.00 s) |",
        "| local | v | 8,000 |",
        "| 1 | 50 | killed by signal 9 |",
        "- small \\| odd",
        "| cpu | a \\| b |",
        "9f" * 32,
        "| lr | 0.05 |",
    ):
        assert words in text


def test_a_folder_with_nothing_in_it_still_gets_a_picture_that_says_so(tmp_path):
    report.write(tmp_path)
    assert "not known" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert {text.get_text() for ax in panels(tmp_path).axes for text in ax.texts} == {"nothing was measured"}


def test_a_run_cut_short_reports_its_last_center(tmp_path):
    report.write(run_folder(tmp_path, [1.0, 0.5, math.nan], summary=None))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| center training loss | NaN |" in text and "| status | not known |" in text


def test_a_single_point_is_marked(tmp_path):
    lines = panels(run_folder(tmp_path, [0.5])).axes[0].lines
    assert [line.get_marker() for line in lines] == ["o", "o"]


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ([2.0, 1.0, 0.5], "linear"),
        ([2.0, 0.1], "log"),
        ([2.0, 0.1, 0.0], "log"),
        ([2.0, 0.1, -1.0], "linear"),
        ([0.0, 0.0], "linear"),
        ([math.nan], "linear"),
    ],
)
def test_loss_is_logarithmic_beyond_a_decade(tmp_path, losses, scale):
    figure = panels(run_folder(tmp_path, losses))
    assert figure.axes[0].get_yscale() == figure.axes[1].get_yscale() == scale


def test_a_loss_that_is_not_finite_is_a_gap_and_a_mark(tmp_path):
    figure = panels(run_folder(tmp_path, [1.0, math.nan, 0.5]))
    lines = {line.get_label(): line for line in figure.axes[1].lines}
    assert [math.isnan(y) for y in lines["center training loss"].get_ydata()] == [False, True, False]
    assert list(lines["a loss is not finite (NaN)"].get_xdata()) == [2]


def test_a_path_that_is_no_folder_is_the_users_mistake(tmp_path):
    with pytest.raises(ValueError, match="run folder"):
        report.write(tmp_path / "absent")


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (None, "not known"),
        (math.nan, "NaN"),
        (math.inf, "inf"),
        (0.0, "0.0000"),
        (0.12345, "0.1235"),
        (1.5e-5, "1.50e-05"),
        (-2e7, "-2.00e+07"),
    ],
)
def test_a_loss_in_words(loss, text):
    assert wording.loss_text(loss) == text
