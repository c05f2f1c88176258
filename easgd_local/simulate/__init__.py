"""p workers that no machine has, in one process on a virtual clock: the rules themselves, run by greenlets."""
