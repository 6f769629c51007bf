"""Where commands write what they have to say."""

from __future__ import annotations

import sys

__all__ = ["out"]


def out(text: object) -> None:
    """One line on standard output, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
