"""Layers of a teacher and its students: activations side by side and along depth, and how far weights have moved."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from gddlab.errors import GddlabError, unknown
from gddlab.probing.layers import named_layers
from gddlab.probing.plots.axes import (
    Scale,
    borders_of,
    mark_places,
    neighbours,
    plain,
    rows_of,
    short_names,
    stat_label,
    unit_of,
    value_axis,
    wide,
    x_of,
)
from gddlab.probing.plots.heatmaps import draw_cells
from gddlab.probing.plots.lines import along_depth
from gddlab.reporting.style import checked, known, look
from gddlab.theme import BLACK, DIVERGING, GREY, PALETTE, axes_of, banded, themed

STUDY = "layers"
COLUMNS = (
    *("network", "states", "layer", "stage", "resolution", "depth", "n_params"),
    *("sigma", "stat", "value", "sem", "n_images"),
)


def measured_layers(study: pd.DataFrame, network: str, stat: str, *, states: str = "noised") -> pd.DataFrame:
    """The rows of one network and statistic.

    Args:
        study: Columns of `ProbeResult.frame`, network, states.
        network: "teacher", or a student.
        stat: A statistic, such as "rms".
        states: "noised", data with noise at many levels, or "student", noise at sigma 80, as for a one-step
            generator.

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
        Layers in the order of the network down, noise levels ascending; log2(student / teacher), so 1 is twice as much,
        and NaN where one of them is not above 0.

    Raises:
        GddlabError: The statistic was not measured of both.
    """
    ours, theirs = (wide(measured_layers(study, n, stat, states=states), stat) for n in (student, teacher))
    theirs = theirs.reindex(index=ours.index, columns=ours.columns)
    return (ours / theirs).where((ours > 0) & (theirs > 0)).apply(np.log2)


@themed
def draw_activations(study: pd.DataFrame, stat: str, student: str, *, teacher: str = "teacher") -> Figure:
    """Teacher, student, and how they differ: three heat maps, layers down, noise levels across.

    Args:
        study, stat: As for `measured_layers`, which also says what is refused.
        student, teacher: Networks of the study.
    """
    frames = {n: measured_layers(study, n, stat) for n in (teacher, student)}
    frame, theirs = frames[teacher], wide(frames[teacher], stat)
    ours = wide(frames[student], stat).reindex(index=theirs.index, columns=theirs.columns)
    rows = rows_of(frame, theirs.index)
    scale = Scale.of([theirs, ours], unit_of(frame, stat))
    names = look(teacher).label, look(student).label
    if scale.low < 0:
        change, compared = ours - theirs, "{1} - {0}".format(*names)
    else:
        change, compared = activation_ratio(study, stat, student, teacher=teacher), "log2({1} / {0})".format(*names)
    top = float(np.nanmax(np.abs(change.to_numpy()))) or 1.0
    size = (7.0, 0.125 * len(rows) + 2.0)
    figure, axes = plt.subplots(1, 3, sharey=True, figsize=size, layout="constrained")
    shared = scale.colours()
    around_zero = {"cmap": DIVERGING, "vmin": -top, "vmax": top, "norm": None}
    panels = [(names[0], theirs, shared), (names[1], ours, shared), ("student against teacher", change, around_zero)]
    sigmas = list(theirs.columns)
    every = math.ceil(len(sigmas) / 9)
    ticks = [plain(s) if (len(sigmas) - 1 - i) % every == 0 else "" for i, s in enumerate(sigmas)]  # 80 is named
    meshes = []
    for ax, (title, table, colours) in zip(axes, panels, strict=True):
        shown = table.set_axis(short_names(list(rows.index)))
        ax.tick_params(labelsize=8)
        meshes.append(draw_cells(ax, shown, scale, None, xticklabels=ticks, **colours))
        ax.tick_params(axis="y", labelleft=ax is axes[0])
        ax.set_xlabel("noise level σ")
        ax.set_title(title, loc="left")
    for _, start, _ in neighbours(rows["place"])[1:]:
        for ax in axes[:2]:
            ax.axhline(start, color="white", linewidth=1)
    mark_places(axes[2], rows, range(len(rows) + 1), "right")
    label = stat_label(frame, stat, scale.note)
    figure.colorbar(meshes[1], ax=axes[:2], location="bottom", **scale.bar(label, aspect=40)).minorticks_off()
    figure.colorbar(meshes[2], ax=axes[2], location="bottom", aspect=20, pad=0.02, label=compared)
    figure.suptitle(f"{stat}: noised states, n = {int(frame['n_images'].max())} images", x=0.01, ha="left")
    return figure


@themed
def draw_depth(
    study: pd.DataFrame,
    stat: str,
    students: Sequence[str] | None = None,
    *,
    teacher: str = "teacher",
    ax: Axes | None = None,
) -> Axes:
    """One statistic along depth where all networks get what a one-step student gets: noise at sigma 80.

    Bands are one standard error over images.

    Args:
        study, stat: As for `measured_layers`, which also says what is refused.
        students: Networks of the study; all but the teacher if None.
        teacher: Drawn in black.
    """
    frame = measured_layers(study, teacher, stat, states="student")
    every = study[(study["states"] == "student") & (study["stat"] == stat)]["network"]
    names = [teacher, *known([n for n in dict.fromkeys(every) if n != teacher], students)]
    rows = rows_of(frame, dict.fromkeys(frame["layer"]))
    ax = axes_of(ax, 6.4, 3.3)
    parts = {n: measured_layers(study, n, stat, states="student").set_index("layer").loc[rows.index] for n in names}
    for name, part in parts.items():
        colour = BLACK if name == teacher else look(name).colour
        style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 2.5}
        banded(ax, x_of(rows)[0], part["value"], part["sem"].fillna(0), label=look(name).label, **style)
    note = value_axis(ax, [part["value"] for part in parts.values()], unit_of(frame, stat))
    ax.set_ylabel(stat_label(frame, stat, note))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    images = int(frame["n_images"].max())
    return along_depth(ax, rows, f"{stat} at σ = 80, n = {images}; bands: standard error over images")


@themed
def draw_told(study: pd.DataFrame, stats: Sequence[str] = ("rms", "rel_update", "correlation")) -> Figure:
    """How much of each block's variation is due to the noise level told alone, along depth, one line a network.

    Args:
        study: The table of the study "architectures".
        stats: A panel each.

    Raises:
        GddlabError: Another table, or a statistic that it does not have.
    """
    study = checked(study, ("network", "what", "stat", "varied", "position", "value", "sem"), "architectures")
    rows = study[(study["what"] == "effect") & (study["varied"] == "told")]
    figure, axes = plt.subplots(1, len(stats), figsize=(2.6 * len(stats) + 1.2, 2.9), layout="constrained", sharey=True)
    colours = dict(zip(dict.fromkeys(rows["network"]), itertools.cycle(PALETTE), strict=False))
    panels = np.atleast_1d(axes)
    for ax, stat in zip(panels, known(list(dict.fromkeys(rows["stat"])), stats, "stat"), strict=True):
        for name, part in rows[rows["stat"] == stat].groupby("network", sort=False):
            part = part.sort_values("position")
            style: dict[str, Any] = {"color": colours[name], "marker": "o", "markersize": 2.5, "label": name}
            banded(ax, part["position"], part["value"], part["sem"], **style)
        ax.set(title=stat, xlabel="block, from first (0) to last (1)", ylim=(-0.02, 1.02))
    panels[-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    panels[0].set_ylabel("share due to the level told")
    return figure


PLACE = ("layer", "family", "stage", "resolution", "depth", "n_params")
FAMILIES = {
    "convolution": PALETTE[0],
    "skip convolution": PALETTE[5],
    "attention": PALETTE[3],
    "noise embedding": PALETTE[2],
    "normalisation": GREY,
    "first, last, auxiliary": PALETTE[1],
    "other": PALETTE[4],
}
"""Groups of kinds of layers -> colour."""


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
    """`weight_change` of each layer and student: |Δw| / |w| over all its parameters, Δw = student's - teacher's w.

    Args:
        study: Columns of `ProbeResult.frame`, network.
        students: Which; all if None.

    Returns:
        One row per layer in the order of the network, without layers that contain others: layer, family, stage,
        resolution, depth, n_params, and one column per student. 0 is a layer that equals the teacher's bit for bit, as
        frozen ones do.

    Raises:
        GddlabError: The table is another one, or has no weight_change of a student.
    """
    study = checked(study, ("network", "kind", "stat", "value", *(c for c in PLACE if c != "family")), STUDY)
    part = study[study["stat"] == "weight_change"]
    if not len(part):
        raise GddlabError(f"the table has no weight_change: give that of the study {STUDY!r}")
    names = known(list(dict.fromkeys(part["network"])), students, "student")
    layers = list(dict.fromkeys(part["layer"]))
    leaves = [n for n in layers if not any(other.startswith(n + ".") for other in layers)]
    about = part.drop_duplicates("layer").set_index("layer").loc[leaves]
    out = about.assign(family=[family(k) for k in about["kind"]])[list(PLACE[1:])]
    once = part.drop_duplicates(["layer", "network"])  # two studies may have measured the same
    return out.join(once.pivot(index="layer", columns="network", values="value")[names]).reset_index()


@torch.no_grad()
def squared_norms(network: nn.Module) -> dict[str, float]:
    """Sum of squares of each layer's parameters, its children's too: the square of `weight_change`'s denominator."""
    layers = named_layers(network)
    return {name: sum(float(p.double().square().sum()) for p in module.parameters()) for name, module in layers.items()}


