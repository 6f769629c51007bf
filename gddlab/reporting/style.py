"""How the networks of a study are called and coloured, the same in every figure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gddlab.errors import GddlabError, unknown

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["WIDE", "Look", "checked", "known", "look", "name_lines", "spread_out"]

WIDE = 4.8
"""Inches; narrower figures are laid out for the column of a page."""
BLACK, GREY = "#000000", "#7F7F7F"
SORTS = {
    "data": BLACK,
    "teacher": GREY,
    "GAN loss": "#0072B2",
    "instance loss": "#D55E00",
    "GAN and instance loss": "#009E73",
    "other": "#CC79A7",
}
"""Sort of network -> colour (Okabe and Ito's)."""
NAMES = {
    "data": ("data", "data", BLACK),
    "gdd": ("GDD", "GAN loss", "#0072B2"),
    "gdd-i": ("GDD-I", "GAN loss", "#E69F00"),
    "scratch": ("GDD, random start", "GAN loss", "#CC79A7"),
    "pd": ("PD", "instance loss", "#D55E00"),
    "cd": ("CD", "instance loss", "#D55E00"),
    "ctm": ("CTM", "instance loss", "#D55E00"),
    "rcd": ("RCD", "instance loss", "#D55E00"),
    "gdd-cd": ("GDD + CD", "GAN and instance loss", "#009E73"),
}


@dataclass(frozen=True)
class Look:
    """A network in figures: its label, its sort (a key of `SORTS`), and a colour of its own."""

    label: str
    sort: str
    colour: str

    @property
    def of_sort(self) -> str:
        """The colour of its sort."""
        return SORTS[self.sort]


def look(name: str) -> Look:
    """How a network is shown: "teacher-18" as "teacher, 18 steps", "gdd-i" as "GDD-I"; an unknown name stands for itself."""
    if name in NAMES:
        return Look(*NAMES[name])
    if steps := re.fullmatch(r"teacher-(\d+)(.*)", name):
        count = int(steps[1])
        shade = "0.65" if count < 18 else "0.25"
        return Look(f"teacher, {count} step{'s' if count > 1 else ''}{steps[2]}", "teacher", shade)
    if name == "teacher":
        return Look("teacher", "teacher", "0.25")
    return Look(name, "other", SORTS["other"])


def checked(frame: pd.DataFrame, columns: Iterable[str], study: str) -> pd.DataFrame:
    """The table of a study, with text in place of categories.

    Raises:
        GddlabError: A column is missing, or there are no rows.
    """
    if missing := [c for c in columns if c not in frame]:
        have = ", ".join(map(str, frame.columns)) or "none"
        raise GddlabError(f"no column {missing[0]!r}, but {have}: give the table of the study {study!r}")
    if not len(frame):
        raise GddlabError(f"the table has no rows: give the table of the study {study!r}")
    return frame.astype({c: object for c in frame if frame[c].dtype == "category"})


def known(names: Sequence[str], wanted: Sequence[str] | None, what: str = "network") -> list[str]:
    """`wanted`, all of which must be among `names`; `names` for None.

    Raises:
        GddlabError: One is not.
    """
    if isinstance(wanted, str):
        raise GddlabError(f"{what}s {wanted!r}: give a list of names")
    for name in wanted or ():
        if name not in names:
            raise unknown(what, name, names)
    return list(names if wanted is None else wanted)


def name_lines(ax: Axes, lines: Sequence[tuple[float, str, Any]], *, size: float = 7) -> None:
    """Names of lines at their right ends, moved apart where they would overlap; in a narrow figure in a legend below it.

    Args:
        ax: Axes with their final limits and scale.
        lines: y in data at the right end, name, colour of each.
        size: Of the text, points.
    """
    figure = ax.figure.canvas.figure
    if figure.get_size_inches()[0] < WIDE:
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], color=colour, label=name) for _, name, colour in lines]
        style: dict[str, Any] = {"frameon": False, "fontsize": size, "handlelength": 1.2}
        figure.legend(handles=handles, loc="outside lower center", ncols=2, **style)
        return
    figure.draw_without_rendering()  # the layout says how high the axes are
    height = ax.get_window_extent().height / ax.figure.dpi * 72
    ends = ax.transData.transform([(1.0, y) for y, *_ in lines])
    at = spread_out(ax.transAxes.inverted().transform(ends)[:, 1], 1.15 * size / height)
    for y, (_, name, colour) in zip(at, lines, strict=True):
        place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
        ax.annotate(name, (1, y), (4, 0), va="center", fontsize=size, color=colour, **place)


def spread_out(places: Sequence[float] | np.ndarray, gap: float) -> np.ndarray:
    """Places at least `gap` apart, in the same order, as near to the given ones as least squares has it.

    Pool-adjacent-violators: neighbours that would be nearer share the mean of where they want to be.
    """
    order = np.argsort(places, kind="stable")
    groups: list[list[float]] = []  # sum of wanted starts, how many
    for rank, i in enumerate(order):
        groups.append([float(places[i]) - rank * gap, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, count = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += count
    starts = np.concatenate([np.full(int(count), total / count) for total, count in groups])
    out = np.empty(len(order))
    out[order] = starts + np.arange(len(order)) * gap
    return out
