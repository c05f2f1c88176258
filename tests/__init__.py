"""The tests. Where they share the cores with others, OpenMP's threads must sleep while they wait: see below."""

import os

# A thread that spins at a barrier keeps the one it waits for off the core: an evaluation of 0.3 s then takes 15 s.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported, here and in all processes started here
