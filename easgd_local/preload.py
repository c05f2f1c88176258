"""What the fork server imports once, so that p workers do not import it p times. Imported nowhere else.

The fork server must outlive a SIGTERM that reaches the whole process group: the launcher stops the run in order, and
the workers, which die with the fork server, would be gone before they could save anything. Children reset the signal.
"""

import signal

import numpy  # noqa: F401
import safetensors.numpy  # noqa: F401
import torch  # noqa: F401

import easgd_local.evaluate
import easgd_local.worker  # noqa: F401

signal.signal(signal.SIGTERM, signal.SIG_IGN)
