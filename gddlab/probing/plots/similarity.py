"""Noise level by noise level: how alike a layer's outputs are at two of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from gddlab.errors import GddlabError, unknown
from gddlab.probing.plots.canvas import axes
from gddlab.probing.plots.scales import ColourScale, plain
from gddlab.probing.plots.table import about, pick, rows_of, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gddlab.probing.result import ProbeResult

__all__ = ["draw_similarities", "draw_similarity"]

SIDE, GAP, TITLE = 0.82, 0.08, 0.14
"""Of a small multiple, between two, and of its name, inches."""
LEFT, RIGHT, TOP, BOTTOM, BETWEEN = 0.35, 0.85, 0.62, 0.12, 0.1
"""Margins of the figure, and between groups of layers, inches."""
WIDEST = 13
"""Small multiples in a line, unless told otherwise."""


def draw_similarity(result: ProbeResult, layer: str, ax: Axes | None = None, *, kind: str = "cosine") -> Axes:
    """Similarities of one layer's outputs between all pairs of noise levels.

    Args:
        ax: Where to draw; None makes a figure.
        kind: "cosine" or "cka".

    Raises:
        GddlabError: `kind` was not measured, or not of `layer`, or not at all noise levels of a joined result.
    """
    from gddlab.probing.plots.labels import label_axis

    matrices = _matrices(result, kind)
    if layer not in matrices:
        raise unknown(f"layer with {kind} between noise levels", layer, matrices)
    sigmas = _sigmas(result, kind, layer)
    ax = axes(ax, 4.8, 4.2)
    scale = ColourScale.of(matrices[layer], correlation=True)
    image = _image(ax, matrices[layer], scale)
    for axis, rotation in ((ax.xaxis, 90), (ax.yaxis, 0)):  # the largest first
        at = range(len(sigmas))[::-1]
        label_axis(axis, at, [plain(sigmas[i]) for i in at], size=7, rotation=rotation)
    ax.set_xlabel("noise level σ", fontsize=9)
    ax.set_ylabel("noise level σ", fontsize=9)
    ax.set_title(layer, fontsize=8)
    scale.bar(image, _bar_label(kind, scale), ax=ax)
    return ax


def draw_similarities(
    result: ProbeResult,
    layers: str | Iterable[str] | None = None,
    *,
    kind: str = "cosine",
    columns: int | None = None,
    figure: Figure | None = None,
) -> Figure:
    """Similarities between noise levels of many layers, along depth, a new line for each stage and resolution.

    In each picture noise levels ascend to the right and upwards; all share one colour scale.

    Args:
        layers: Names or globs; None takes all that have the matrix.
        kind: "cosine" or "cka".
        columns: Pictures in a line; None takes up to 13.
        figure: Where to draw, over all of it; None makes one that fits the number of layers.

    Raises:
        GddlabError: `kind` was not measured, a layer is unknown, or `columns` is no positive number.
    """
    matrices = _matrices(result, kind)
    rows = rows_of(result.frame, pick([n for n in dict.fromkeys(result.frame["layer"]) if n in matrices], layers))
    groups = rows.groups()
    sizes = [g.stop - g.start for g in groups]
    if columns is None:  # as few as make the fewest lines
        columns = min(range(1, WIDEST + 1), key=lambda c: sum(math.ceil(n / c) for n in sizes))
    if isinstance(columns, bool) or not isinstance(columns, int) or columns < 1:
        raise GddlabError(f"columns={columns!r}: give a whole number of at least 1")
    sigmas = {(plain(s[0]), plain(s[-1])) for s in (_sigmas(result, kind, n) for n in rows.names)}
    lines = [math.ceil(n / columns) for n in sizes]
    step = SIDE + GAP
    width = max(LEFT + columns * step + RIGHT, 4.5)
    height = TOP + sum(lines) * (step + TITLE) + (len(groups) - 1) * BETWEEN + BOTTOM
    whole = np.array([width, height, width, height])
    if figure is None:
        import matplotlib.pyplot as plt

        figure = plt.figure(figsize=(width, height))
    font = min(1.0, *(figure.get_size_inches() / whole[:2]))  # the margins of a small figure shrink, so the text must
    scale = ColourScale.of(np.concatenate([matrices[n].ravel() for n in rows.names]), correlation=True)
    image: Any = None
    top = height - TOP
    for group, count in zip(groups, lines, strict=True):
        names = rows.names[group.start : group.stop]
        for i, (name, title) in enumerate(zip(names, _titles(names), strict=True)):
            corner = LEFT + i % columns * step, top - (i // columns + 1) * (step + TITLE) + GAP
            ax = figure.add_axes(tuple(np.array([*corner, SIDE, SIDE]) / whole))
            image = _image(ax, matrices[name], scale)
            ax.set_title(title, fontsize=6 * font, pad=2 * font)
            ax.set_xticks([])
            ax.set_yticks([])
        middle = top - count * (step + TITLE) / 2
        style: dict[str, Any] = {"rotation": 90, "fontsize": 8 * font, "ha": "center", "va": "center"}
        figure.text(0.15 / width, middle / height, group.label, **style)
        top -= count * (step + TITLE) + BETWEEN
    bar = min(3.0, height - TOP - TITLE - BOTTOM - GAP)
    corner = LEFT + columns * step + 0.12, height - TOP - TITLE - bar
    cax = figure.add_axes(tuple(np.array([*corner, 0.13, bar]) / whole))
    scale.bar(image, _bar_label(kind, scale), font=font, cax=cax)
    ends = "ascends" if len(sigmas) > 1 else "= {} (left, bottom) to {} (right, top)".format(*sigmas.pop())
    text = f"{kind} between noise levels: {about(result, kind)}\nin each σ {ends}"
    figure.text(LEFT / width, 1 - 0.08 / height, text, fontsize=9 * font, va="top")
    return figure


def _matrices(result: ProbeResult, kind: str) -> dict[str, np.ndarray]:
    if kind in result.matrices:
        return result.matrices[kind]
    if not result.matrices:
        raise GddlabError(f'{kind!r} between noise levels was not measured: probe with stats="cosine"')
    raise unknown("similarity", kind, result.matrices)


def _sigmas(result: ProbeResult, kind: str, layer: str) -> list[float]:
    """Noise levels of a matrix, ascending: a joined result has others too."""
    frame = result.frame
    found = sorted(float(s) for s in frame.loc[(frame["stat"] == kind) & (frame["layer"] == layer), "sigma"])
    if len(found) != len(result.matrices[kind][layer]):
        size = len(result.matrices[kind][layer])
        raise GddlabError(
            f"{kind} of {layer!r} is {size} x {size}, for {len(found)} noise levels: draw it before results are joined"
        )
    return found


def _image(ax: Axes, matrix: np.ndarray, scale: ColourScale) -> Any:
    """Noise levels ascend to the right and upwards."""
    return ax.imshow(scale.shown(matrix[::-1, ::-1]), norm=scale.norm, cmap=scale.colours, origin="lower")


def _bar_label(kind: str, scale: ColourScale) -> str:
    return f"{kind} ({scale.note})" if scale.note else kind


def _titles(names: list[str]) -> list[str]:
    """What tells the layers of a group apart, short enough for a small picture."""
    short = [re.sub(r"(^|\.)\d+x\d+_", r"\1", n) for n in short_names(names)]
    return [n if len(n) <= 16 else "…" + n[-15:] for n in short]
