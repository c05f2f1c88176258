"""`join`: the processes of torchrun as workers around one center.

Rank 0 leads: a thread of it does what the launcher does elsewhere. The others find it through the store that torchrun
gives and a Unix socket, over which the center's descriptor is passed; nothing of it is left when the processes end.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import select
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client, Connection
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from easgd_local import child, linux
from easgd_local.centers import load_center
from easgd_local.child import Refusal
from easgd_local.devices import take_seat
from easgd_local.graphics import Graphics
from easgd_local.launching import LaunchConfig
from easgd_local.leading import Leader, peer
from easgd_local.loop import LoopWorker
from easgd_local.plan import Stopped
from easgd_local.randomness import seed_all, seed_of
from easgd_local.signals import signals

WATCH_S = 0.5
PATIENCE_S = 60.0  # after which is said that somebody has not come
_JOINS = itertools.count()  # a script may join several times
INTERRUPTED = 130
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextlib.contextmanager
def join(
    *, device: str = "auto", exchange: str = "auto", out: str | Path | None = None, resume: str | Path | None = None,
    seed: int = 0, checkpoint_every: int = 0, keep: int = 3, tensorboard: bool = False, view: bool = True,
) -> Iterator[LoopWorker]:  # fmt: skip
    """A worker in a script that torchrun has started, `torchrun --standalone --nproc-per-node 4 script.py`.

        with easgd.join() as worker:
            train(worker)
        if worker.rank == 0:
            model.load_state_dict(worker.center)

    The worker is that of `launch`, whose docstring says what the options mean; every process gives the same ones. The
    block ends when all workers have come to its end; the model keeps this worker's values. When one of them dies
    torchrun ends all, unlike `launch`.

    Raises `ValueError` where torchrun has not started the process, on several machines, and for what cannot work;
    `SystemExit` with 130 after an interrupted run is saved.
    """
    rank, workers = _place()
    linux.check()
    options: dict[str, Any] = {"device": device, "exchange": exchange}
    config = LaunchConfig(
        fn=Path(getattr(__import__("__main__"), "__file__", "script")).stem, workers=workers,
        out=None if out is None else str(out), seed=seed, checkpoint_every=checkpoint_every, keep=keep,
        threads=torch.get_num_threads(), tensorboard=tensorboard, **options,
    )  # fmt: skip
    with contextlib.ExitStack() as ends:
        leader = Leader(config, None if resume is None else Path(resume), view) if rank == 0 else None
        if leader is not None:
            leader.start()
            ends.callback(leader.end)
        conn = ends.enter_context(_meet(rank, config, leader))
        graphics = _graphics(conn)
        seed_all(seed_of(seed, rank))
        worker = LoopWorker(rank, workers, conn, seed, take_seat(graphics, rank))
        ends.enter_context(signals(_answer(leader, worker)))
        with contextlib.nullcontext() if leader else _outlived_by(peer(conn)):
            yield from _block(worker, conn, leader)


def _block(worker: LoopWorker, conn: Connection, leader: Leader | None) -> Iterator[LoopWorker]:
    """The user's block, and how it ends."""
    drained = False
    try:
        try:
            yield worker
            worker.finish()
            worker.release()
            drained = True
        except Stopped:
            worker.drain()
            drained = True
            raise
        except Exception:
            worker.finish_exchange()
            raise
        finally:
            worker.close(drained=drained)
    except Stopped:
        conn.send(("stopped",))
        conn.send(("gone",))
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        with contextlib.suppress(OSError):
            conn.send(child.failure(error))
            conn.send(("gone",))
        if leader is not None:
            traceback.print_exc()  # torchrun may end this process before Python does
            leader.fail(f"worker 0, which leads, raised {type(error).__name__}: {error}")
        raise
    except BaseException:
        with contextlib.suppress(OSError):
            conn.send(("gone",))
        raise
    conn.send(("gone",))
    how, what = conn.recv()
    if how == "failed":
        raise RuntimeError(what)
    if how == "refused":
        raise Refusal(what)
    worker.center = load_center(what)


def _graphics(conn: Connection) -> Graphics | None:
    """The GPUs that the leader has found, None on the CPU, once all have come and said the same."""
    if not conn.poll(PATIENCE_S):
        print("easgd_local: join waits for processes that have not come to it yet.", file=sys.stderr, flush=True)
    word, what = conn.recv()
    if word == "refused":
        raise Refusal(what)
    assert what is None or isinstance(what, Graphics)
    return what


def _place() -> tuple[int, int]:
    """Rank and number of workers; `ValueError` where torchrun has not said them, or has started several machines."""
    if missing := [name for name in NEEDED if name not in os.environ]:
        raise ValueError(
            f"join: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set, so torchrun has not "
            f"started this process; use torchrun --standalone --nproc-per-node N script.py, or easgd_local.launch."
        )
    rank, workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    here = int(os.environ.get("LOCAL_WORLD_SIZE", workers))
    if here != workers:
        raise ValueError(
            f"join: {here} of {workers} processes are on this machine; the center is in the memory of one machine, so "
            f"start them all there, with --standalone."
        )
    return rank, workers


@contextlib.contextmanager
def _meet(rank: int, config: LaunchConfig, leader: Leader | None) -> Iterator[Connection]:
    """A connection to the leader. Its address and key go through torchrun's store."""
    from torch.distributed import PrefixStore, rendezvous

    store, _, _ = next(iter(rendezvous("env://")))
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"easgd_local/{restarts}/{next(_JOINS)}", store)
    if leader is not None:
        store.set("address", pickle.dumps((leader.address, leader.key)))
        leader.store = store  # it must outlive the others' asking
    address, key = pickle.loads(store.get("address"))
    with Client(address, family="AF_UNIX", authkey=key) as conn:
        conn.send((rank, config.to_json()))
        yield conn


@contextlib.contextmanager
def _outlived_by(leader: int) -> Iterator[None]:
    """The process ends at once if the leader's does meanwhile: nobody passes turns any more."""
    over = threading.Event()

    def watch() -> None:
        pidfd, poll = linux.pidfd_open(leader), select.poll()
        poll.register(pidfd, select.POLLIN)
        while not over.is_set():
            if poll.poll(WATCH_S * 1000) and not over.is_set():
                print("easgd_local: the process of rank 0 has died, so the run is over.", file=sys.stderr, flush=True)
                os._exit(1)
        os.close(pidfd)

    watcher = threading.Thread(target=watch, name="easgd-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()


def _answer(leader: Leader | None, worker: LoopWorker) -> Callable[[int, FrameType | None], None]:
    """Ctrl-C and torchrun's own signal reach all processes; the leader stops the run in order, the others wait."""

    def answer(number: int, frame: FrameType | None) -> None:
        if not worker.is_attached:  # there is nothing to save yet
            raise KeyboardInterrupt
        if leader is not None:
            leader.interrupt()

    return answer
