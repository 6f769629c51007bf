"""Heat maps with one row per layer, over noise levels and over training, and noise level by noise level."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from gddlab.errors import GddlabError, shown, unknown
from gddlab.nets.unets import TARGET_LAYERS
from gddlab.probing.layers import difference
from gddlab.probing.plots.axes import (
    Probed,
    Scale,
    mark_places,
    neighbours,
    plain,
    rows_of,
    short_names,
    stat_label,
    wide,
)
from gddlab.theme import FROZEN, MISSING, TRAINED, axes_of, themed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

INCH_PER_LAYER = 0.135
NAME_SIZE = 6.5
"""Of layers' names, points: each layer has its name where rows are `INCH_PER_LAYER` high."""
CORRELATIONS = ("cosine", "cka")
WIDEST = 13
"""Small multiples in a line."""


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

        The colour scale is logarithmic where values span more than a factor of 10, and has two hues around 0 where they
        have both signs. Cells without a value are grey.

        Args:
            mask: A `FreezeMask`: adds a strip with the frozen share of each row's parameters.

        Raises:
            GddlabError: `stat` was not measured, or `mask` is for another network.
        """
        table = wide(self.frame, stat)
        rows = rows_of(self.frame, table.index)
        shares = None if mask is None else _frozen_shares(mask, rows, self.meta["parameters"])
        ax = _layers_down(ax, self.frame, stat, table, rows, shares)
        ax.set_xlabel("noise level σ")
        ax.set_title(f"{stat}: {self._about(stat)}", loc="left", pad=None if mask is None else 18)  # above the legend
        return ax

    @themed
    def similarity(self, layer: str, ax: Axes | None = None, *, kind: str = "cosine") -> Axes:
        """Draws the cosines (or "cka") of one layer's outputs between all noise levels, ascending to the right and up.

        Raises:
            GddlabError: `kind` was not measured, or not of `layer`, or not at all noise levels of a joined result.
        """
        import pandas as pd

        matrices = _matrices(self, kind)
        if not (isinstance(layer, str) and layer in matrices):
            raise unknown(f"layer with {kind} between noise levels", layer, matrices)
        names = [plain(s) for s in _sigmas(self, kind, layer)]
        ax = axes_of(ax, 4.8, 4.2)
        ax.tick_params(labelsize=7)
        table = pd.DataFrame(matrices[layer][::-1, ::-1], names, names)
        draw_cells(ax, table, Scale.of(table), kind, correlation=True, square=True)
        ax.invert_yaxis()
        ax.set(xlabel="noise level σ", ylabel="noise level σ")
        ax.set_title(f"{layer}\n{self._about(kind)}", loc="left", fontsize=8)
        return ax

    @themed
    def similarities(self, layers: str | Iterable[str] | None = None, *, kind: str = "cosine") -> Figure:
        """Draws `similarity` of many layers along depth, on one colour scale; each stage and resolution in a new line.

        Args:
            layers: Presets, names, globs, as in `probe`; None takes all that have the matrix.
            kind: "cosine" or "cka".

        Raises:
            GddlabError: `kind` was not measured, or a layer has no matrix.
        """
        import matplotlib.pyplot as plt

        matrices = _matrices(self, kind)
        names = self._pick(matrices, layers)
        groups = neighbours(rows_of(self.frame, names)["place"])
        columns = min(WIDEST, max(stop - start for _, start, stop in groups))
        ends = {(plain(s[0]), plain(s[-1])) for s in (_sigmas(self, kind, n) for n in names)}
        lines = [math.ceil((stop - start) / columns) for _, start, stop in groups]
        width, height = max(0.9 * columns + 1.3, 4.5), 1.02 * sum(lines) + 0.6
        figure, grid = plt.subplots(sum(lines), columns, squeeze=False, figsize=(width, height), layout="constrained")
        for ax in grid.flat:
            ax.set_axis_off()
        scale = Scale.of(np.concatenate([matrices[n].ravel() for n in names]))
        colours = scale.colours(correlation=True)
        size = min(6.0, 0.9 * 72 * width / (columns + 1.3) / 9)
        mesh: Any = None
        line = 0
        for (place, start, stop), count in zip(groups, lines, strict=True):
            for ax, name, title in zip(grid[line:].flat, names[start:stop], _titles(names[start:stop]), strict=False):
                ax.set_axis_on()
                # sns.heatmap draws the figure each time
                mesh = ax.imshow(matrices[name][::-1, ::-1], origin="lower", **colours)
                ax.set(xticks=[], yticks=[])
                ax.set_title(title, fontsize=size, pad=2)
            grid[line, 0].set_ylabel(place, fontsize=7)
            line += count
        figure.colorbar(mesh, ax=grid, shrink=min(1, 3 / height), aspect=18, anchor=(0, 1), label=kind)
        levels = "ascends" if len(ends) > 1 else "= {} (left, bottom) to {} (right, top)".format(*ends.pop())
        title = f"{kind} between noise levels: {self._about(kind)}; in each panel σ {levels}"
        figure.suptitle(title, x=0.01, ha="left")
        return figure


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
    ax = _layers_down(ax, frame, stat, table, rows_of(frame, table.index))
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
    correlation: bool = False,
    bar: dict[str, Any] | None = None,
    **more: Any,
) -> Any:
    """A seaborn heat map on `scale`, grey without a value; returns its mesh. The colour bar is drawn with a `label`."""
    import seaborn as sns

    ax.set_facecolor(MISSING)
    given = scale.colours(correlation=correlation) | more
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
    return mesh


def frozen_colours() -> Colormap:
    """From trained (orange) over half (white) to frozen (blue)."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("frozen", [TRAINED, "#F7F7F7", FROZEN])