def moved_table(
    study: pd.DataFrame,
    norms: Mapping[str, float],
    students: Sequence[str] | None = None,
) -> pd.DataFrame:
    """How far whole groups of layers have moved, and how much of all movement is theirs.

    Args:
        study, students: As for `moved_layers`.
        norms: `squared_norms(teacher)`.

    Returns:
        Indexed by family and stage: layers, parameters, and for each student S three columns: "S" (root of the sum of
        |w - teacher's|^2 over that of |teacher's|^2, over all parameters of the group), "S share" (of the student's
        whole |w - teacher's|^2), "S unmoved" (share of the group's parameters in layers that have not moved).

    Raises:
        GddlabError: The table is another one; a layer has no norm.
    """
    layers = moved_layers(study, students)
    layers = layers.sort_values("family", key=lambda f: f.map(list(FAMILIES).index), kind="stable")
    for name in layers["layer"]:
        if name not in norms:
            raise GddlabError(f"no norm of layer {name!r}: give squared_norms of the teacher that was measured")
    groups, size = [layers["family"], layers["stage"].replace("", "-")], layers["layer"].map(dict(norms))

    def total(values: pd.Series) -> pd.Series:
        return values.groupby(groups, sort=False).sum()

    out = pd.DataFrame({"layers": total(layers["layer"].notna()), "parameters": total(layers["n_params"])})
    for name in map(str, layers.columns[len(PLACE) :]):
        moved = (layers[name] ** 2 * size).fillna(0.0)
        out[name] = np.sqrt(total(moved) / total(size))
        out[f"{name} share"] = total(moved) / moved.sum()
        out[f"{name} unmoved"] = total(layers["n_params"].where(layers[name] == 0, 0)) / out["parameters"]
    return out


