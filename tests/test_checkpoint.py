"""Checkpoints: whole or invisible, verified when read, put together from what each process brings."""

import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from easgd_local import checkpoint
from easgd_local.checkpoint import Assembly, Manifest

N = 1023


def vectors(seed: int, *names: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(N, np.float32) for name in names}


def bring(assembly: Assembly, run: Path, t: int, *ranks: int) -> None:
    """What workers `ranks` do for the checkpoint of step t; the clock of each is one further than that of the last."""
    for rank in ranks:
        name = checkpoint.worker_file(rank)
        digest = checkpoint.save_vectors(checkpoint.partial_folder(run, t), name, vectors(100 * t + rank, "x", "v"))
        assembly.add_worker(t, rank, t + rank, name, digest)


def saved(run: Path, t: int, *, keep: int = 3, workers: int = 2) -> Path:
    """A complete checkpoint of step t."""
    assembly = Assembly(run, config={}, workers=workers, n=N, keep=keep)
    assembly.add_center(t, vectors(t, "c"))
    bring(assembly, run, t, *range(workers))
    [(step, folder)] = assembly.commit(dict.fromkeys(range(workers), -1), seconds=t / 2)
    assert step == t
    return folder


def names(run: Path) -> list[str]:
    return sorted(os.listdir(run / "checkpoints"))


def test_what_was_saved_is_read_again_to_the_bit(tmp_path: Path) -> None:
    folder = saved(tmp_path, 120)
    assert folder == tmp_path / "checkpoints" / "step-00000120" and names(tmp_path) == ["step-00000120"]
    manifest = checkpoint.read(folder)
    assert (manifest.t, manifest.workers, manifest.n, manifest.seconds) == (120, 2, N, 60.0)
    assert manifest.clocks == {0: 120, 1: 121}
    assert manifest.files.keys() == {"center.safetensors", "worker-0.safetensors", "worker-1.safetensors"}
    assert sorted(os.listdir(folder)) == sorted([*manifest.files, "manifest.json"])
    for file, expected in (
        ("center.safetensors", vectors(120, "c")),
        (checkpoint.worker_file(0), vectors(12000, "x", "v")),
        (checkpoint.worker_file(1), vectors(12001, "x", "v")),
    ):
        found = checkpoint.load_vectors(folder, file)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_bits_that_are_no_numbers_survive(tmp_path: Path) -> None:
    values = np.array([np.nan, -np.nan, np.inf, -0.0, 1e-45], np.float32)
    values.view(np.uint32)[0] ^= 5  # a NaN with a payload
    checkpoint.save_vectors(tmp_path, "odd", {"x": values})
    assert checkpoint.load_vectors(tmp_path, "odd")["x"].tobytes() == values.tobytes()


def test_the_last_few_stay(tmp_path: Path) -> None:
    for t in (5, 10, 15, 20):
        saved(tmp_path, t, keep=2)
    assert names(tmp_path) == ["step-00000015", "step-00000020"]
    saved(tmp_path, 25, keep=1)
    assert names(tmp_path) == ["step-00000025"]


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for t in (999_999_999, 3, 100_000_001, 99_999_999):  # beyond eight digits as well
        saved(tmp_path, t, keep=9)
    assert [int(path.name[5:]) for path in checkpoint.steps(tmp_path)] == [3, 99_999_999, 100_000_001, 999_999_999]


def test_a_copy_under_another_name_is_none_of_the_runs_checkpoints(tmp_path: Path) -> None:
    folder = saved(tmp_path, 5)
    for name in ("step-00000009.bak", "step-best", ".step-00000011.partial"):
        shutil.copytree(folder, folder.with_name(name))
    assert checkpoint.steps(tmp_path) == [folder]
    saved(tmp_path, 6, keep=1)
    assert names(tmp_path) == [".step-00000011.partial", "step-00000006", "step-00000009.bak", "step-best"]


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert checkpoint.steps(tmp_path) == []
    checkpoint.discard_partial(tmp_path)


# Crashes


class Crash(Exception):
    """The process ends here."""


