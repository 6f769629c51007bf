"""What the figures read from a probe: one statistic as a table, where its layers are, and the words about both."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gddlab.errors import GddlabError, unknown
from gddlab.theme import GREY, RESOLUTIONS

if TYPE_CHECKING:
    import pandas as pd

    from gddlab.probing.result import ProbeResult

STAGES = {"enc": "encoder", "mid": "middle", "dec": "decoder"}


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


def place_name(stage: str, resolution: int | None) -> str:
    """ "encoder 16", or as much of it as is known."""
    return " ".join(filter(None, [STAGES.get(stage, stage), "" if resolution is None else str(resolution)]))


def rows_of(frame: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """What is known of layers, indexed by their names.

    Returns:
        stage, resolution, depth, n_params; place ("encoder 16", "" where unknown); colour, by the rank of the
        resolution in the whole frame, the largest first.
    """
    where = frame.drop_duplicates("layer").set_index("layer")
    ranked = sorted({int(r) for r in where["resolution"].dropna() if r > 0}, reverse=True)
    where = where.loc[list(names), ["stage", "resolution", "depth", "n_params"]]
    known = [int(r) if r > 0 else None for r in where["resolution"].fillna(0)]
    return where.assign(
        place=[place_name(str(s), r) for s, r in zip(where["stage"], known, strict=True)],
        colour=[GREY if r is None else RESOLUTIONS[min(ranked.index(r), len(RESOLUTIONS) - 1)] for r in known],
    )


def neighbours(labels: Iterable[str]) -> list[tuple[str, int, int]]:
    """Label, start and stop of each stretch of equal labels."""
    out, start = [], 0
    for label, same in itertools.groupby(labels):
        stop = start + sum(1 for _ in same)
        out.append((label, start, stop))
        start = stop
    return out


def x_of(rows: pd.DataFrame) -> tuple[np.ndarray, str]:
    """Positions of layers on an axis, and its label: their depth, or their order where some share a depth."""
    depth = rows["depth"].to_numpy(dtype=float)
    if (np.diff(depth) > 0).all():
        return depth, "depth: number of convolutions before the layer"
    return np.arange(len(rows), dtype=float), "layer, in the order of the network"


def pick(known: Iterable[str], wanted: str | Iterable[str] | None) -> list[str]:
    """The layers that match names or globs, in the order of `known`; all for None.

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
        raise GddlabError("layers is an empty list: give names or globs, or omit it for all")
    return [n for n in known if n in chosen]


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the whole path components that all of them begin with."""
    parts = [n.split(".")[:-1] for n in names]
    shared = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    prefix = sum(len(column[0]) + 1 for column in shared)
    return [n[prefix:] for n in names]


def about(result: ProbeResult, stat: str) -> str:
    """What was probed: "digits, noised, n = 256"; n is that of this statistic, since joined results differ."""
    meta = result.meta
    known = [meta["data"]["name"]] if meta.get("data") else []
    images = result.frame.loc[result.frame["stat"] == stat, "n_images"]
    return ", ".join([*known, meta["states"], f"n = {int(images.max()) if len(images) else meta['n_images']}"])


def stat_label(frame: pd.DataFrame, stat: str, note: str = "") -> str:
    """The statistic with its unit and a note about the scale in brackets."""
    unit = str(frame.loc[frame["stat"] == stat, "unit"].iloc[0])
    inside = ", ".join(filter(None, ["" if unit in (stat, "1") else unit, note]))
    return f"{stat} ({inside})" if inside else stat


def titled(text: str, values: np.ndarray) -> str:
    """A title that says how many of the layers, (layers, ...), lack a value somewhere."""
    missing = int((~np.isfinite(values)).reshape(len(values), -1).any(axis=1).sum())
    return f"{text}; {missing} of {len(values)} layers without a value" if missing else text
