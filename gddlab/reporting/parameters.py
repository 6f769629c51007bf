"""The parameter of the notebooks: where their runs lie."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gddlab.errors import GddlabError, NotFound, unknown
from gddlab.files import data_dir

__all__ = ["runs_folder"]

ACCEPTED = ("runs",)


def runs_folder(names: Mapping[str, Any]) -> Path:
    """The folder of `gddlab reproduce --out` that a notebook reads: its parameter `runs`, or the shipped runs where that is empty.

    papermill writes the parameters it was given into a cell of its own and only warns where the notebook has no such parameter; here that is refused.

    Args:
        names: The notebook's `globals()`.

    Returns:
        A folder that holds a folder for each list of experiments, such as "digits".

    Raises:
        GddlabError: A parameter has another name, or `runs` is the folder of one list.
        NotFound: There is no such folder.
    """
    for name in _injected(names):
        if name not in ACCEPTED:
            raise unknown("parameter", name, ACCEPTED)
    given = names.get("runs") or ""
    folder = Path(given) if given else data_dir() / "runs"
    if not folder.is_dir():
        raise NotFound(
            f"runs={str(given)!r}: no such folder; give the --out of gddlab reproduce, or '' for the shipped runs"
        )
    if any(folder.glob("*/seed-*/config.json")) and not any(folder.glob("*/*/seed-*/config.json")):
        raise GddlabError(f"runs={str(given)!r} is the folder of one list: give {str(folder.parent)!r}, which holds it")
    return folder


def _injected(names: Mapping[str, Any]) -> Iterator[str]:
    """Names assigned in papermill's cell, which begins with its comment; `In` holds the cells that IPython has run."""
    for source in names.get("In", ()):
        if source.startswith("# Parameters\n"):
            for statement in ast.parse(source).body:
                if isinstance(statement, ast.Assign):
                    yield from (t.id for t in statement.targets if isinstance(t, ast.Name))
