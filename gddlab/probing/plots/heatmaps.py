"""Heat maps with one row per layer, over noise levels and over training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gddlab.errors import GddlabError, shown
from gddlab.nets.unets import TARGET_LAYERS
from gddlab.probing.layers import difference
from gddlab.probing.plots.axes import (
    Probed,
    Scale,
    mark_places,
    plain,
    rows_of,
    short_names,
    stat_label,
    unit_of,
    wide,
)
from gddlab.theme import FROZEN, MISSING, TRAINED, axes_of, themed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

INCH_PER_LAYER = 0.135
NAME_SIZE = 6.5
"""Of layers' names, points: each layer has its name where rows are `INCH_PER_LAYER` high."""
STRIP = 0.13
"""Width of a null model, as a share of the heat map's."""


class Mask(Protocol):
    """What is read of a `FreezeMask`, whose package comes after this one."""

    @property
    def parameters(self) -> Sequence[tuple[str, Sequence[int]]]: ...

    def to_frame(self) -> pd.DataFrame: ...


class Heatmaps(Probed):
    """Heat maps of a `ProbeResult`."""

    @themed
    def heatmap(self, stat: str, ax: Axes | None = None, *, mask: Mask | None = None) -> Axes:
        """Draws one statistic, layers down, noise levels across, with resolution and stage at the right.

        The colour scale is logarithmic where values span more than a factor of 10. It has two hues around 0 where they
        have both signs, and around 1, on a log scale, where ratios are on both sides of it. Cells without a value are
        grey. Null models are strips at the right, on the same scale, the mean over their draws.

        Args:
            mask: A `FreezeMask`: adds a strip with the frozen share of each row's parameters.

        Raises:
            GddlabError: `stat` was not measured, or `mask` is for another network.
        """
        table = wide(self.frame, stat)
        rows = rows_of(self.frame, table.index)
        shares = None
        if mask is not None:
            layers = rows.set_axis([self._layer(key) for key in rows.index])
            shares = _frozen_shares(mask, layers, self.meta["parameters"])
        nulls = {kind: values.mean(0) for kind, values in self._of_nulls(stat, table).items()}
        ax = layers_down(ax, self.frame, stat, table, rows, shares, nulls=nulls)
        ax.set_xlabel(self._varied())
        ax.set_title(f"{stat}: {self._about(stat)}", loc="left", pad=None if mask is None else 18)  # above the legend
        return ax


@themed
def draw_over_training(frame: pd.DataFrame, stat: str, ax: Axes | None = None) -> Axes:
    """One statistic of a student over its training: layers down, one column per probe.

    Args:
        frame: Frames of results at several moments, with their thousands of images in an additional column `kimg`.
        ax: Where to draw; None makes a figure that fits the number of layers.

    Raises:
        GddlabError: `stat` is not in the frame, the frame has no `kimg`, or several noise levels or values per moment.
    """
    if "kimg" not in frame:
        raise GddlabError('the frame has no column "kimg": add the thousands of images at which each result was probed')
    part = frame[frame["stat"] == stat]
    if (sigmas := sorted(set(part["sigma"]), reverse=True))[1:]:
        shown = ", ".join(plain(s) for s in sigmas[:4])
        raise GddlabError(
            f"the frame has {len(sigmas)} noise levels ({shown}): keep one, frame[frame.sigma == {sigmas[0]:g}]"
        )
    if len(twice := part[part.duplicated(["layer", "kimg"])]):
        raise GddlabError(
            f"the frame has layer {twice.iloc[0]['layer']!r} twice at kimg {twice.iloc[0]['kimg']:g}: keep one run"
        )
    table = wide(frame, stat, across="kimg")
    ax = layers_down(ax, frame, stat, table, rows_of(frame, table.index))
    ax.set_xlabel("real images seen, thousands")
    images = int(part["n_images"].max())  # 0 where weights were measured, which do not depend on the noise level
    ax.set_title(f"{stat} at σ = {plain(sigmas[0])}: n = {images}" if images else stat, loc="left")
    return ax


def draw_cells(
    ax: Axes,
    values: Any,
    scale: Scale,
    label: str | None,
    *,
    bar: dict[str, Any] | None = None,
    **more: Any,
) -> Any:
    """A seaborn heat map on `scale`, grey without a value; returns its mesh. The colour bar is drawn with a `label`."""
    import seaborn as sns

    ax.set_facecolor(MISSING)
    # beside a norm the ends are not used: without them seaborn looks for some, and warns where there is no value
    given = {"vmin": scale.low, "vmax": scale.high} | scale.colours() | more
    figure = ax.figure.canvas.figure
    engine = figure.get_layout_engine()
    figure.set_layout_engine("none")  # sns.heatmap draws the figure, which costs half without a layout
    sns.heatmap(values, ax=ax, cbar=label is not None, cbar_kws=scale.bar(label or "", **(bar or {})), **given)
    figure.set_layout_engine(engine)
    ax.set(xlabel="", ylabel="")
    ax.tick_params(length=0)
    ax.tick_params(axis="y", rotation=0)
    ax.tick_params(axis="x", rotation=90 if len(ax.get_xticks()) > 8 else 0)
    mesh: Any = ax.collections[0]
    if label is not None:
        mesh.colorbar.ax.minorticks_off()
        if scale.neutral is not None:
            mesh.colorbar.ax.set_ylim(scale.low, scale.high)  # what occurs, of a scale that is as long on both sides
    return mesh


