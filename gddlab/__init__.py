"""What the layers of a diffusion model do at each noise level, and how that makes it a one-step generator."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def _public_names() -> dict[str, str]:
    """The module of each name, from the imports in __init__.pyi, which type checkers and editors read too."""
    imports = ast.parse(Path(__file__).with_suffix(".pyi").read_text()).body
    return {name.name: str(i.module) for i in imports if isinstance(i, ast.ImportFrom) for name in i.names}


_HOME = _public_names()
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Imported when first used, since torch, pandas and timm cost seconds."""
    if name not in _HOME:
        raise AttributeError(f"module 'gddlab' has no attribute {name!r}")
    home = importlib.import_module(_HOME[name])
    value = vars(home)[name] if name in vars(home) else importlib.import_module(f"{home.__name__}.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
