"""Whose the fork server is: threads of a process may start it together; a parent's folder is left to the parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import util

import pytest

from easgd_local import child, fork_server

pytestmark = pytest.mark.usefixtures("alone")


def test_threads_that_start_at_the_same_time_do_not_disturb_each_other():
    errors: list[BaseException] = []

    def start() -> None:
        try:
            for _ in range(100):
                fork_server.warm_up()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert fork_server.OWNER not in os.environ


def test_meanwhile_no_signal_comes_through_and_the_script_is_hidden():
    main = sys.modules["__main__"]
    with fork_server.starting():
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= set(child.SIGNALS)
        assert sys.modules["__main__"] is not main
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(child.SIGNALS)
    assert sys.modules["__main__"] is main


def leave_with_zero_if_no_folder_is_claimed() -> None:
    with fork_server.starting():
        sys.exit(int(fork_server.OWNER in os.environ))


def test_the_folder_that_a_process_has_from_its_parent_is_left_to_the_parent():
    util.get_temp_dir()
    process = multiprocessing.get_context("spawn").Process(target=leave_with_zero_if_no_folder_is_claimed)
    process.start()
    process.join(30)
    assert process.exitcode == 0