def frozen_colours() -> Colormap:
    """From trained (orange) over half (white) to frozen (blue)."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("frozen", [TRAINED, "#F7F7F7", FROZEN])


def layers_down(
    ax: Axes | None,
    frame: pd.DataFrame,
    stat: str,
    table: pd.DataFrame,
    rows: pd.DataFrame,
    shares: Any = None,
    *,
    width: float = 7.5,
    scale: Scale | None = None,
    label: str | None = None,
    nulls: Mapping[str, np.ndarray] | None = None,
) -> Axes:
    """Cells, names, strips and colour bar; `shares` are the frozen share of each row and of all parameters.

    Columns with texts as names are shown as they are, `scale` and `label` in place of those of the statistic. `nulls`
    are tables of the same rows and columns.
    """
    import seaborn as sns
    from matplotlib.patches import Patch

    ax = axes_of(ax, width * (1 + STRIP * len(nulls or ())), max(2.5, INCH_PER_LAYER * len(rows) + 1.3))
    digits = 2 if table.columns.name == "sigma" else 6
    across = [c if isinstance(c, str) else plain(c, digits) for c in table.columns]
    shown = table.set_axis(short_names(list(table.index))).set_axis(across, axis=1)
    scale = scale or Scale.of(table, unit_of(frame, stat))
    height = ax.get_window_extent().height / ax.figure.dpi
    ax.tick_params(axis="y", labelsize=NAME_SIZE)
    ax.tick_params(axis="x", labelsize=7.5)
    label = label or stat_label(frame, stat, scale.note)
    bar: dict[str, Any] = {"shrink": min(1, 3 / height), "aspect": 18, "anchor": (0, 1)}
    if nulls:
        bar["pad"] = 0.06  # strips shrink with the axes while the layout makes room, names do not
    room = max(height - 0.6, 0.3) * 72 / (1.1 * NAME_SIZE)  # names; the layout takes some height for labels and title
    every = math.ceil(len(rows) / room)
    draw_cells(ax, shown, scale, label, bar=bar, yticklabels=False)
    ax.set_yticks(np.arange(0, len(rows), every) + 0.5, shown.index[::every])  # after it was drawn: texts take longest
    at = 1.01
    if shares is not None:
        each, whole = shares
        strip = ax.inset_axes((at, 0, 0.025, 1))
        at += 0.04
        strip.set_facecolor(MISSING)
        colours = frozen_colours()
        look: dict[str, Any] = {"cmap": colours, "vmin": 0, "vmax": 1, "linewidths": 0.4}
        sns.heatmap(each[:, None], ax=strip, cbar=False, xticklabels=False, yticklabels=False, **look)
        names = {1.0: f"frozen, {whole:.1%} of all parameters", 0.0: "trained"}
        if ((each > 0.05) & (each < 0.95)).any():  # blocks, of which a part is frozen
            names |= {1.0: f"frozen ({whole:.1%} of all parameters)"} | {x: f"{x:.0%}" for x in (0.75, 0.5)}
        handles = [Patch(color=colours(x), label=names[x]) for x in sorted(names, reverse=True)]
        ax.legend(
            handles=handles,
            loc="lower right",
            bbox_to_anchor=(1.04, 1),
            ncols=len(handles),
            borderaxespad=0.2,
            handlelength=1,
        )
    for kind, values in (nulls or {}).items():
        strip = ax.inset_axes((at, 0, STRIP, 1))
        strip.imshow(values, aspect="auto", interpolation="nearest", **scale.colours())
        strip.set(xticks=[], yticks=[], facecolor=MISSING)
        strip.spines[:].set_visible(False)
        strip.set_xlabel(kind, fontsize=NAME_SIZE)
        at += STRIP + 0.01
    mark_places(ax, rows, range(len(rows) + 1), "right", at=at)
    return ax


def _frozen_shares(mask: Mask, rows: pd.DataFrame, parameters: Any) -> tuple[np.ndarray, float]:
    """Frozen share of each layer's parameters, its children's too, NaN for a layer without; and of all parameters."""
    if not hasattr(mask, "fingerprint"):
        raise GddlabError(f"mask={shown(mask)}: give a FreezeMask, what select_freeze or FreezeMask.load returns")
    ours, theirs = (
        {name: tuple(shape) for name, shape in known if set(TARGET_LAYERS).isdisjoint(name.split("."))}
        for known in (mask.parameters, parameters)
    )
    if where := difference(ours, theirs, ("mask", "network")):
        raise GddlabError(f"this mask is for another network than was probed: {where}")
    table = mask.to_frame()
    sizes = table[["size"]].assign(still=table["size"].where(table["frozen"], 0))
    out = []
    for name in rows.index:
        mine = sizes[table["parameter"].str.startswith(f"{name}.")].sum()
        out.append(mine["still"] / mine["size"] if mine["size"] else np.nan)
    return np.array(out), sizes["still"].sum() / sizes["size"].sum()
