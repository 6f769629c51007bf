"""Tables and figures of runs and studies, and pages of runs; all that a notebook draws with, in one namespace.

Where a figure takes `ax`, it is drawn there; None makes a figure.
"""

from __future__ import annotations

from gddlab.lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, __file__)
