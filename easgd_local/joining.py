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
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from easgd_local import child
from easgd_local.centers import load_center
from easgd_local.child import Refusal
from easgd_local.devices import take_seat
from easgd_local.gpus import chosen
from easgd_local.graphics import Graphics
from easgd_local.launcher import Child, Launcher
from easgd_local.launching import LaunchConfig, conduct, prepare, run_folder, view_of
from easgd_local.loop import LoopWorker
from easgd_local.looprun import LoopRun
from easgd_local.randomness import seed_all, seed_of
from easgd_local.run import signals
from easgd_local.visitor import Stopped

KEY_BYTES, WATCH_S = 32, 0.5
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
    options: dict[str, Any] = {"device": device, "exchange": exchange}
    config = LaunchConfig(
        fn=Path(getattr(__import__("__main__"), "__file__", "script")).stem, workers=workers,
        out=None if out is None else str(out), seed=seed, checkpoint_every=checkpoint_every, keep=keep,
        threads=torch.get_num_threads(), tensorboard=tensorboard, **options,
    )  # fmt: skip
    with contextlib.ExitStack() as ends:
        leader = _Leader(config, None if resume is None else Path(resume), view) if rank == 0 else None
        if leader is not None:
            leader.start()
            ends.callback(leader.end)
        conn = ends.enter_context(_meet(rank, config, leader))
        graphics = _graphics(conn)
        seed_all(seed_of(seed, rank))
        worker = LoopWorker(rank, workers, conn, seed, take_seat(graphics, rank))
        ends.enter_context(signals(_answer(leader, worker)))
        with contextlib.nullcontext() if leader else _outlived_by(_peer(conn)):
            yield from _block(worker, conn, leader)


def _block(worker: LoopWorker, conn: Connection, leader: _Leader | None) -> Iterator[LoopWorker]:
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
            leader.interrupt()  # or this process would not end before the others have come to theirs
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
def _meet(rank: int, config: LaunchConfig, leader: _Leader | None) -> Iterator[Connection]:
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
        pidfd, poll = os.pidfd_open(leader), select.poll()
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


def _answer(leader: _Leader | None, worker: LoopWorker) -> Callable[[int, FrameType | None], None]:
    """Ctrl-C and torchrun's own signal reach all processes; the leader stops the run in order, the others wait."""

    def answer(number: int, frame: FrameType | None) -> None:
        if not worker.is_attached:  # there is nothing to save yet
            raise KeyboardInterrupt
        if leader is not None:
            leader.interrupt()

    return answer


class _Guests(Launcher):
    """Processes that torchrun has started: seen to end through their pidfds, never reaped here."""

    def invite(self, conn: Connection, rank: int) -> Child:
        """One of them has connected and said its rank."""
        pid = _peer(conn)
        new = Child(f"worker-{rank}", rank, pid, conn, os.pidfd_open(pid))
        self._watch(new)
        return new

    def kill(self, one: Child) -> None:
        if one.pid != os.getpid():  # the leader's own process ends by itself
            super().kill(one)

    def close(self) -> None:
        """Forgets them: torchrun ends what is left."""
        for one in self.alive:
            self._bury(one)

    def _bury(self, one: Child) -> str | None:
        self._poll.unregister(one.pidfd)
        self._poll.unregister(one.conn)
        os.close(one.pidfd)
        self._children.remove(one)  # its connection stays open for the farewell
        return one.failure

    def __enter__(self) -> _Guests:
        return self


class _Leader(threading.Thread):
    """What the launcher does elsewhere, in a thread of rank 0."""

    def __init__(self, config: LaunchConfig, resume: Path | None, view: bool) -> None:
        super().__init__(name="easgd-leader")
        self._config, self._resume, self._view = config, resume, view
        self._run: LoopRun | None = None
        self._complete = self._ends = False
        self.key, self.store = os.urandom(KEY_BYTES), None
        name = f"\0easgd_local-{os.getpid()}-{os.urandom(8).hex()}"  # abstract: no file is left
        self._listener = Listener(name, family="AF_UNIX", backlog=config.workers, authkey=self.key)
        self.address = name

    def interrupt(self) -> None:
        """Stops the run in order."""
        if self._run is not None:
            self._run.interrupt()

    def end(self) -> None:
        """Waits until all have gone; if not all have come yet, for nobody any more."""
        self._ends = True
        if not self._complete:
            with contextlib.suppress(OSError, EOFError), Client(self.address, family="AF_UNIX", authkey=self.key):
                pass  # it wakes the thread
        self.join()

    def run(self) -> None:
        """Until all have gone."""
        conns: list[Connection] = []
        try:
            with self._listener:
                while len(conns) < self._config.workers:
                    conns.append(self._listener.accept())
                    if self._ends:
                        return
                self._complete = True
            guests = _Guests(Path())
            with guests:
                heard = [conn.recv() for conn in conns]  # all of them, since a refusal ends the connections
                for rank, theirs in heard:
                    self._check_options(rank, theirs)
                invited = [guests.invite(conn, rank) for conn, (rank, _) in zip(conns, heard, strict=True)]
                children = sorted(invited, key=lambda one: one.rank or 0)
                graphics, said = chosen(self._config.device, self._config.exchange)
                _say(conns, ("graphics", graphics))
                with run_folder(self._config, self._config.fn, self._resume) as folder:
                    _say(conns, ("over", self._lead(folder, guests, children, graphics, said)))
        except KeyboardInterrupt:  # the run is saved, and everybody leaves
            pass
        except Exception as error:
            _say(conns, ("failed" if self._run else "refused", str(error)))
        finally:
            for conn in conns:
                conn.close()

    def _check_options(self, rank: int, theirs: dict[str, Any]) -> None:
        for name, ours in self._config.to_json().items():
            if theirs[name] != ours and name != "threads":  # which is no option: each process has its own
                raise ValueError(
                    f"join: {name}={ours} in process 0 and {theirs[name]} in process {rank}; give every process the "
                    f"same options."
                )

    def _lead(
        self, folder: Path, guests: _Guests, children: list[Child], graphics: Graphics | None, said: list[str]
    ) -> str:
        with prepare(
            self._config, folder, self._resume, guests, children, _no_second_start, graphics, said
        ) as gathered:
            live = view_of(self._view)
            self._run = LoopRun(gathered, guests, [live] if live else [])
            outcome = conduct(self._run, live, "join")
        if isinstance(outcome, BaseException):
            raise outcome
        return str(outcome.folder.resolve())


def _say(conns: list[Connection], word: tuple[str, Any]) -> None:
    """Tells all that still listen."""
    for conn in conns:
        with contextlib.suppress(OSError):
            conn.send(word)


def _no_second_start(rank: int) -> Child:
    raise Refusal("on_failure=respawn: torchrun starts the processes, so join cannot start one again; use continue.")


def _peer(conn: Connection) -> int:
    """The process at the other end of a Unix socket."""
    with socket.socket(fileno=os.dup(conn.fileno())) as one:
        return int(struct.unpack("3i", one.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))[0])