def crash_at(call: int, patch: pytest.MonkeyPatch) -> None:
    """Ends the process at the `call`-th step towards the disk; a removal ends half-way."""
    left = [call]

    def or_crash(action: Callable[..., Any], half: Callable[..., Any] | None = None) -> Callable[..., Any]:
        def act(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                if half:
                    half(*args)
                raise Crash
            return action(*args, **kwargs)

        return act

    def remove_a_file(folder: Path, **kwargs: Any) -> None:
        if files := sorted(folder.iterdir()) if folder.is_dir() else []:
            files[0].unlink()

    patch.setattr(os, "fsync", or_crash(os.fsync))
    patch.setattr(Path, "rename", or_crash(Path.rename))
    patch.setattr(shutil, "rmtree", or_crash(shutil.rmtree, remove_a_file))


@pytest.mark.parametrize("t", [15, 10])
def test_a_crash_at_any_moment_leaves_whole_checkpoints_alone(t: int, tmp_path: Path) -> None:
    """Also where the checkpoint of that step exists already, as after a resumed run that stopped at once."""
    left: list[list[int]] = []
    crashed = True
    while crashed:
        run = tmp_path / f"run-{len(left)}"
        saved(run, 5), saved(run, 10)
        with pytest.MonkeyPatch.context() as patch:
            crash_at(len(left) + 1, patch)
            try:
                saved(run, t, keep=1)
                crashed = False
            except Crash:
                pass
        complete = checkpoint.steps(run)
        left.append([checkpoint.read(folder).t for folder in complete])
        checkpoint.discard_partial(run)
        assert names(run) == [folder.name for folder in complete]
        saved(run, t, keep=1)  # and the work goes on
        assert names(run) == [f"step-{t:08d}"]
    # Every state on the way has been seen, and never fewer than one checkpoint.
    states = [[5, 10], [5, 10, 15], [10, 15], [15]] if t == 15 else [[5, 10], [5], [5, 10], [10]]
    assert [state for state, before in zip(left, [None, *left], strict=False) if state != before] == states


def test_what_a_crash_before_the_rename_leaves_is_hidden_and_discarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(self: Path, target: Path) -> None:
        raise Crash

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(Crash):
        saved(tmp_path, 7)
    assert names(tmp_path) == [".step-00000007.partial"] and checkpoint.steps(tmp_path) == []
    assert "manifest.json" in os.listdir(checkpoint.partial_folder(tmp_path, 7))
    checkpoint.discard_partial(tmp_path)
    assert names(tmp_path) == []


def test_the_manifest_is_written_when_everything_else_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def note(fd: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd if isinstance(fd, int) else fd.fileno()}")))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note)
    saved(tmp_path, 7)
    assert synced == [
        "worker-0.safetensors", "worker-1.safetensors", "center.safetensors", "manifest.json",
        ".step-00000007.partial", "checkpoints",
    ]  # fmt: skip


# Damage

REMEDY = "remove .*step-00000009 to use the checkpoint before it, or start a new run."


@pytest.mark.parametrize("name", ["worker-0.safetensors", "worker-1.safetensors", "center.safetensors"])
def test_any_flipped_bit_of_a_vector_file_is_found(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path, 9) / name
    whole, rng = path.read_bytes(), random.Random(name)
    for place in [0, 7, 8, len(whole) - 1, *rng.sample(range(len(whole)), 40)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=rf"{name}: [\d,]+ bytes that are not those that were written .*{REMEDY}"):
            checkpoint.read(path.parent)
    path.write_bytes(whole)
    checkpoint.read(path.parent)


def test_any_flipped_byte_of_the_manifest_is_found(tmp_path: Path) -> None:
    folder = saved(tmp_path, 9)
    path, rng = folder / "manifest.json", random.Random(0)
    whole, intact = path.read_bytes(), checkpoint.read(folder)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ rng.randrange(1, 256)]) + whole[place + 1 :])
        try:
            assert checkpoint.read(folder) == intact, place
            assert whole[place : place + 1].isspace()  # one blank became another
        except ValueError as error:
            assert re.search(f"manifest.json: the checkpoint's manifest is missing or damaged; {REMEDY}", str(error))


@pytest.mark.parametrize("name", ["worker-1.safetensors", "center.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "short", "long", "folder"])
def test_every_kind_of_damage_is_named(name: str, damage: str, tmp_path: Path) -> None:
    path = saved(tmp_path, 9) / name
    whole = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"empty": b"", "short": whole[:-1], "long": whole + b"\0"}[damage])
    with pytest.raises(ValueError, match=f"{name}: .*{REMEDY}") as told:
        checkpoint.read(path.parent)
    if name != "manifest.json":
        assert ("is missing or cannot be read" in str(told.value)) == (damage in ("missing", "folder"))


@pytest.mark.parametrize("text", ["", "[]", "5", "null", "{}", '{"sha256": 5}', '"sha256"', "\udcff"])
def test_a_manifest_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    path = saved(tmp_path, 9) / "manifest.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=f"manifest.json: .*{REMEDY}"):
        checkpoint.read(path.parent)


def test_a_file_that_is_no_vector_file_is_named_though_its_digest_fits(tmp_path: Path) -> None:
    partial = checkpoint.partial_folder(tmp_path, 9)
    checkpoint.save_vectors(partial, "center.safetensors", vectors(0, "c"))
    (partial / "worker-0.safetensors").write_bytes(b"not vectors")
    digest = checkpoint._sync_and_digest(partial / "worker-0.safetensors")
    manifest = Manifest(9, 1, N, 0.0, {0: 9}, {"worker-0.safetensors": digest}, {})
    folder = checkpoint.commit(tmp_path, manifest, keep=1)
    with pytest.raises(ValueError, match=rf"worker-0.safetensors: not a safetensors file \(.*{REMEDY}"):
        checkpoint.read(folder)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"step-00000003/manifest.json: the checkpoint's manifest is missing"):
        checkpoint.read(tmp_path / "checkpoints" / "step-00000003")


# Putting together


