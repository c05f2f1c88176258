"""Checkpoints: atomic directories from which a run goes on to the same bits.

    checkpoints/step-00000120/worker-0.safetensors    x and the rule's local vectors of worker 0, and its clock
                              worker-0.pt             instead, where the training loop is the user's: its whole state
                              center.safetensors      c and the rule's other shared vectors
                              manifest.json           written last: what belongs together, and the digest of each file

A checkpoint is written under a name that starts with a dot and renamed when all of it is on the disk. The cut is
consistent although nobody pauses: worker i saves when its own clock shows T, the center is the one after round
⌈T/τ⌉ - 1, and with strict turns that is exactly the center that the workers at T have seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

Vectors = Mapping[str, NDArray[Any]]  # float32, but for counts

_NAME = re.compile(r"step-\d+")  # a copy kept beside it under a longer name is not one of the run's checkpoints


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds. `clocks[rank]` is the clock of a saved worker; workers that were gone are absent.
    `config` is the configuration that the states in it belong to. `counts[rank]`, what `Tally` adds up, and
    `evaluate_s` are of the run from its beginning, like `seconds`."""

    t: int
    workers: int
    n: int
    seconds: float
    clocks: dict[int, int]
    files: dict[str, str]
    config: dict[str, Any]
    counts: dict[int, dict[str, float]] = field(default_factory=dict)
    evaluate_s: float = 0.0


def partial_folder(run: Path, t: int) -> Path:
    """Where the checkpoint of step t is assembled."""
    return run / "checkpoints" / f".step-{t:08d}.partial"


def worker_file(rank: int, kind: str = "safetensors") -> str:
    """Name of worker `rank`'s file in a checkpoint."""
    return f"worker-{rank}.{kind}"


def save_vectors(folder: Path, name: str, vectors: Vectors) -> str:
    """Writes named vectors to `folder/name`, on the disk when this returns; returns the file's SHA-256."""
    return save_bytes(folder, name, save(dict(vectors)))


def save_bytes(folder: Path, name: str, content: bytes | memoryview) -> str:
    """Writes `folder/name`, on the disk when this returns; returns the file's SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)  # a full disk is an OSError here, as everywhere
    return _sync_and_digest(folder / name)


def load_vectors(folder: Path, name: str) -> dict[str, NDArray[Any]]:
    """The vectors of one file of a checkpoint that `read` has verified."""
    return load_file(folder / name)


def commit(run: Path, manifest: Manifest, *, keep: int) -> Path:
    """Completes the assembled checkpoint of step `manifest.t` and drops all but the last `keep`; returns its folder."""
    partial = partial_folder(run, manifest.t)
    final = partial.with_name(f"step-{manifest.t:08d}")
    body = asdict(manifest)
    text = json.dumps(body | {"sha256": _digest_of(body)}, indent=1)
    with open(partial / "manifest.json", "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(partial)
    if final.exists():  # from before this launch: a run that was resumed there and stopped at once
        _remove(final)
    partial.rename(final)
    _sync_folder(final.parent)
    for old in steps(run)[:-keep]:
        _remove(old)
    return final


class _Saved(NamedTuple):
    """A worker's part of a checkpoint."""

    clock: int
    name: str
    digest: str
    counts: dict[str, float]


