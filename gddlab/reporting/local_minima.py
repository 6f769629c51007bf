"""Do networks sit in different local minima? Distances to the data, to the teacher, and on the way between two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from gddlab.errors import GddlabError, unknown
from gddlab.probing.plots.axes import Scale
from gddlab.probing.plots.heatmaps import draw_cells
from gddlab.reporting.style import SORTS, checked, fit_scale, known, look
from gddlab.theme import GREY, SEQUENTIAL, axes_of, themed

STUDY, LINE = "local-minima", "line"
COLUMNS = ("a", "b", "distance", "value", "sem", "n", "unit")
OTHER = ", other noise"
COPIED = "copied"
"""The study "line" has it beside its scores: the distance to the teacher's images of the same noise."""
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
        Square and symmetric, the data first, then the teachers, then the others in the order of the study; NaN where a
        pair was not measured, and on the diagonal.

    Raises:
        GddlabError: The table is another one, or has no such distance.
    """
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
    out.attrs["n"] = int(part["n"].max())
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
    """One row per network: how far from the data, and how far from the teacher with its full number of steps.

    Args:
        study: As for `between`.

    Returns:
        Indexed by network, by sort (teacher, GAN loss, instance loss, both) and in the order of the study: sort; data
        and teacher (Frechet distances to the data and to the teacher); pixel and feature (to the teacher's image of the
        same noise); pixel_share and feature_share (of the distance between the teacher's own images of different noise:
        0 is the same image, 1 an unrelated one); pixel_sem and feature_sem, over images.

    Raises:
        GddlabError: The table is another one.
    """
    study = checked(study, COLUMNS, STUDY)
    teacher, metric = _teacher(study), frechet_name(study)
    names = [n for n in _networks(study) if n != "data"]
    names.sort(key=lambda n: list(SORTS).index(look(n).sort))  # stable: the order of the study within a sort
    columns: dict[str, Any] = {"sort": [look(n).sort for n in names]}
    for column, to in (("data", "data"), ("teacher", teacher)):
        columns[column] = [_value(study, n, to, metric)[0] for n in names]
    for distance in IMAGES:
        yardstick = _value(study, teacher, teacher + OTHER, distance)[0]
        found = [_value(study, n, teacher, distance) for n in names]
        columns[distance] = [v for v, _ in found]
        columns[f"{distance}_share"] = [v / yardstick for v, _ in found]
        columns[f"{distance}_sem"] = [e for _, e in found]
    return pd.DataFrame(columns, index=pd.Index(names, name="network"))


@themed
def draw_minima(study: pd.DataFrame, networks: Sequence[str] | None = None) -> Figure:
    """One row per network, one dot per distance: to the data, and to the teacher in distribution, pixels and features.

    Frechet distances are on a log scale. The dashed lines are the teacher's own distance to the data, and the distance
    between its images of different noise: a network whose dot is there shares no image with it.

    Args:
        study: As for `between`.
        networks: Which to show; all if None.

    Raises:
        GddlabError: The table is another one, or a network is not in it.
    """
    study = checked(study, COLUMNS, STUDY)
    table, teacher, metric = minima_table(study), _teacher(study), frechet_name(study)
    names = known(list(table.index), networks)
    table = table.loc[names].assign(label=[look(n).label for n in names])
    lines = {"data": (_value(study, teacher, "data", metric)[0], "teacher")}
    for distance in IMAGES:
        lines[distance] = (_value(study, teacher, teacher + OTHER, distance)[0], "other noise")
    size = (8, max(0.2 * len(names), 0.6) + 1.3)
    figure, axes = plt.subplots(1, len(PANELS), sharey=True, figsize=size, layout="constrained")
    for ax, (column, title) in zip(axes, PANELS.items(), strict=True):
        log = f"{column}_sem" not in table
        shown = table[table[column] > 0] if log else table  # the teacher's distance to itself is 0
        dots: dict[str, Any] = {"s": 24, "clip_on": False, "zorder": 3, "legend": ax is axes[0], "ax": ax}
        if not log:
            bars: dict[str, Any] = {"fmt": "none", "ecolor": GREY, "elinewidth": 1}
            ax.errorbar(table[column], table["label"], xerr=table[f"{column}_sem"], **bars)
        if len(shown):
            sns.scatterplot(shown, x=column, y="label", hue="sort", palette=SORTS, **dots)
        at, text = lines.get(column, (np.nan, ""))
        if text:
            ax.axvline(at, color=GREY, linewidth=0.8, linestyle="--", zorder=1)
            place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
            ax.annotate(text, (at, 1), fontsize=7, color=GREY, **place)
        if log:
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=9))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_major_formatter("{x:g}")
        else:
            ax.set_xlim(0, 1.06 * np.nanmax([*table[column], at]))
        ax.grid(axis="y", color="0.92")
        ax.set_axisbelow(True)
        ax.set(xlabel=title.format(metric=metric), ylabel="")
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
    axes[0].set_yticks(range(len(names)), table["label"])
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    handles, labels = axes[0].get_legend_handles_labels()
    if own := axes[0].get_legend():
        own.remove()
    about = f"n = {int(study['n'].max())} images; bars: standard error over images"
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), title=about, handletextpad=0.1)
    return figure


@themed
def draw_between(table: pd.DataFrame, *, label: str = "Frechet distance", ax: Axes | None = None) -> Axes:
    """A distance between all pairs as a heat map on a log scale, with the numbers where cells have room.

    Args:
        table: From `between`.
        label: What the distance is.

    Raises:
        GddlabError: The table is not square, or has no value.
    """
    values = table.to_numpy(dtype=float)
    if list(table.index) != list(table.columns) or not np.isfinite(values).any():
        raise GddlabError(f"a table of {len(table)} rows, {len(table.columns)} columns: give one from between(study)")
    ax = axes_of(ax, 6.6, 6.0)
    names = [look(n).label for n in table.index]
    room = ax.get_window_extent().width / ax.figure.dpi * 72 / len(names) >= 14  # points, for four digits of 6
    text = [["" if np.isnan(v) else f"{v:.3g}" if v < 100 else f"{v:.0f}" for v in row] for row in values]
    written: dict[str, Any] = {"annot": np.array(text), "fmt": "", "annot_kws": {"fontsize": 6}} if room else {}
    low, high = np.nanmin(values), np.nanmax(values)
    scale = Scale("log", low, max(high, 2 * low), low, missing=False)
    colours: dict[str, Any] = {"norm": LogNorm(scale.low, scale.high), "cmap": f"{SEQUENTIAL}_r"}
    shown = table.set_axis(names).set_axis(names, axis=1)
    draw_cells(ax, shown, scale, f"{label}, log scale", bar={"shrink": 0.6}, square=True, **colours, **written)
    if "n" in table.attrs:
        ax.set_title(f"n = {table.attrs['n']} images", loc="left")
    return ax


def line_table(study: pd.DataFrame) -> pd.DataFrame:
    """What is met on the straight line between the weights of two networks: a row per pair and score.

    Args:
        study: The study "line".

    Returns:
        pair, metric, length (of the line, Euclidean, in weights), first, second (the score of either network), highest
        (on the line, ends included), at (where: 0 is the first network, 1 the second), and barrier, the highest less
        the larger end: 0 where no point of the line is worse than both of its ends.

    Raises:
        GddlabError: The table is another one.
    """
    rows = []
    for pair, of_pair in _lines(study).sort_values("t", kind="stable").groupby("pair", sort=False):
        for metric, own in of_pair.groupby("metric", sort=False):
            first, second = own["value"].iloc[[0, -1]]
            top = own.iloc[int(own["value"].to_numpy().argmax())]
            row = {"pair": pair, "metric": metric, "length": top["length"], "first": first, "second": second}
            rows.append(row | {"highest": top["value"], "at": top["t"], "barrier": top["value"] - max(first, second)})
    return pd.DataFrame(rows)


@themed
def draw_line(study: pd.DataFrame) -> Figure:
    """Scores on the straight line between the weights of two networks: a panel per score, a line per pair.

    Args:
        study: The study "line".

    Raises:
        GddlabError: The table is another one.
    """
    rows = _lines(study)
    metrics = list(dict.fromkeys(rows["metric"]))
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(3 * len(metrics) + 0.5, 3.4), layout="constrained", squeeze=False
    )
    for ax, metric in zip(axes.flat, metrics, strict=True):
        own = rows[rows["metric"] == metric]
        sns.lineplot(own, x="t", y="value", hue="pair", style="pair", markers=True, dashes=False, ax=ax)
        fit_scale(ax, own["value"], "y")
        ax.set(xlabel="place on the line", ylabel="", title=metric)
        ax.set_xticks([0, 0.5, 1], ["first", "0.5", "second"])
        handles, labels = ax.get_legend_handles_labels()
        ax.get_legend().remove()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.suptitle(f"n = {int(study['n'].max())} images a point; one training seed a network", x=0.01, ha="left")
    return figure


def _lines(study: pd.DataFrame) -> pd.DataFrame:
    """The study "line", long, with the distance to the teacher's images as one more score."""
    study = checked(study, ("a", "b", "t", "length", COPIED, "metric", "value", "n"), LINE)
    ends = [[look(name.partition("/")[0]).label for name in study[end]] for end in ("a", "b")]
    pairs = [f"{a}, two seeds" if a == b else f"{a} to {b}" for a, b in zip(*ends, strict=True)]
    study = study.assign(pair=pairs)
    copied = study.drop_duplicates(["pair", "t"]).assign(
        metric="to the teacher's images", value=lambda rows: rows[COPIED]
    )
    return pd.concat([study, copied], ignore_index=True)


def _networks(study: pd.DataFrame) -> list[str]:
    """The data first, then the teachers, then the others in the order of the study."""
    names = [n for n in dict.fromkeys(pd.concat([study["a"], study["b"]])) if not n.endswith(OTHER)]
    return sorted(names, key=lambda n: (n != "data", look(n).sort != "teacher"))


def _teacher(study: pd.DataFrame) -> str:
    """The teacher with its full number of steps: the one whose images of other noise are the yardstick."""
    found = [str(b) for b in study["b"] if b.endswith(OTHER)]
    if not found:
        raise GddlabError(f"no distance to a teacher{OTHER}: give the table of the study {STUDY!r}")
    return found[0].removesuffix(OTHER)


def _value(study: pd.DataFrame, a: str, b: str, distance: str) -> tuple[float, float]:
    """Value and standard error of a pair in either order; 0 for a network and itself, NaN if it was not measured."""
    if a == b:
        return 0.0, 0.0
    either = ((study["a"] == a) & (study["b"] == b)) | ((study["a"] == b) & (study["b"] == a))
    found = study[either & (study["distance"] == distance)]
    return (float(found["value"].iloc[0]), float(found["sem"].iloc[0])) if len(found) else (float("nan"), float("nan"))
