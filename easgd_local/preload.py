"""What the fork server imports once, so that p workers do not import it p times. Imported nowhere else.

The fork server must outlive a signal that reaches the whole process group, also while it imports: the launcher stops
the run in order, and the workers, which die with the fork server, would be gone before they could save anything.
Children answer signals as `child.enter` says, and end without what is registered here for the end.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGHUP, signal.SIG_IGN)

import atexit  # noqa: E402

from easgd_local import fork_server  # noqa: E402

atexit.register(fork_server.clear_away)

import numpy  # noqa: E402, F401
import safetensors.numpy  # noqa: E402, F401
import torch  # noqa: E402, F401

import easgd_local.evaluate  # noqa: E402
import easgd_local.worker  # noqa: E402, F401
