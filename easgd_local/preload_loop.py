"""What the fork server imports besides for `launch`: the first torch optimizer of a process imports it. Imported
nowhere else."""

import torch._dynamo  # noqa: F401

import easgd_local.hosted  # noqa: F401
