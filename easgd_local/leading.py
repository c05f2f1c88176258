"""Rank 0 of torchrun's processes leads: a thread of it does what the launcher does elsewhere."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from easgd_local import linux
from easgd_local.child import Refusal
from easgd_local.gpus import chosen
from easgd_local.graphics import Graphics
from easgd_local.launcher import Child, Launcher
from easgd_local.launching import LaunchConfig, conduct, prepare, run_folder, view_of
from easgd_local.looprun import LoopRun

KEY_BYTES = 32


class Guests(Launcher):
    """Processes that torchrun has started: seen to end through their pidfds, never reaped here."""

    def invite(self, conn: Connection, rank: int) -> Child:
        """One of them has connected and said its rank."""
        pid = peer(conn)
        new = Child(f"worker-{rank}", rank, pid, conn, linux.pidfd_open(pid))
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

    def __enter__(self) -> Guests:
        return self


class Leader(threading.Thread):
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

    def fail(self, reason: str) -> None:
        """The same, when this process fails: torchrun ends the others, and nobody would lead them."""
        if self._run is not None:
            self._run.stop(reason)

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
            guests = Guests(Path())
            with guests:
                heard = [conn.recv() for conn in conns]  # all of them, since a refusal ends the connections
                for rank, theirs in heard:
                    self._check_options(rank, theirs)
                invited = [guests.invite(conn, rank) for conn, (rank, _) in zip(conns, heard, strict=True)]
                children = sorted(invited, key=lambda one: one.rank or 0)
                graphics, said = chosen(self._config.device, self._config.exchange, self._config.workers)
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
        self, folder: Path, guests: Guests, children: list[Child], graphics: Graphics | None, said: list[str]
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


def peer(conn: Connection) -> int:
    """The process at the other end of a Unix socket."""
    with socket.socket(fileno=os.dup(conn.fileno())) as one:
        return int(struct.unpack("3i", one.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))[0])
