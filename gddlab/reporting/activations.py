"""Activations of a teacher and its students: layers by noise level side by side, and along depth for what a student is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gddlab.errors import unknown
from gddlab.probing.plots.bands import bands
from gddlab.probing.plots.labels import label_axis
from gddlab.probing.plots.scales import ColourScale, edges, plain, sigma_axis, value_axis
from gddlab.probing.plots.table import levels, rows_of, short_names, stat_label, wide
from gddlab.reporting.networks import WIDE, checked, known, look, name_lines

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["activation_ratio", "draw_activations", "draw_depth", "measured_layers"]

STUDY = "layers"
STATES = ("noised", "student")
COLUMNS = (
    "network",
    "states",
    "layer",
    "stage",
    "resolution",
    "depth",
    "n_params",
    "sigma",
    "stat",
    "value",
    "sem",
    "n_images",
)


def measured_layers(study: pd.DataFrame, network: str, stat: str, *, states: str = "noised") -> pd.DataFrame:
    """The rows of one network and statistic.

    Args:
        study: Columns of `ProbeResult.frame`, network, states.
        network: "teacher", or a student.
        stat: A statistic, such as "rms".
        states: What the network was shown: "noised" images at many noise levels, or "student", noise at sigma 80 as a one-step generator is given.

    Raises:
        GddlabError: The table is another one, or has no such rows.
    """
    study = checked(study, COLUMNS, STUDY)
    for column, name in (("states", states), ("network", network), ("stat", stat)):
        if name not in set(study[column]):
            raise unknown(column, name, study[column])
        study = study[study[column] == name]
    return study


def activation_ratio(
    study: pd.DataFrame, stat: str, student: str, *, teacher: str = "teacher", states: str = "noised"
) -> pd.DataFrame:
    """How a student's statistic differs from its teacher's, at each layer and noise level.

    Returns:
        Layers in the order of the network down, noise levels ascending; log2(student / teacher), NaN where one of them is not above 0. 1 is twice as much.

    Raises:
        GddlabError: The statistic was not measured of both.
    """
    ours, theirs = (wide(measured_layers(study, n, stat, states=states), stat) for n in (student, teacher))
    theirs = theirs.reindex(index=ours.index, columns=ours.columns)
    return (ours / theirs).where((ours > 0) & (theirs > 0)).apply(np.log2)


def draw_activations(
    study: pd.DataFrame, stat: str, student: str, *, teacher: str = "teacher", width: float = 6.4
) -> Figure:
    """Teacher, student, and how they differ: three heat maps, layers down, noise levels across.

    Args:
        study: Columns of `ProbeResult.frame`, network, states.
        stat: A statistic, such as "rms".
        student: A network of the study.
        teacher: Another one.
        width: Of the figure, inches.

    Raises:
        GddlabError: The table is another one, or has no such network or statistic.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import Normalize

    frames = {n: measured_layers(study, n, stat) for n in (teacher, student)}
    tables = {n: wide(f, stat) for n, f in frames.items()}
    frame, first = frames[teacher], tables[teacher]
    rows = rows_of(frame, first.index)
    shown = [t.reindex(index=first.index, columns=first.columns).to_numpy() for t in tables.values()]
    scale = ColourScale.of(np.stack(shown), correlation=stat in ("cosine", "cka"))
    signed = not (np.nanmin(np.stack(shown)) >= 0)
    change = shown[1] - shown[0] if signed else activation_ratio(study, stat, student, teacher=teacher).to_numpy()
    top = float(np.nanmax(np.abs(change))) or 1.0
    figure, axes = plt.subplots(
        1, 3, sharey=True, figsize=(width, max(2.4, 0.085 * len(rows) + 1.25)), layout="constrained"
    )
    across, down = 10 ** edges(np.log10(levels(first))), np.arange(len(rows) + 1)
    colours = plt.get_cmap("PuOr_r").with_extremes(bad="0.75")
    difference = (np.ma.masked_invalid(change), Normalize(-top, top), colours)
    pictures = [*((scale.shown(v), scale.norm, scale.colours) for v in shown), difference]
    titles = [look(teacher).label, look(student).label, "difference" if signed else "ratio"]
    ours, theirs = look(student).label, look(teacher).label
    compared = f"{ours} - {theirs}" if signed else f"log2({ours} / {theirs})"
    ends = min(levels(first)), max(levels(first))
    between = [t for t in ((0.1, 1.0, 10.0) if width >= WIDE else (1.0,)) if 4 * ends[0] < t < ends[1] / 4]
    meshes: list[Any] = []
    for ax, (values, norm, map_), title in zip(axes, pictures, titles, strict=True):
        meshes.append(ax.pcolormesh(across, down, values, norm=norm, cmap=map_))
        sigma_axis(ax, levels(first))
        ticks = [ends[0], *between, ends[1]]
        ax.set_xticks(ticks, [plain(t) for t in ticks])
        for g in rows.groups()[1:]:
            ax.axhline(g.start, color="white", linewidth=1.2)
        ax.set_xlabel("σ", fontsize=8, labelpad=1)
        ax.tick_params(axis="x", labelsize=6.5 if width >= WIDE else 6)
        ax.tick_params(axis="y", length=0)
        ax.set_title(title, fontsize=8)
    axes[0].set_ylim(len(rows), 0)
    names = short_names(rows.names) if width >= WIDE else []  # in a column the bands must do
    label_axis(axes[0].yaxis, down[: len(names)] + 0.5, names, size=5.5)
    bands(axes[2], rows, down.tolist(), "right")
    for places, mesh, label in (
        (axes[:2], meshes[1], stat_label(frame, stat, scale.note)),
        (axes[2], meshes[2], compared),
    ):
        bar = figure.colorbar(mesh, ax=places, location="bottom", aspect=30 if places is not axes[2] else 15, pad=0.01)
        bar.set_label(label, fontsize=7)
        bar.ax.xaxis.set_major_formatter(lambda x, _: plain(x, 3))
        bar.ax.minorticks_off()
        bar.ax.tick_params(labelsize=6.5)
    return figure