def test_a_checkpoint_waits_for_the_center_and_for_every_rank(tmp_path: Path) -> None:
    assembly = Assembly(tmp_path, config={}, workers=3, n=N, keep=3)
    bring(assembly, tmp_path, 8, 0)
    assert assembly.commit(dict.fromkeys(range(3), -1), 1.0) == []
    assembly.add_center(8, vectors(8, "c"))
    assert assembly.commit(dict.fromkeys(range(3), -1), 1.0) == []
    bring(assembly, tmp_path, 8, 2)
    assert assembly.commit(dict.fromkeys(range(3), -1), 1.0) == [] and checkpoint.steps(tmp_path) == []
    bring(assembly, tmp_path, 8, 1)
    assert assembly.commit(dict.fromkeys(range(3), -1), 1.0) == [(8, tmp_path / "checkpoints" / "step-00000008")]
    assert assembly.commit(dict.fromkeys(range(3), -1), 2.0) == []  # once
    assert checkpoint.read(tmp_path / "checkpoints" / "step-00000008").clocks == {0: 8, 1: 9, 2: 10}


def test_workers_alone_make_no_checkpoint(tmp_path: Path) -> None:
    assembly = Assembly(tmp_path, config={}, workers=2, n=N, keep=3)
    bring(assembly, tmp_path, 8, 0, 1)
    assert assembly.commit(dict.fromkeys(range(2), -1), 1.0) == [] and checkpoint.steps(tmp_path) == []


def test_a_dead_worker_is_not_waited_for_and_absent(tmp_path: Path) -> None:
    assembly = Assembly(tmp_path, config={}, workers=3, n=N, keep=3)
    assembly.add_center(8, vectors(8, "c"))
    bring(assembly, tmp_path, 8, 0, 2)
    [(_, folder)] = assembly.commit(dict.fromkeys([0, 2], -1), 1.0)
    manifest = checkpoint.read(folder)
    assert (manifest.workers, manifest.clocks) == (3, {0: 8, 2: 10})
    assert manifest.files.keys() == {"center.safetensors", "worker-0.safetensors", "worker-2.safetensors"}


def test_what_a_worker_brought_before_it_died_is_kept(tmp_path: Path) -> None:
    assembly = Assembly(tmp_path, config={}, workers=2, n=N, keep=3)
    assembly.add_center(8, vectors(8, "c"))
    bring(assembly, tmp_path, 8, 0, 1)
    [(_, folder)] = assembly.commit(dict.fromkeys([0], -1), 1.0)
    assert checkpoint.read(folder).clocks == {0: 8, 1: 9}


def test_a_file_that_a_dying_worker_left_unfinished_belongs_to_nothing(tmp_path: Path) -> None:
    assembly = Assembly(tmp_path, config={}, workers=2, n=N, keep=3)
    assembly.add_center(8, vectors(8, "c"))
    bring(assembly, tmp_path, 8, 0)
    (checkpoint.partial_folder(tmp_path, 8) / checkpoint.worker_file(1)).write_bytes(b"half")
    [(_, folder)] = assembly.commit(dict.fromkeys([0], -1), 1.0)
    assert checkpoint.read(folder).clocks == {0: 8}


def test_a_center_alone_makes_no_checkpoint(tmp_path: Path) -> None:
    assembly = Assembly(tmp_path, config={}, workers=2, n=N, keep=3)
    assembly.add_center(8, vectors(8, "c"))
    assert assembly.commit(dict.fromkeys([], -1), 1.0) == [] and checkpoint.steps(tmp_path) == []


def test_several_checkpoints_are_put_together_at_once_and_written_in_order(tmp_path: Path) -> None:
    assembly = Assembly(tmp_path, config={}, workers=2, n=N, keep=1)
    for t in (16, 8):
        assembly.add_center(t, vectors(t, "c"))
        bring(assembly, tmp_path, t, 0)
    bring(assembly, tmp_path, 8, 1)
    bring(assembly, tmp_path, 16, 1)
    assert [t for t, _ in assembly.commit(dict.fromkeys(range(2), -1), 1.0)] == [8, 16]
    assert names(tmp_path) == ["step-00000016"]  # of the two the last one is kept
    found = checkpoint.load_vectors(checkpoint.steps(tmp_path)[0], "center.safetensors")["c"]
    assert np.array_equal(found, vectors(16, "c")["c"])


def test_a_checkpoint_does_not_wait_for_a_worker_that_joined_after_its_step(tmp_path: Path) -> None:
    assembly = Assembly(tmp_path, config={}, workers=2, n=N, keep=3)
    for t in (8, 16):
        folder, name = checkpoint.partial_folder(tmp_path, t), checkpoint.worker_file(0)
        digest = checkpoint.save_vectors(folder, name, {"x": np.zeros(N, np.float32)})
        assembly.add_worker(t, 0, t, name, digest)
        assembly.add_center(t, {"c": np.zeros(N, np.float32)})
    assert [t for t, _ in assembly.commit({0: -1, 1: 8}, 1.0)] == [8]  # worker 1, joined at 8, still owes step 16
