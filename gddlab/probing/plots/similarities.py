"""How like a layer's outputs are between noise levels: as lines to one of them, and as matrices of all."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from gddlab.errors import GddlabError, unknown
from gddlab.probing.plots.axes import (
    CROSSED,
    Probed,
    Scale,
    central,
    grey_bands,
    neighbours,
    plain,
    rows_of,
    short_names,
    sigma_axis,
)
from gddlab.probing.plots.heatmaps import draw_cells
from gddlab.sampling.schedules import nearest_level
from gddlab.theme import BLACK, GREY, PALETTE, axes_of, themed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("correlation", "cosine", "cka")
"""Similarities in the order in which one is taken where none is named."""
COLUMNS, WIDEST = 4, 13
"""Panels of lines, and of matrices, in a row."""


class Similarities(Probed):
    """Figures of the matrices of a `ProbeResult`; `kind` is "correlation", "cosine" or "cka".

    Without a `kind` they show the first of these that was measured.
    """

    @themed
    def similarities(
        self,
        layers: str | Iterable[str] | None = None,
        *,
        kind: str | None = None,
        at: float = 80.0,
        matrices: bool = False,
    ) -> Figure:
        """Draws how like each layer's outputs are to those at one noise level: a thin line per layer, in a panel per
        stage and resolution.

        Colours are kinds of layers, the most frequent first; black is the median of a panel. Null models are grey
        bands, from the 5th to the 95th percentile of the panel's layers and the draws.

        Args:
            layers: Presets, names, globs, as in `probe`; None takes all that have the matrix.
            kind: "correlation", "cosine" or "cka"; None takes the first of these that was measured.
            at: The noise level that others are compared with; the nearest one measured is taken.
            matrices: Draws `similarity` of each layer instead, all noise levels against all, on one colour scale; each
                stage and resolution begins a new line.

        Raises:
            GddlabError: `kind` was not measured, a layer has no matrix, or `at` is no noise level.
        """
        kind = _known(self, kind)
        names = self._pick(self.matrices[kind], layers)
        rows = rows_of(self.frame, names)
        if matrices:
            return _small_matrices(self, kind, rows)
        return _panels(self, kind, rows, at)

    @themed
    def similarity(self, layer: str, ax: Axes | None = None, *, kind: str | None = None) -> Axes:
        """Draws how like one layer's outputs are between all noise levels, which ascend to the right and up.

        Args:
            kind: As for `similarities`.

        Raises:
            GddlabError: `kind` was not measured, or not of `layer`, or not at all noise levels of a joined result.
        """
        import pandas as pd

        kind = _known(self, kind)
        found = self.matrices[kind]
        if not (isinstance(layer, str) and layer in found):
            raise unknown(f"layer with {kind} between noise levels", layer, found)
        names = [plain(s) for s in _sigmas(self, kind, layer)]
        ax = axes_of(ax, 4.8, 4.2)
        ax.tick_params(labelsize=7)
        table = pd.DataFrame(found[layer][::-1, ::-1], names, names)
        draw_cells(ax, table, Scale.of(table, "similarity"), kind, square=True)
        ax.invert_yaxis()
        ax.set(xlabel="noise level σ", ylabel="noise level σ")
        ax.set_title(f"{layer}\n{self._about(kind)}", loc="left", fontsize=8)
        return ax


def _known(result: Probed, kind: str | None) -> str:
    """The similarity to draw."""
    if "told" in result.meta:
        raise GddlabError(CROSSED)
    measured = [k for k in KINDS if k in result.matrices]
    if not result.matrices:
        wanted = repr(kind or KINDS[0])
        raise GddlabError(f"{wanted} between noise levels was not measured: probe with stats={wanted}")
    if kind is None and measured:
        return measured[0]
    if kind not in result.matrices:
        raise unknown("similarity", kind, result.matrices)
    return kind


def _sigmas(result: Probed, kind: str, layer: str) -> list[float]:
    """Noise levels of a matrix, ascending; a joined result also has others."""
    frame, size = result.frame, len(result.matrices[kind][layer])
    found = sorted(float(s) for s in frame.loc[(frame["stat"] == kind) & (frame["layer"] == layer), "sigma"])
    if len(found) != size:
        raise GddlabError(
            f"{kind} of {layer!r} is {size} x {size}, for {len(found)} noise levels: draw it before results are joined"
        )
    return found


def _panels(result: Probed, kind: str, rows: pd.DataFrame, at: float) -> Figure:
    """A panel per stage and resolution, a line per layer."""
    import matplotlib.pyplot as plt
    import pandas as pd
    from matplotlib.lines import Line2D

    lines, level = {}, math.nan
    for name in rows.index:
        sigmas = _sigmas(result, kind, name)
        level = nearest_level(sigmas, at)
        lines[name] = np.array(sigmas), result.matrices[kind][name][::-1, ::-1][sigmas.index(level)]
    colours = _colours(result, rows)
    places = list(dict.fromkeys(rows["place"]))
    lines_of_panels = math.ceil(len(places) / COLUMNS)
    columns = math.ceil(len(places) / lines_of_panels)
    shape, size = (lines_of_panels, columns), (max(2.4 * columns + 1.5, 5.6), 2.2 * lines_of_panels + 0.8)
    figure, grid = plt.subplots(*shape, sharex=True, sharey=True, squeeze=False, figsize=size, layout="constrained")
    for i, (ax, place) in enumerate(zip(grid.flat, places, strict=False)):
        here = rows.index[rows["place"] == place]
        ax.axvline(level, color=GREY, linewidth=0.8, linestyle=":", zorder=1)
        for name in here:
            ax.plot(*lines[name], color=colours[name][1], linewidth=0.8, alpha=0.8, zorder=2)
        if len(here) > 2 and len({len(lines[n][0]) for n in here}) == 1:
            middle = pd.DataFrame([lines[n][1] for n in here]).median()  # without a value: no warning, as of numpy
            ax.plot(lines[here[0]][0], middle, color=BLACK, linewidth=1.8, zorder=3)
        bands: dict[str, tuple[Any, Any]] = {}
        for null, draws in result.nulls.items():
            found = [r.matrices[kind][n][::-1, ::-1][_sigmas(r, kind, n).index(level)] for r in draws for n in here]
            bands[f"{null}: 90 % of layers"] = central(np.stack(found), 0)
        grey_bands(ax, lines[here[0]][0], bands)
        ax.set_title(f"{place or 'all'}: {len(here)} layer{'s' if len(here) > 1 else ''}", loc="left")
        sigma_axis(ax, lines[here[0]][0])
        ax.set_xlabel("noise level σ" if i + columns >= len(places) else "")
        ax.tick_params(labelbottom=i + columns >= len(places))
    for ax in list(grid.flat)[len(places) :]:
        ax.set_axis_off()
    low = min(float(np.nanmin(y, initial=0)) for _, y in lines.values())
    high = max(float(np.nanmax(y, initial=1)) for _, y in lines.values())  # an unbiased "cka" may be above 1
    for ax in grid.flat:
        ax.set_ylim(low - 0.03, high + 0.03)
        if low < 0:
            ax.axhline(0, color="0.4", linewidth=0.8, zorder=1)
    for ax in grid[:, 0]:
        ax.set_ylabel(f"{kind} with σ = {plain(level)}")
    counts = sorted(Counter(colours.values()).items(), key=lambda item: item[0][0] == "other")
    handles = [Line2D([], [], color=c, linewidth=1.6, label=f"{label} ({n})") for (label, c), n in counts]
    if any(line.get_linewidth() == 1.8 for ax in grid.flat for line in ax.lines):
        handles.append(Line2D([], [], color=BLACK, linewidth=1.8, label="median of the panel"))
    handles.append(Line2D([], [], color=GREY, linewidth=0.8, linestyle=":", label=f"σ = {plain(level)}"))
    handles += grid.flat[0].get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside right upper", title="kind of layer")
    values = [y for _, y in lines.values()]
    missing = sum(not np.isfinite(y).all() for y in values)
    note = f"; {missing} of {len(values)} layers without a value" if missing else ""
    figure.suptitle(f"{kind}: {result._about(kind)}{note}", x=0.01, ha="left")
    return figure


def _colours(result: Probed, rows: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Kind and colour of each layer, in the order of the network; too many kinds leave the rarest as "other"."""
    kinds = result.frame.drop_duplicates("layer").set_index("layer")["kind"][list(rows.index)]
    frequent = list(kinds.value_counts().index)
    rare = [] if len(frequent) <= len(PALETTE) else frequent[len(PALETTE) - 1 :]
    colour = dict(zip([k for k in dict.fromkeys(kinds) if k not in rare], PALETTE, strict=False))
    return {str(n): ("other", PALETTE[-1]) if k in rare else (k or "layer", colour[k]) for n, k in kinds.items()}