def _layers_down(
    ax: Axes | None, frame: pd.DataFrame, stat: str, table: pd.DataFrame, rows: pd.DataFrame, shares: Any = None
) -> Axes:
    """Cells, names, strips and colour bar; `shares` are the frozen share of each row and of all parameters."""
    import seaborn as sns
    from matplotlib.patches import Patch

    ax = axes_of(ax, 7.5, max(2.5, INCH_PER_LAYER * len(rows) + 1.3))
    digits = 2 if table.columns.name == "sigma" else 6
    shown = table.set_axis(short_names(list(table.index))).set_axis([plain(c, digits) for c in table.columns], axis=1)
    scale, height = Scale.of(table), ax.get_window_extent().height / ax.figure.dpi
    ax.tick_params(axis="y", labelsize=NAME_SIZE)
    ax.tick_params(axis="x", labelsize=7.5)
    correlation = stat in CORRELATIONS
    label = stat_label(frame, stat, "" if correlation else scale.note)
    bar = {"shrink": min(1, 3 / height), "aspect": 18, "anchor": (0, 1)}
    room = max(height - 0.6, 0.3) * 72 / (1.1 * NAME_SIZE)  # names; the layout takes some height for labels and title
    every = math.ceil(len(rows) / room)
    draw_cells(ax, shown, scale, label, correlation=correlation, bar=bar, yticklabels=False)
    ax.set_yticks(np.arange(0, len(rows), every) + 0.5, shown.index[::every])  # after it was drawn: texts take longest
    if shares is not None:
        each, whole = shares
        strip = ax.inset_axes((1.01, 0, 0.025, 1))
        strip.set_facecolor(MISSING)
        look: dict[str, Any] = {"cmap": frozen_colours(), "vmin": 0, "vmax": 1, "linewidths": 0.4}
        sns.heatmap(each[:, None], ax=strip, cbar=False, xticklabels=False, yticklabels=False, **look)
        names = {FROZEN: f"frozen, {whole:.1%} of all parameters", TRAINED: "trained"}
        handles = [Patch(color=colour, label=name) for colour, name in names.items()]
        ax.legend(
            handles=handles, loc="lower right", bbox_to_anchor=(1.04, 1), ncols=2, borderaxespad=0.2, handlelength=1
        )
    mark_places(ax, rows, range(len(rows) + 1), "right", at=1.01 if shares is None else 1.05)
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


def _matrices(result: Probed, kind: str) -> dict[str, np.ndarray]:
    if kind in result.matrices:
        return result.matrices[kind]
    if not result.matrices:
        raise GddlabError(f'{kind!r} between noise levels was not measured: probe with stats="cosine"')
    raise unknown("similarity", kind, result.matrices)


def _sigmas(result: Probed, kind: str, layer: str) -> list[float]:
    """Noise levels of a matrix, ascending; a joined result also has others."""
    frame, size = result.frame, len(result.matrices[kind][layer])
    found = sorted(float(s) for s in frame.loc[(frame["stat"] == kind) & (frame["layer"] == layer), "sigma"])
    if len(found) != size:
        raise GddlabError(
            f"{kind} of {layer!r} is {size} x {size}, for {len(found)} noise levels: draw it before results are joined"
        )
    return found


def _titles(names: list[str]) -> list[str]:
    """What tells the layers of a group apart, short enough for a small panel."""
    short = [re.sub(r"(^|\.)\d+x\d+_", r"\1", n) for n in short_names(names)]
    return [n if len(n) <= 16 else "…" + n[-15:] for n in short]