@themed
def draw_moved(study: pd.DataFrame, students: Sequence[str] = ("gdd", "gdd-i")) -> Figure:
    """How far each layer has moved, along the network, one panel per student, on one log scale.

    Crosses at the foot are layers that have not moved.

    Args:
        study: As for `moved_layers`, which also says what is refused.
        students: From top to bottom.
    """
    layers = moved_layers(study, students)
    values = layers[list(students)].to_numpy(dtype=float)
    if not (values > 0).any():
        raise GddlabError("no layer of these students has moved: give a student that was trained")
    floor = float(np.nanmin(values[values > 0])) / 2.2
    rows = rows_of(study, layers["layer"])
    shape: dict[str, Any] = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(len(students), 1, figsize=(8, 1.7 * len(students) + 1.2), **shape)
    for ax, name in zip(axes[:, 0], students, strict=True):
        shown = layers.assign(order=range(len(layers)), moved=layers[name].clip(lower=floor), still=layers[name] == 0)
        colours = shown["family"].map(FAMILIES)
        ax.vlines(shown["order"], floor, shown["moved"], color=colours, linewidth=0.8, alpha=0.5)
        dots: dict[str, Any] = {"hue": "family", "palette": FAMILIES, "hue_order": list(FAMILIES), "style": "still"}
        marks: dict[str, Any] = {"markers": {False: "o", True: "X"}, "s": 22, "linewidth": 0, "zorder": 3}
        sns.scatterplot(shown, x="order", y="moved", legend=False, clip_on=False, ax=ax, **dots, **marks)
        count = int(shown["still"].sum())
        text = f"{count} of {len(layers)} layers unmoved" if count else "all layers moved"
        ax.set_title(f"{look(name).label}: {text}", loc="left", pad=26 if ax is axes[0, 0] else None)
        ax.set(yscale="log", ylabel="|Δw| / |w|", xlabel="layer, in the order of the network")
        ax.yaxis.set_major_formatter("{x:g}")
    axes[0, 0].set_ylim(bottom=floor)
    borders = borders_of(range(len(rows)))
    axes[0, 0].set_xlim(borders[0], borders[-1])
    mark_places(axes[0, 0], rows, borders, "top")
    kinds = [k for k in FAMILIES if k in set(layers["family"])]
    dot: dict[str, Any] = {"linestyle": "", "markersize": 5}
    handles = [plt.Line2D([], [], marker="o", color=FAMILIES[k], label=k, **dot) for k in kinds]
    handles.append(plt.Line2D([], [], marker="X", color=BLACK, label="unmoved (0)", **dot))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, handletextpad=0.1)
    return figure
