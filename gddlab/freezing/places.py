"""Where a parameter lies in the network, as its name says."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import TYPE_CHECKING

from gddlab.probing.layers import kind_of, owner_of, place

if TYPE_CHECKING:
    import pandas as pd

    from gddlab.freezing.mask import Parameters

__all__ = ["NOWHERE", "block_of", "numel", "parameter_frame", "shares"]

NOWHERE = "-"
"""Stage or resolution of what has none: embeddings, layers of other naming."""


def numel(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def block_of(layer: str) -> str:
    """The module along depth that a layer belongs to.

    Up to the part of its name with a resolution (EDM), else up to the last number (diffusers, `nn.Sequential`), else itself.
    """
    if found := re.match(r"(.*?\d+x\d+_[^.]+)(?:\.|$)", layer):
        return found[1]
    found = re.match(r"(.*\.\d+)\.[^.]+", layer)
    return found[1] if found else layer


def parameter_frame(parameters: Parameters, frozen: Collection[str]) -> pd.DataFrame:
    """A row a parameter: columns parameter, block, stage, resolution (pixels), kind, size (numbers), frozen."""
    import pandas as pd

    frozen = set(frozen)
    rows = []
    for name, shape in parameters:
        layer = owner_of(name)
        stage, resolution = place(layer)
        rows.append((name, block_of(layer), stage or NOWHERE, resolution, kind_of(layer), numel(shape), name in frozen))
    columns = ["parameter", "block", "stage", "resolution", "kind", "size", "frozen"]
    return pd.DataFrame(rows, columns=columns).astype({"resolution": "Int64"})


def shares(frame: pd.DataFrame, by: str | list[str]) -> pd.Series:
    """Frozen share of the numbers in each group of a `parameter_frame`, in the order of the network."""
    sizes = frame.assign(still=frame["size"].where(frame["frozen"], 0)).groupby(by, sort=False, dropna=False)
    table = sizes[["size", "still"]].sum()
    return table["still"] / table["size"]
