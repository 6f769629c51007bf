"""What the pictures read from a probe: one statistic as a table, what is known of its layers, and the words about them."""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from gddlab.errors import GddlabError, unknown

if TYPE_CHECKING:
    import pandas as pd

    from gddlab.probing.result import ProbeResult

__all__ = [
    "Group",
    "Rows",
    "about",
    "levels",
    "nearest",
    "pick",
    "rows_of",
    "short_names",
    "stat_label",
    "titled",
    "wide",
]

STAGES = {"enc": "encoder", "mid": "middle", "dec": "decoder"}


@dataclass(frozen=True)
class Group:
    """Neighbours of one stage and resolution: layers `start` to `stop` - 1."""

    stage: str
    resolution: int | None
    start: int
    stop: int

    @property
    def label(self) -> str:
        known = [STAGES.get(self.stage, self.stage), "" if self.resolution is None else str(self.resolution)]
        return " ".join(filter(None, known))


@dataclass(frozen=True)
class Rows:
    """Layers in the order of the network.

    Attributes:
        stages: "enc", "mid", "dec" or "".
        resolutions: Pixels; None where unknown.
        ranks: Position of each layer's resolution among those of the whole probe, the largest first.
    """

    names: list[str]
    stages: list[str]
    resolutions: list[int | None]
    depths: list[int]
    n_params: list[int]
    ranks: list[int | None]

    def __len__(self) -> int:
        return len(self.names)

    def groups(self, *, by_stage: bool = False) -> list[Group]:
        """Neighbours that share stage and resolution, or stage alone."""
        keys = [(s, None if by_stage else r) for s, r in zip(self.stages, self.resolutions, strict=True)]
        out, start = [], 0
        for (stage, resolution), same in itertools.groupby(keys):
            stop = start + len(list(same))
            out.append(Group(stage, resolution, start, stop))
            start = stop
        return out

    def positions(self) -> tuple[np.ndarray, str]:
        """Where the layers stand on an axis, and its label: depth, or their order where some share a depth."""
        if all(a < b for a, b in itertools.pairwise(self.depths)):
            return np.array(self.depths, dtype=float), "depth: number of convolutions before the layer"
        return np.arange(len(self), dtype=float), "layer, in the order of the network"


def wide(frame: pd.DataFrame, stat: str, values: str = "value", across: str = "sigma") -> pd.DataFrame:
    """One statistic: layers in the order of the network down, `across` ascending.

    Raises:
        GddlabError: `stat` is not in the frame.
    """
    part = frame[frame["stat"] == stat]
    if part.empty:
        raise unknown("statistic", stat, frame["stat"])
    table = part.pivot(index="layer", columns=across, values=values)
    return table.loc[list(dict.fromkeys(part["layer"]))].sort_index(axis=1).astype(float)


def levels(table: pd.DataFrame) -> list[float]:
    """The columns of `wide`, as numbers."""
    return [float(c) for c in table.columns]


def rows_of(frame: pd.DataFrame, names: Iterable[str]) -> Rows:
    names = list(names)
    where = frame.drop_duplicates("layer").set_index("layer")
    ordered = sorted({int(r) for r in where["resolution"].dropna()}, reverse=True)
    where = where.loc[names]
    resolutions = [int(r) if r > 0 else None for r in where["resolution"].fillna(0)]
    return Rows(
        names,
        [str(s) for s in where["stage"]],
        resolutions,
        [int(d) for d in where["depth"]],
        [int(n) for n in where["n_params"]],
        [None if r is None else ordered.index(r) for r in resolutions],
    )


def pick(known: Iterable[str], wanted: str | Iterable[str] | None) -> list[str]:
    """The layers that names or globs name, in the order of `known`; all for None.

    Raises:
        GddlabError: One of `wanted` matches nothing.
    """
    known = list(known)
    if wanted is None:
        return known
    chosen: set[str] = set()
    for item in [wanted] if isinstance(wanted, str) else wanted:
        found = {n for n in known if n == item or fnmatch.fnmatchcase(n, item)}
        if not found:
            raise unknown("layer", item, known)
        chosen |= found
    if not chosen:
        raise GddlabError("layers is an empty list: give names or globs, or leave it away for all")
    return [n for n in known if n in chosen]


def nearest(sigmas: Sequence[float], at: float) -> float:
    """The measured noise level next to `at` on a log scale.

    Raises:
        GddlabError: `at` is no noise level.
    """
    if isinstance(at, bool) or not isinstance(at, Real) or not (math.isfinite(at) and at > 0):
        raise GddlabError(f"at={at!r}: give a noise level above 0, such as 80")
    return min(sigmas, key=lambda s: abs(math.log(s / at)))


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the whole path components that all of them begin with."""
    parts = [n.split(".")[:-1] for n in names]
    shared = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    prefix = sum(len(column[0]) + 1 for column in shared)
    return [n[prefix:] for n in names]


def about(result: ProbeResult, stat: str) -> str:
    """What was probed: "digits, noised, n = 256", with the images that this statistic saw: joined results differ in that."""
    meta: dict[str, Any] = result.meta
    known = [meta["data"]["name"]] if meta.get("data") else []
    images = result.frame.loc[result.frame["stat"] == stat, "n_images"]
    return ", ".join([*known, meta["states"], f"n = {int(images.max()) if len(images) else meta['n_images']}"])


def stat_label(frame: pd.DataFrame, stat: str, note: str = "") -> str:
    """The statistic with its unit and a note about the scale in brackets."""
    unit = str(frame.loc[frame["stat"] == stat, "unit"].iloc[0])
    inside = ", ".join(filter(None, ["" if unit in (stat, "1") else unit, note]))
    return f"{stat} ({inside})" if inside else stat


def titled(text: str, values: np.ndarray) -> str:
    """A title that says how many of the layers, (layers, ...), have no value somewhere."""
    missing = int((~np.isfinite(values)).reshape(len(values), -1).any(axis=1).sum())
    return f"{text}; {missing} of {len(values)} layers without a value" if missing else text
