"""Tables and figures of runs and studies, and pages of runs; all that a notebook draws with, in one namespace.

Where a figure takes `ax`, it is drawn there; None makes a figure.
"""

from __future__ import annotations

from typing import Any

from gddlab.lazy import homes_of, imported

_HOME = homes_of(__file__)
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    value = globals()[name] = imported(__name__, name, _HOME)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
