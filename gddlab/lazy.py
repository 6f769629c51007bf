"""Names of a package that are imported when they are first used, since torch, pandas and seaborn cost seconds.

The package's __init__.pyi says where they are; type checkers and editors read it too.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazy(package: str, init: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package.

    Args:
        package: Its `__name__`.
        init: Its `__file__`; the stub beside it imports every name from the module where it is.
    """
    imports = ast.parse(Path(init).with_suffix(".pyi").read_text()).body
    homes = {name.name: str(i.module) for i in imports if isinstance(i, ast.ImportFrom) for name in i.names}
    own = vars(sys.modules[package])

    def imported(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = importlib.import_module(homes[name])
        own[name] = vars(home)[name] if name in vars(home) else importlib.import_module(f"{home.__name__}.{name}")
        return own[name]

    return imported, lambda: sorted({*own, *homes}), sorted(homes)
