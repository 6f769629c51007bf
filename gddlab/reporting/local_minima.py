"""Do networks sit in different local minima? Distances to the data beside distances to the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gddlab.errors import GddlabError, unknown
from gddlab.reporting.style import SORTS, WIDE, checked, known, look

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["between", "draw_between", "draw_minima", "frechet_name", "minima_table"]

STUDY = "local-minima"
COLUMNS = ("a", "b", "distance", "value", "sem", "n", "unit")
OTHER = ", other noise"
IMAGES = ("pixel", "feature")
"""Distances image by image; the third one of a study is between sets of images."""
PANELS = {
    "data": "{metric}\nto the data",
    "teacher": "{metric}\nto the teacher",
    "pixel": "RMS of pixels\nto the teacher,\nsame noise",
    "feature": "features\nto the teacher,\nsame noise",
}


def between(study: pd.DataFrame, distance: str | None = None) -> pd.DataFrame:
    """One distance between all pairs of networks.

    Args:
        study: Columns a, b, distance, value, sem, n, unit.
        distance: "pixel" or "feature"; None takes the Frechet distance.

    Returns:
        Square and symmetric, the data first, then the teachers and the others as they come; NaN where a pair was not measured, and on the diagonal.

    Raises:
        GddlabError: The table is another one, or has no such distance.
    """
    import pandas as pd

    study = checked(study, COLUMNS, STUDY)
    distance = distance or frechet_name(study)
    if distance not in set(study["distance"]):
        raise unknown("distance", distance, study["distance"])
    part = study[study["distance"] == distance]
    names = _networks(part)
    out = pd.DataFrame(np.nan, index=names, columns=names)
    for a, b, value in zip(part["a"], part["b"], part["value"], strict=True):
        if a != b and b in names:
            out.loc[a, b] = out.loc[b, a] = value
    return out


def frechet_name(study: pd.DataFrame) -> str:
    """What the study's Frechet distance is called, such as "fd-lite2".

    Raises:
        GddlabError: The table is another one.
    """
    found = [d for d in dict.fromkeys(checked(study, COLUMNS, STUDY)["distance"]) if d not in IMAGES]
    if len(found) != 1:
        raise GddlabError(f"{len(found)} distances beside pixel and feature: give the table of the study {STUDY!r}")
    return str(found[0])


def minima_table(study: pd.DataFrame) -> pd.DataFrame:
    """A row a network: how far from the data, and how far from the teacher with its full number of steps.

    Args:
        study: Columns a, b, distance, value, sem, n, unit.

    Returns:
        Indexed by network, in sorts (teacher, GAN loss, instance loss, both) and in the order of the study: sort; data and teacher (Frechet distances to the
        data and to the teacher); pixel and feature (to the teacher's image of the same noise), pixel_share and feature_share (of what the
        teacher's own images of different noise are apart: 0 is the same image, 1 an unrelated one); pixel_sem and feature_sem, over images.

    Raises:
        GddlabError: The table is another one.
    """
    import pandas as pd

    study = checked(study, COLUMNS, STUDY)
    teacher, metric = _teacher(study), frechet_name(study)
    names = [n for n in _networks(study) if n != "data"]
    names.sort(key=lambda n: list(SORTS).index(look(n).sort))  # stable: the order of the study within a sort
    columns: dict[str, Any] = {"sort": [look(n).sort for n in names]}
    columns["data"] = [_value(study, n, "data", metric)[0] for n in names]
    columns["teacher"] = [_value(study, n, teacher, metric)[0] for n in names]
    for distance in IMAGES:
        yardstick = _value(study, teacher, teacher + OTHER, distance)[0]
        found = [_value(study, n, teacher, distance) for n in names]
        columns[distance] = [v for v, _ in found]
        columns[f"{distance}_share"] = [v / yardstick for v, _ in found]
        columns[f"{distance}_sem"] = [e for _, e in found]
    return pd.DataFrame(columns, index=pd.Index(names, name="network"))


def draw_minima(study: pd.DataFrame, networks: Sequence[str] | None = None, *, width: float = 6.4) -> Figure:
    """A row a network, a dot a distance: to the data, and to the teacher in distribution, in pixels and in features.

    Frechet distances are on a log scale. The dashed lines are the teacher's own distance to the data, and what its images of other noise are apart: a
    network whose dot lies there shares no image with it.

    Args:
        study: Columns a, b, distance, value, sem, n, unit.
        networks: Which to show; all if None.
        width: Of the figure, inches; below 4.8 the four pictures stand in two rows.

    Raises:
        GddlabError: The table is another one, or a network is not in it.
    """
    import matplotlib.pyplot as plt

    study = checked(study, COLUMNS, STUDY)
    table, teacher, metric = minima_table(study), _teacher(study), frechet_name(study)
    names = known(list(table.index), networks)
    table = table.loc[names]
    lines = {"data": (_value(study, teacher, "data", metric)[0], "teacher")}
    for distance in IMAGES:
        lines[distance] = (_value(study, teacher, teacher + OTHER, distance)[0], "other noise")
    down = 1 if width >= WIDE else 2
    size = (width, down * (max(0.19 * len(names), 0.6) + 1.0))
    figure, grid = plt.subplots(
        down, len(PANELS) // down, sharey=True, figsize=size, layout="constrained", squeeze=False
    )
    colours = [look(n).of_sort for n in names]
    y = np.arange(len(names))
    for ax, (column, title) in zip(grid.flat, PANELS.items(), strict=True):
        values = table[column].to_numpy(dtype=float)
        ax.grid(axis="y", color="0.92")
        ax.set_axisbelow(True)
        if f"{column}_sem" in table:
            sem = table[f"{column}_sem"].to_numpy(dtype=float)
            ax.errorbar(values, y, xerr=sem, fmt="none", ecolor=colours, elinewidth=1)
        else:
            values = np.where(values > 0, values, np.nan)  # the teacher and itself have no place on a log scale
            ax.set_xscale("log")
        there = np.flatnonzero(np.isfinite(values))  # a dot nowhere, not clipped, would take part in the layout
        if len(there):
            ax.scatter(values[there], y[there], c=[colours[i] for i in there], s=20, zorder=3, clip_on=False)
        if column in lines:
            at, text = lines[column]
            ax.axvline(at, color="0.45", linewidth=0.8, linestyle="--", zorder=1)
            place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            ax.annotate(text, (at, 1), (0, 1), ha="center", fontsize=6, color="0.35", **place)
        shown = np.append(values, lines[column][0] if column in lines else np.nan)
        if ax.get_xscale() == "linear":
            ax.set_xlim(0, 1.06 * np.nanmax(shown))
        elif np.isfinite(shown).any():
            _log(ax.xaxis, shown)
            ax.set_xlim(np.nanmin(shown) / 1.5, np.nanmax(shown) * 1.5)
        ax.set_xlabel(title.format(metric=metric), fontsize=7.5)
        ax.tick_params(axis="x", labelsize=7 if width >= WIDE else 6)
        ax.tick_params(axis="y", length=0, labelsize=7.5)
        ax.spines[["top", "right", "left"]].set_visible(False)
    grid[0, 0].set_yticks(y, [look(n).label for n in names])
    grid[0, 0].set_ylim(len(names) - 0.4, -0.6)
    _legend(figure, [look(n).sort for n in names], width)
    return figure


def draw_between(
    table: pd.DataFrame, *, label: str = "Frechet distance", width: float = 6.4, ax: Axes | None = None
) -> Axes:
    """A distance between all pairs as a heat map on a log scale, with the numbers where cells have room.

    Args:
        table: From `between`.
        label: What the distance is.
        width: Of the figure, inches, where `ax` is None.
        ax: Where to draw; None makes a figure.

    Raises:
        GddlabError: The table is not square, or has no value.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    values = table.to_numpy(dtype=float)
    if list(table.index) != list(table.columns) or not np.isfinite(values).any():
        raise GddlabError(
            f"a table of {values.shape[0]} rows and {values.shape[1]} columns: give one from between(study)"
        )
    if ax is None:
        ax = plt.subplots(figsize=(width, 0.92 * width), layout="constrained")[1]
    colours = plt.get_cmap("cividis_r").with_extremes(bad="0.94")
    low, high = np.nanmin(values), np.nanmax(values)
    norm = LogNorm(low, high if high > low else 2 * low)
    image = ax.imshow(np.ma.masked_invalid(values), norm=norm, cmap=colours)
    names = [look(n).label for n in table.index]
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    ax.set_yticks(range(len(names)), names, fontsize=7)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.6, pad=0.02)
    bar.set_label(f"{label}, log scale", fontsize=7.5)
    _log(bar.ax.yaxis, values)
    bar.ax.tick_params(labelsize=7)
    ax.figure.canvas.figure.draw_without_rendering()
    cell = ax.get_window_extent().width / ax.figure.dpi * 72 / len(names)
    if cell >= 13:  # points: room for four digits of 5.5
        for (i, j), v in np.ndenumerate(values):
            if np.isfinite(v):
                shade = "white" if norm(v) > 0.55 else "black"
                ax.text(
                    j, i, f"{v:.3g}" if v < 100 else f"{v:.0f}", ha="center", va="center", fontsize=5.5, color=shade
                )
    return ax


