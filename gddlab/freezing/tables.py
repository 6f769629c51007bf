"""A network's parameters as tables: by layer, block, stage and resolution, and which of them are frozen."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from html import escape
from math import prod
from typing import TYPE_CHECKING

from gddlab.files import hash_json
from gddlab.probing.layers import kind_of, owner_of, stage_and_resolution

if TYPE_CHECKING:
    import pandas as pd

Parameters = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes of a network's parameters, in its order, without `map_augment`."""

NOWHERE = "-"
"""Stage or resolution of what has none: embeddings, layers whose names do not say."""

numel = prod
"""Numbers in a parameter of a shape."""


def fingerprint(parameters: Parameters) -> str:
    """sha256 over sorted names and shapes: teacher and student of one architecture have the same."""
    return hash_json(sorted([name, list(shape)] for name, shape in parameters))


def block_of(layer: str) -> str:
    """The module along depth that a layer belongs to.

    Up to the part of its name with a resolution (EDM), else up to the last number (diffusers, `nn.Sequential`), else
    itself.
    """
    found = re.match(r"(.*?\d+x\d+_[^.]+)(?:\.|$)", layer) or re.match(r"(.*\.\d+)\.[^.]+", layer)
    return found[1] if found else layer


def parameter_frame(parameters: Parameters, frozen: Collection[str]) -> pd.DataFrame:
    """One row per parameter: columns parameter, block, stage, resolution (pixels), kind, size (numbers), frozen."""
    import pandas as pd

    frozen = set(frozen)
    rows = []
    for name, shape in parameters:
        layer = owner_of(name)
        stage, resolution = stage_and_resolution(layer)
        rows.append((name, block_of(layer), stage or NOWHERE, resolution, kind_of(layer), numel(shape), name in frozen))
    columns = ["parameter", "block", "stage", "resolution", "kind", "size", "frozen"]
    return pd.DataFrame(rows, columns=columns).astype({"resolution": "Int64"})


def shares(frame: pd.DataFrame, by: str | list[str]) -> pd.Series:
    """Frozen share of the numbers in each group of a `parameter_frame`, in the order of the network."""
    sizes = frame.assign(still=frame["size"].where(frame["frozen"], 0)).groupby(by, sort=False, dropna=False)
    table = sizes[["size", "still"]].sum()
    return table["still"] / table["size"]


def html_table(caption: str, rows: Mapping[str, str]) -> str:
    """Two columns; rows without text are omitted."""
    cells = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows.items() if v)
    return f"<table><caption>{escape(caption)}</caption>{cells}</table>"