def _small_matrices(result: Probed, kind: str, rows: pd.DataFrame) -> Figure:
    """A panel per layer, all on one colour scale."""
    import matplotlib.pyplot as plt

    matrices, names = result.matrices[kind], list(rows.index)
    groups = neighbours(rows["place"])
    columns = min(WIDEST, max(stop - start for _, start, stop in groups))
    ends = {(plain(s[0]), plain(s[-1])) for s in (_sigmas(result, kind, n) for n in names)}
    lines = [math.ceil((stop - start) / columns) for _, start, stop in groups]
    width, height = max(0.9 * columns + 1.3, 4.5), 1.02 * sum(lines) + 0.6
    figure, grid = plt.subplots(sum(lines), columns, squeeze=False, figsize=(width, height), layout="constrained")
    for ax in grid.flat:
        ax.set_axis_off()
    colours = Scale.of(np.concatenate([matrices[n].ravel() for n in names]), "similarity").colours()
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
    title = f"{kind} between noise levels: {result._about(kind)}; in each panel σ {levels}"
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _titles(names: list[str]) -> list[str]:
    """What tells the layers of a group apart, short enough for a small panel."""
    short = [re.sub(r"(^|\.)\d+x\d+_", r"\1", n) for n in short_names(names)]
    return [n if len(n) <= 16 else "…" + n[-15:] for n in short]
