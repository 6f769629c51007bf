"""What the layers of a diffusion model do at each noise level, and how that makes it a one-step generator."""

from __future__ import annotations

from gddlab.lazy import lazy

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