class Assembly:
    """The checkpoints of a run that are being put together: the launcher brings the center, each worker its own state.

    `keep` complete checkpoints stay.
    """

    def __init__(self, run: Path, *, config: dict[str, Any], workers: int, n: int, keep: int) -> None:
        self._run, self._config, self._workers, self._n, self._keep = run, config, workers, n, keep
        self._centers: dict[int, Vectors] = {}
        self._saved: dict[int, dict[int, _Saved]] = {}
        self._complete: set[int] = set()

    def add_center(self, t: int, vectors: Vectors) -> None:
        """The shared vectors at step t; the caller gives them away."""
        if t not in self._complete:
            self._centers[t] = vectors

    @property
    def pending(self) -> list[int]:
        """The steps of the checkpoints that wait for workers."""
        return sorted(self._centers)

    def drop_after(self, t: int) -> None:
        """The run stops at step t: checkpoints of later steps never get all their parts."""
        self._centers = {at: vectors for at, vectors in self._centers.items() if at <= t}

    def savers(self, t: int) -> set[int]:
        """The workers that have brought their part of the checkpoint of step t: all when it is complete."""
        return set(range(self._workers)) if t in self._complete else set(self._saved.get(t, ()))

    def add_worker(
        self, t: int, rank: int, clock: int, name: str, digest: str, counts: Mapping[str, float] | None = None
    ) -> None:
        """Worker `rank` has written its file of the checkpoint of step t at its own clock, having counted so much."""
        if t not in self._complete:
            self._saved.setdefault(t, {})[rank] = _Saved(clock, name, digest, dict(counts or {}))

    def commit(
        self, joined: Mapping[int, int], seconds: float, *, evaluate_s: float = 0.0,
        counts: Mapping[int, Mapping[str, float]] | None = None,
    ) -> list[tuple[int, Path]]:  # fmt: skip
        """Completes the checkpoints to which everybody has brought its part; returns (step, folder) of each.

        `joined[rank]` is the clock at which a living worker joined: checkpoints up to that step do not wait for it.
        `counts` are those of workers that bring no part.
        """
        ready = []
        for t in sorted(self._centers.keys() & self._saved.keys()):
            if {rank for rank, clock in joined.items() if clock < t} <= self._saved[t].keys():
                ready.append(t)
        self._complete.update(ready)
        found = []
        for t in ready:
            saved, vectors = self._saved.pop(t), self._centers.pop(t)
            counted = {rank: dict(one) for rank, one in (counts or {}).items()}
            counted |= {rank: one.counts for rank, one in saved.items()}
            found.append((t, self._write(t, vectors, saved, seconds=seconds, counts=counted, evaluate_s=evaluate_s)))
        return found

    def _write(self, t: int, vectors: Vectors, saved: dict[int, _Saved], **known: Any) -> Path:
        files = {one.name: one.digest for one in saved.values()}
        files["center.safetensors"] = save_vectors(partial_folder(self._run, t), "center.safetensors", vectors)
        clocks = {rank: one.clock for rank, one in saved.items()}
        manifest = Manifest(
            t=t, workers=self._workers, n=self._n, clocks=clocks, files=files, config=self._config, **known
        )
        return commit(self._run, manifest, keep=self._keep)


def steps(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = (run / "checkpoints").glob("step-*")
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=lambda path: int(path.name[5:]))


def newest(run: Path) -> tuple[Path, Manifest]:
    """The last complete checkpoint of a run, verified; `ValueError` when there is none."""
    complete = steps(run)
    if not complete:
        raise ValueError(
            f"resume={run}: this run has no checkpoint (an interrupted run writes one); start it again, with "
            f"checkpoint_every (--checkpoint-every) to have some."
        )
    return complete[-1], read(complete[-1])


def discard_partial(run: Path) -> None:
    """Removes what an interrupted process had not completed."""
    for folder in (run / "checkpoints").glob(".step-*.partial"):
        shutil.rmtree(folder)


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint, every file of it verified; `ValueError` names the file that is damaged."""
    path = folder / "manifest.json"
    try:
        body = json.loads(path.read_text())
        digest = body.pop("sha256")
        if digest != _digest_of(body):
            raise ValueError("digest")
        for name in ("clocks", "counts"):
            body[name] = {int(rank): value for rank, value in body.get(name, {}).items()}
        manifest = Manifest(**body)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: the checkpoint's manifest is missing or damaged; {_remedy(folder)}") from error
    for name, digest in manifest.files.items():
        _verify(folder, name, digest)
    return manifest


def _verify(folder: Path, name: str, digest: str) -> None:
    path = folder / name
    try:
        found = _sync_and_digest(path)
    except OSError as error:
        raise ValueError(
            f"{path}: a file of the checkpoint is missing or cannot be read ({error.strerror}); {_remedy(folder)}"
        ) from error
    if found != digest:
        raise ValueError(
            f"{path}: {path.stat().st_size:,} bytes that are not those that were written (SHA-256 differs); "
            f"{_remedy(folder)}"
        )
    try:
        if path.suffix == ".safetensors":
            load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error}); {_remedy(folder)}") from error


def _remove(folder: Path) -> None:
    """Hides a checkpoint, then removes it: half a checkpoint is never seen under its own name."""
    hidden = folder.with_name(f".{folder.name}.old.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _remedy(folder: Path) -> str:
    return f"remove {folder} to use the checkpoint before it, or start a new run."


def _sync_and_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _digest_of(body: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
