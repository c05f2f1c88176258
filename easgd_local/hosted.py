"""One process of `launch`: runs the user's function with its worker."""

from __future__ import annotations

import functools
import multiprocessing.spawn
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from easgd_local.child import Refusal
from easgd_local.devices import take_seat
from easgd_local.graphics import Graphics
from easgd_local.loop import LoopWorker
from easgd_local.plan import Stopped
from easgd_local.randomness import seed_all, seed_of
from easgd_local.turns import Aborted

MAIN = ("init_main_from_name", "init_main_from_path")


@dataclass(frozen=True)
class Job:
    """A function and its arguments, pickled, and how to find the script that they come from."""

    name: str
    label: str  # of the run's folder: the script or module that it comes from
    pickled: bytes
    main: dict[str, str]
    environment: dict[str, str]  # as it is now: the fork server may be older
    start_method: str | None  # of processes that the function starts, such as a DataLoader's

    def load(self) -> tuple[Callable[..., object], tuple[Any, ...]]:
        """The function and its arguments in this process; imports the script that they come from."""
        try:
            multiprocessing.spawn.prepare(self.main)
            fn, args = pickle.loads(self.pickled)
        except AttributeError as error:
            raise Refusal(
                f"fn={self.name}: not found when a worker imports its module ({error}); define it at the top level of "
                f'the module, outside of `if __name__ == "__main__":`.'
            ) from error
        return fn, args


def job_of(fn: Callable[..., object], args: tuple[Any, ...]) -> Job:
    """`ValueError` for a function that new processes cannot import."""
    if not callable(fn):
        raise ValueError(f"fn={fn!r}: must be a function of one worker; launch(train, workers=4).")
    whole = fn
    while isinstance(fn, functools.partial):
        fn = fn.func
    name = getattr(fn, "__qualname__", type(fn).__name__)
    if not isinstance(args, tuple):
        raise ValueError(f"args={args!r}: must be a tuple, handed to the function after the worker; write args=(x,).")
    if "<lambda>" in name or "<locals>" in name:
        raise ValueError(
            f"fn={name}: new processes import the function by its name, so it cannot be a lambda or lie inside another "
            f"function; define it at the top level of a module."
        )
    try:
        pickled = pickle.dumps((whole, args))
    except Exception as error:  # what pickling raises depends on what is pickled
        raise ValueError(
            f"fn={name}: it or its args cannot be handed to new processes ({type(error).__name__}: {error}); give "
            f"names, paths and numbers, and build data and model in the function."
        ) from error
    found = multiprocessing.spawn.get_preparation_data("easgd")
    main = {key: found[key] for key in MAIN if key in found} if b"__main__" in pickled else {}
    path = main.get("init_main_from_path")
    if b"__main__" in pickled and (not main or (path and not os.path.isfile(path))):
        raise ValueError(
            f"fn={name}: defined in a notebook or an interactive session, which new processes cannot import; write it "
            f"to a file (in a notebook with %%writefile), and import it from there."
        )
    module = fn.__module__ if isinstance(getattr(fn, "__module__", None), str) else ""
    label = Path(path).stem if path and module == "__main__" else module.rpartition(".")[2]
    return Job(name, label, pickled, main, dict(os.environ), multiprocessing.get_start_method(allow_none=True))


def main(
    conn: Connection, fds: list[int], rank: int, workers: int, job: Job, seed: int, threads: int,
    graphics: Graphics | None,
) -> None:  # fmt: skip
    """The process: the user's function from its first line to its return, then waiting for the others."""
    os.environ.update(job.environment | environment(rank, workers))
    multiprocessing.set_start_method(job.start_method, force=True)
    torch.set_num_threads(threads)
    seed_all(seed_of(seed, rank))
    fn, args = job.load()
    worker, drained = LoopWorker(rank, workers, conn, seed, take_seat(graphics, rank)), False
    try:
        fn(worker, *args)
        sys.stdout.flush()
        worker.finish()
        drained = True
    except Stopped:
        worker.drain()
        drained = True
        conn.send(("stopped",))
    except Aborted:
        pass
    except Exception:
        worker.finish_exchange()
        raise
    finally:
        worker.close(drained=drained)


def environment(rank: int, workers: int) -> dict[str, str]:
    """What torchrun tells its processes, for loggers and scripts that ask for it."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers), "LOCAL_WORLD_SIZE": str(workers),
        "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1",
    }  # fmt: skip
