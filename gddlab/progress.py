"""What is told at a terminal: lines, and progress bars, which are silent elsewhere."""

from __future__ import annotations

import sys
from typing import Any


def interactive() -> bool:
    """True at a terminal; False in pipes, logs and notebooks under test, so that outputs stay comparable."""
    return sys.stderr.isatty()


def progress_bar(*, desc: str, unit: str, total: int | None = None, enabled: bool = True) -> Any:
    """A tqdm bar on stderr, disabled where stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(total=total, desc=desc, unit=unit, disable=not (enabled and interactive()), leave=False)


def duration(seconds: float) -> str:
    """A time in readable units, two or three digits."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 72 * 3600 else f"{seconds / 86400:,.1f} days"


def say(text: object) -> None:
    """Prints at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