def _networks(study: pd.DataFrame) -> list[str]:
    """Data in front, then the teachers, the others as they come."""
    import pandas as pd

    names = [n for n in dict.fromkeys(pd.concat([study["a"], study["b"]])) if not n.endswith(OTHER)]
    return sorted(names, key=lambda n: (n != "data", look(n).sort != "teacher"))


def _teacher(study: pd.DataFrame) -> str:
    """The teacher with its full number of steps: the one whose images of other noise are the yardstick."""
    found = [str(b) for b in study["b"] if b.endswith(OTHER)]
    if not found:
        raise GddlabError(f"no distance to a teacher{OTHER}: give the table of the study {STUDY!r}")
    return found[0].removesuffix(OTHER)


def _value(study: pd.DataFrame, a: str, b: str, distance: str) -> tuple[float, float]:
    """Value and standard error of a pair, either way round; 0 for a network and itself, NaN where it was not measured."""
    if a == b:
        return 0.0, 0.0
    either = ((study["a"] == a) & (study["b"] == b)) | ((study["a"] == b) & (study["b"] == a))
    found = study[either & (study["distance"] == distance)]
    return (float(found["value"].iloc[0]), float(found["sem"].iloc[0])) if len(found) else (float("nan"), float("nan"))


def _log(axis: Any, values: np.ndarray) -> None:
    """Ticks of a log scale, plain numbers, as many as a small picture can hold."""
    from matplotlib.ticker import LogLocator, NullLocator

    span = np.nanmax(values) / np.nanmin(values)
    axis.set_major_locator(LogLocator(subs=(1, 3) if span > 10 else (1, 2, 5), numticks=9))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def _legend(figure: Figure, sorts: Sequence[str], width: float) -> None:
    from matplotlib.lines import Line2D

    shown = dict.fromkeys(sorts)
    handles = [Line2D([], [], marker="o", linestyle="", markersize=4.5, color=SORTS[s], label=s) for s in shown]
    columns = len(handles) if width >= WIDE else 2
    figure.legend(
        handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=7, handletextpad=0.1
    )
