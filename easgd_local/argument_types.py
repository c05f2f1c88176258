"""Numbers on the command line; what is none is told in one sentence."""

from __future__ import annotations

import argparse


def whole(text: str) -> int:
    """The whole number that a flag's text says."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number; write it in digits, such as 8.") from None


def number(text: str) -> float:
    """The number that a flag's text says."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; write it like 0.05 or 5e-2.") from None
