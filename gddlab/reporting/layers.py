"""Activations of a teacher and its students: layers by noise level side by side, and along depth for what a student is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from gddlab.errors import GddlabError, unknown
from gddlab.probing.layers import named_layers
from gddlab.probing.plots.bands import bands
from gddlab.probing.plots.labels import label_axis
from gddlab.probing.plots.scales import ColourScale, edges, plain, sigma_axis, value_axis
from gddlab.probing.plots.table import levels, rows_of, short_names, stat_label, wide
from gddlab.reporting.style import WIDE, checked, known, look, name_lines

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "activation_ratio",
    "draw_activations",
    "draw_depth",
    "draw_moved",
    "family",
    "measured_layers",
    "moved_layers",
    "moved_table",
    "squared_norms",
]

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


PLACE = ("layer", "family", "stage", "resolution", "depth", "n_params")
FAMILIES = {
    "convolution": "#0072B2",
    "skip convolution": "#56B4E9",
    "attention": "#D55E00",
    "noise embedding": "#009E73",
    "normalisation": "#7F7F7F",
    "first, last, auxiliary": "#E69F00",
    "other": "#CC79A7",
}
"""Kinds of layers, put together -> colour (Okabe and Ito's)."""


def family(kind: str) -> str:
    """Which of `FAMILIES` a layer's kind belongs to."""
    if "norm" in kind:
        return "normalisation"
    if kind == "conv" or kind.startswith(("aux_", "out_")):
        return "first, last, auxiliary"
    if kind.startswith("conv"):
        return "convolution"
    if kind.startswith("skip"):
        return "skip convolution"
    if kind in ("qkv", "proj"):
        return "attention"
    return "noise embedding" if kind.startswith(("affine", "map_")) else "other"


def moved_layers(study: pd.DataFrame, students: Sequence[str] | None = None) -> pd.DataFrame:
    """`weight_change` of each layer and student: |Δw| / |w|, Δw = student's - teacher's w, over all parameters of the layer.

    Args:
        study: Columns of `ProbeResult.frame`, network.
        students: Which; all if None.

    Returns:
        A row a layer in the order of the network, without layers that hold others: layer, family, stage, resolution, depth, n_params, and a column a
        student. 0 is a layer that is the teacher's bit for bit, as frozen ones are.

    Raises:
        GddlabError: The table is another one, or has no weight_change of a student.
    """
    study = checked(
        study, ("network", "layer", "kind", "stage", "resolution", "depth", "n_params", "stat", "value"), STUDY
    )
    part = study[study["stat"] == "weight_change"]
    if not len(part):
        raise GddlabError(f"the table has no weight_change: give that of the study {STUDY!r}")
    names = known(list(dict.fromkeys(part["network"])), students, "student")
    layers = list(dict.fromkeys(part["layer"]))
    leaves = [n for n in layers if not any(other.startswith(n + ".") for other in layers)]
    about = part.drop_duplicates("layer").set_index("layer").loc[leaves]
    out = about.assign(family=[family(k) for k in about["kind"]])[list(PLACE[1:])].copy()
    for name in names:
        out[name] = part[part["network"] == name].drop_duplicates("layer").set_index("layer")["value"].reindex(leaves)
    return out.reset_index()


@torch.no_grad()
def squared_norms(network: nn.Module) -> dict[str, float]:
    """Sum of the squares of each layer's parameters, its own and its children's, by name: what `weight_change` is relative to, squared."""
    layers = named_layers(network)
    return {name: sum(float(p.double().square().sum()) for p in module.parameters()) for name, module in layers.items()}


def moved_table(
    study: pd.DataFrame,
    norms: Mapping[str, float],
    students: Sequence[str] | None = None,
    *,
    by: Sequence[str] = ("family", "stage"),
) -> pd.DataFrame:
    """How far whole groups of layers have moved, and how much of all movement is theirs.

    Args:
        study: Columns of `ProbeResult.frame`, network.
        norms: `squared_norms(teacher)`.
        students: Which; all if None.
        by: Columns of `moved_layers` to group by.

    Returns:
        Indexed by group: layers, parameters, and for each student S three columns: "S" (root of the sum of |w - teacher's|^2 over that of |teacher's|^2, over all
        parameters of the group), "S share" (of all of the student's |w - teacher's|^2), "S still" (share of the group's parameters in layers that have not moved at all).

    Raises:
        GddlabError: The table is another one; a layer has no norm.
    """
    import pandas as pd

    layers = moved_layers(study, students)
    layers = layers.sort_values("family", key=lambda f: f.map(list(FAMILIES).index), kind="stable")
    for name in layers["layer"]:
        if name not in norms:
            raise GddlabError(f"no norm of layer {name!r}: give squared_norms of the teacher that was measured")
    names = [str(c) for c in layers.columns[len(PLACE) :]]
    size = layers["layer"].map(dict(norms))
    groups = [layers[c].replace("", "-") for c in by]
    out = pd.DataFrame({"layers": layers.groupby(groups, sort=False)["layer"].count()})
    out["parameters"] = layers["n_params"].groupby(groups, sort=False).sum()
    for name in names:
        moved = (layers[name] ** 2 * size).fillna(0.0)
        out[name] = np.sqrt(moved.groupby(groups, sort=False).sum() / size.groupby(groups, sort=False).sum())
        out[f"{name} share"] = moved.groupby(groups, sort=False).sum() / moved.sum()
        still = layers["n_params"].where(layers[name] == 0, 0)
        out[f"{name} still"] = still.groupby(groups, sort=False).sum() / out["parameters"]
    return out


def draw_moved(study: pd.DataFrame, students: Sequence[str] = ("gdd", "gdd-i"), *, width: float = 6.4) -> Figure:
    """How far each layer has moved, along the network, a picture a student, on one log scale; crosses at the foot are layers that have not moved.

    Args:
        study: Columns of `ProbeResult.frame`, network.
        students: From top to bottom.
        width: Of the figure, inches.

    Raises:
        GddlabError: The table is another one, or has no weight_change of a student.
    """
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    layers = moved_layers(study, students)
    values = layers[list(students)].to_numpy(dtype=float)
    if not (values > 0).any():
        raise GddlabError("no layer of these students has moved: give a student that was trained")
    floor = float(np.nanmin(values[values > 0])) / 2.2
    rows = rows_of(study, layers["layer"])
    x = np.arange(len(rows), dtype=float)
    figure, axes = plt.subplots(
        len(students),
        1,
        sharex=True,
        sharey=True,
        figsize=(width, 1.5 * len(students) + (1.6 if width >= WIDE else 2.1)),
        layout="constrained",
        squeeze=False,
    )
    for ax, name in zip(axes[:, 0], students, strict=True):
        ax.set_yscale("log")
        y = layers[name].to_numpy(dtype=float)
        for kind, colour in FAMILIES.items():
            mine = (layers["family"] == kind).to_numpy()
            away, still = mine & (y > 0), mine & (y == 0)
            ax.vlines(x[away], floor, y[away], color=colour, linewidth=0.8, alpha=0.5)
            ax.plot(x[away], y[away], "o", color=colour, markersize=3)
            if still.any():  # an empty line that is not clipped would take part in the layout, at the figure's corner
                foot: dict[str, Any] = {"markersize": 3, "markeredgewidth": 0.9, "clip_on": False}
                ax.plot(x[still], np.full(still.sum(), floor), "x", color=colour, **foot)
        for g in rows.groups()[1:]:
            ax.axvline(g.start - 0.5, color="0.85", linewidth=0.8, zorder=0)
        count = int((y == 0).sum())
        text = (
            f"{look(name).label}: {count} of {len(y)} layers unmoved"
            if count
            else f"{look(name).label}: all layers moved"
        )
        ax.set_title(text, fontsize=8, loc="left", pad=3 if ax is not axes[0, 0] else 36)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=7)
        ax.set_ylabel("|Δw| / |w|", fontsize=7.5)
        ax.yaxis.set_major_formatter("{x:g}")
    axes[0, 0].set_ylim(bottom=floor)
    borders = edges(x)
    axes[0, 0].set_xlim(borders[0], borders[-1])
    bands(axes[0, 0], rows, borders.tolist(), "top")
    axes[-1, 0].set_xlabel("layer, in the order of the network", fontsize=8)
    shown = [k for k in FAMILIES if k in set(layers["family"])]
    handles = [Line2D([], [], marker="o", linestyle="", markersize=4, color=FAMILIES[k], label=k) for k in shown]
    handles.append(Line2D([], [], marker="x", linestyle="", markersize=4, color="black", label="unmoved (0)"))
    columns = len(handles) if width >= 8 else 4 if width >= WIDE else 2
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=7, handletextpad=0.1
    )
    return figure
