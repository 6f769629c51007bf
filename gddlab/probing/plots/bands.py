"""Strips beside an axis of layers: resolution, stage, and what a mask freezes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from gddlab.errors import GddlabError
from gddlab.probing.plots.table import STAGES, Rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "FROZEN",
    "HUES",
    "LINES",
    "MARKERS",
    "POINTS",
    "TRAINED",
    "Mask",
    "bands",
    "beside",
    "frozen_shares",
    "frozen_strip",
    "hue",
]

HUES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, for resolutions from the largest down."""
LINES = {"enc": "-", "mid": ":", "dec": "--"}
MARKERS = {"enc": "o", "mid": "^", "dec": "s"}
FROZEN, TRAINED = "#0072B2", "#E69F00"
"""Okabe and Ito's blue and orange, as in the picture of a mask."""
GREYS = ("0.82", "0.66")
POINTS = 6.5
"""Size of layers' names."""
THICK, GAP = 0.19, 0.05
"""Of a strip and before it, inches."""
Side = Literal["right", "top"]


class Mask(Protocol):
    """What is read of a `FreezeMask`: that package comes after this one."""

    @property
    def frozen(self) -> Sequence[str]: ...

    @property
    def parameters(self) -> Sequence[tuple[str, Sequence[int]]]: ...


def hue(rank: int | None) -> str:
    """The colour of a resolution; grey where it is unknown."""
    return "#7F7F7F" if rank is None else HUES[rank % len(HUES)]


def bands(
    ax: Axes, rows: Rows, borders: Sequence[float], side: Side, *, start: float = GAP, coloured: bool = False
) -> float:
    """Draws resolution and stage of neighbouring layers, where they are known, and lines through the picture where they change.

    Args:
        borders: Ends of the layers on the axis, one more than layers, in data.
        start: Inches from the edge of the axes.
        coloured: In the colours of resolutions; else in greys.

    Returns:
        The inches from the edge at which the strips end.
    """
    groups = rows.groups()
    for g in groups[1:]:
        if side == "right":
            ax.axhline(borders[g.start], color="white", linewidth=1.4)
        else:
            ax.axvline(borders[g.start], color="0.6", linewidth=0.7, zorder=1)
    if any(r is not None for r in rows.resolutions):
        for i, g in enumerate(groups):
            colour = hue(rows.ranks[g.start]) if coloured else GREYS[i % 2]
            text = "" if g.resolution is None else str(g.resolution)
            _band(ax, side, (borders[g.start], borders[g.stop]), start, text, colour)
        start += THICK
    if any(rows.stages):
        for g in rows.groups(by_stage=True):
            text, turn = STAGES.get(g.stage, g.stage), 90 if side == "right" else 0
            _band(ax, side, (borders[g.start], borders[g.stop]), start, text, "0.93", rotation=turn)
        start += THICK
    return start


def frozen_shares(mask: Mask, rows: Rows) -> tuple[list[float], float]:
    """Frozen share of each layer's own and its children's parameters, NaN for a layer without; and of all parameters.

    Raises:
        GddlabError: The mask does not know a layer's parameters.
    """
    frozen, sizes = set(mask.frozen), {name: prod(shape) for name, shape in mask.parameters}
    out = []
    for name, count in zip(rows.names, rows.n_params, strict=True):
        mine = [n for n in sizes if n.startswith(name + ".")]
        if count and not mine:
            raise GddlabError(
                f"this mask has no parameters of layer {name!r}: give a mask of the network that was probed"
            )
        total = sum(sizes[n] for n in mine)
        out.append(sum(sizes[n] for n in mine if n in frozen) / total if total else np.nan)
    return out, sum(sizes[n] for n in frozen) / sum(sizes.values())


def frozen_strip(ax: Axes, shares: list[float], whole: float) -> float:
    """Beside each row the share of it that is frozen, from the left; a legend over the picture. Returns where the strip ends, inches."""
    from matplotlib.patches import Patch

    for i, share in enumerate(shares):
        split = GAP + THICK * (0.0 if np.isnan(share) else share)
        colour = "0.75" if np.isnan(share) else TRAINED
        _box(ax, "right", (i, i + 1), (split, GAP + THICK), facecolor=colour, linewidth=0)
        _box(ax, "right", (i, i + 1), (GAP, split), facecolor=FROZEN, linewidth=0)
        _box(ax, "right", (i, i + 1), (GAP, GAP + THICK), facecolor="none", edgecolor="white", linewidth=0.4)
    ax.legend(
        handles=[
            Patch(color=FROZEN, label=f"frozen, {whole:.1%} of all parameters"),
            Patch(color=TRAINED, label="trained"),
        ],
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=2,
        frameon=False,
        fontsize=8,
        borderaxespad=0.2,
        handlelength=1.2,
    )
    return GAP + THICK


def _band(
    ax: Axes, side: Side, along: tuple[float, float], start: float, text: str, colour: str, rotation: float = 0
) -> None:
    from matplotlib.colors import to_rgb

    from gddlab.probing.plots.labels import BandLabel

    _box(ax, side, along, (start, start + THICK), facecolor=colour, edgecolor="white", linewidth=0.8)
    middle, across = sum(along) / 2, start + THICK / 2
    at = (across, middle) if side == "right" else (middle, across)
    dark = np.dot(to_rgb(colour), (0.3, 0.59, 0.11)) < 0.5
    label = BandLabel(
        *at,
        text,
        ends=along,
        axis="y" if side == "right" else "x",
        rotation=rotation,
        ha="center",
        va="center_baseline",
        fontsize=7,
        color="white" if dark else "black",
        transform=beside(ax, side),
        clip_on=False,
    )
    ax.add_artist(label)


def _box(ax: Axes, side: Side, along: tuple[float, float], across: tuple[float, float], **style: Any) -> None:
    from matplotlib.patches import Rectangle

    (a, b), (c, d) = along, across
    corner, size = ((a, c), (b - a, d - c)) if side == "top" else ((c, a), (d - c, b - a))
    ax.add_patch(Rectangle(corner, *size, transform=beside(ax, side), clip_on=False, **style))


def beside(ax: Axes, side: Side, *, along: Any = None) -> Any:
    """Along the axis in data, or as `along` has it; across it in inches from its right or upper edge."""
    from matplotlib.transforms import ScaledTranslation, blended_transform_factory

    corner = (1, 0) if side == "right" else (0, 1)
    inches = ax.figure.dpi_scale_trans + ScaledTranslation(*corner, ax.transAxes)  # type: ignore[arg-type]
    if side == "right":
        return blended_transform_factory(inches, along or ax.transData)
    return blended_transform_factory(along or ax.transData, inches)
