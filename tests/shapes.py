"""The type checker of jaxtyping's import hook in tests: it checks annotations of arrays, and no others.

Many tests give other arguments of wrong types, to see them refused. `tests/test_shapes.py` installs the hook.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from beartype import BeartypeConf, beartype

F = TypeVar("F", bound=Callable[..., Any])

ARRAYS = ("Float[", "UInt8[", "Int[", "Bool[", "Shaped[")


def check(function: F) -> F:
    """Checks the annotations of arrays in a call of `function`."""
    hints = getattr(function, "__annotations__", {})
    kept = {name: hint for name, hint in hints.items() if any(kind in str(hint) for kind in ARRAYS)}
    if not kept:
        return function
    function.__annotations__ = kept
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)
