"""What the fork server imports once, so that p workers do not import it p times. Imported nowhere else.

The fork server must outlive a signal that reaches the whole process group, also while it imports: the launcher stops
the run in order, and the workers, which die with the fork server, would be gone before they could save anything.
Children answer signals as `child.enter` says, and end without what is registered here for the end.
"""

import atexit
import signal

from easgd_local import child, fork_server

for number in child.SIGNALS:
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, child.SIGNALS)  # which `fork_server.starting` has blocked
atexit.register(fork_server.clear_away)

import numpy  # noqa: E402, F401
import safetensors.numpy  # noqa: E402, F401
import torch  # noqa: E402, F401

import easgd_local.evaluate  # noqa: E402
import easgd_local.worker  # noqa: E402, F401
