"""The events of a run for TensorBoard, in the folder `tensorboard/` of the run; needs the extra `tensorboard`."""

from __future__ import annotations

from pathlib import Path

from easgd_local.metrics import Event
from easgd_local.view import notable
from easgd_local.wording import further_scores

# event kind -> (value, name in TensorBoard, factor)
SCALARS = {
    "worker": (
        ("loss", "worker loss", 1),
        ("samples_per_s", "samples per s", 1),
        ("wait_s", "waiting (s)", 1),
        ("exchange_s", "exchange (s)", 1),
    ),
    "center": (
        ("train_loss", "center/training loss", 1),
        ("test_loss", "center/test loss", 1),
        ("test_error", "center/test error (%)", 100),
        ("evaluate_s", "center/evaluation (s)", 1),
    ),
}


class TensorBoard:
    """A listener of events; x is the worker's own clock. With `resume_t` what was drawn beyond that step is hidden."""

    def __init__(self, folder: str | Path, *, resume_t: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError(
                "TensorBoard output needs the package tensorboard, which is not installed; "
                "remedy: pip install easgd_local[tensorboard]."
            ) from None
        purge_step = None if resume_t is None else resume_t + 1
        self._writer = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=purge_step)

    def __call__(self, event: Event) -> None:
        for name, shown, factor in SCALARS.get(event["kind"], ()):
            if event.get(name) is not None:
                tag = f"{shown}/worker {event['rank']}" if event["kind"] == "worker" else shown
                self._writer.add_scalar(tag, factor * event[name], event["t"])
        if event["kind"] == "center":
            for name, value in further_scores(event).items():
                self._writer.add_scalar(f"center/{name}", value, event["t"])
        if event["kind"] == "log":
            for name, value in event.items():
                if name not in ("kind", "t", "seconds", "rank", "nonfinite"):
                    self._writer.add_scalar(f"{name}/worker {event['rank']}", value, event["t"])
        if line := notable(event):
            self._writer.add_text("events", line, event["t"])

    def close(self) -> None:
        self._writer.close()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
