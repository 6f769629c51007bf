"""What the layers of a diffusion model do at each noise level, and how that makes it a one-step generator."""

from __future__ import annotations

from typing import Any

from gddlab.lazy import homes_of, imported

__version__ = "0.1.0"

_HOME = homes_of(__file__)
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    value = globals()[name] = imported(__name__, name, _HOME)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
