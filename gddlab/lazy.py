"""Names of a package that are imported when they are first used, since torch, pandas and seaborn cost seconds.

The package's __init__.pyi says where they are; type checkers and editors read it too.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any


def homes_of(init: str) -> dict[str, str]:
    """The module of each name, from the imports in the stub beside a package's __init__.py."""
    imports = ast.parse(Path(init).with_suffix(".pyi").read_text()).body
    return {name.name: str(i.module) for i in imports if isinstance(i, ast.ImportFrom) for name in i.names}


def imported(package: str, name: str, homes: dict[str, str]) -> Any:
    """What the package's name stands for.

    Raises:
        AttributeError: It has no such name.
    """
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    home = importlib.import_module(homes[name])
    return vars(home)[name] if name in vars(home) else importlib.import_module(f"{home.__name__}.{name}")