def draw_depth(
    study: pd.DataFrame,
    stat: str,
    students: Sequence[str] | None = None,
    *,
    teacher: str = "teacher",
    width: float = 6.4,
    ax: Axes | None = None,
) -> Axes:
    """One statistic along depth where all are given what a one-step student is given: noise at sigma 80. Bands are one standard error over images.

    Args:
        study: Columns of `ProbeResult.frame`, network, states.
        stat: A statistic, such as "rms".
        students: Networks of the study; all but the teacher if None.
        teacher: Drawn in black.
        width: Of the figure, inches, where `ax` is None.
        ax: Where to draw; None makes a figure.

    Raises:
        GddlabError: The table is another one, or has no such network or statistic.
    """
    import matplotlib.pyplot as plt

    frame = measured_layers(study, teacher, stat, states="student")
    every = study[(study["states"] == "student") & (study["stat"] == stat)]["network"]
    names = [teacher, *known([n for n in dict.fromkeys(every) if n != teacher], students)]
    rows = rows_of(frame, dict.fromkeys(frame["layer"]))
    x, label = rows.positions()
    if ax is None:
        ax = plt.subplots(figsize=(width, max(2.2, 0.45 * width)), layout="constrained")[1]
    lines: list[tuple[float, str, Any]] = []
    drawn: list[np.ndarray] = []
    for name in names:
        part = measured_layers(study, name, stat, states="student").set_index("layer").loc[rows.names]
        y, sem = part["value"].to_numpy(dtype=float), part["sem"].fillna(0).to_numpy(dtype=float)
        style = look(name)
        colour = "black" if name == teacher else style.colour
        ax.plot(x, y, color=colour, linewidth=1.6 if name == teacher else 1.1, marker="o", markersize=2.2)
        ax.fill_between(x, y - sem, y + sem, color=colour, alpha=0.2, linewidth=0)
        lines.append((y[-1], style.label, colour))
        drawn.append(y)
    note = value_axis(ax, np.concatenate(drawn))
    ax.set_ylabel(stat_label(frame, stat, note), fontsize=8)
    ax.set_xlabel(label, fontsize=8)
    ax.tick_params(labelsize=7)
    borders = edges(x)
    ax.set_xlim(borders[0], borders[-1])
    bands(ax, rows, borders.tolist(), "top")
    name_lines(ax, lines)
    return ax
