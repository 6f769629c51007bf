"""Progress that is seen at a terminal or in a notebook, and silent elsewhere."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["interactive", "progress_bar"]


def interactive() -> bool:
    """True at a terminal; False in pipes, logs and notebooks under test, so that outputs stay comparable."""
    return sys.stderr.isatty()


def progress_bar(*, total: int, desc: str, unit: str, enabled: bool = True) -> Any:
    """A tqdm bar on stderr, disabled when nobody watches."""
    from tqdm import tqdm

    return tqdm(total=total, desc=desc, unit=unit, disable=not (enabled and interactive()), leave=False)
