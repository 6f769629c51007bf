"""Pictures of masks: blocks of the network along depth."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from gddlab.freezing.tables import NOWHERE, shares
from gddlab.probing.layers import kind_of
from gddlab.probing.plots.bands import FROZEN, TRAINED

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from gddlab.freezing.compare import MaskComparison
    from gddlab.freezing.mask import FreezeMask

__all__ = ["draw_comparison", "draw_mask"]

INCH_A_BLOCK = 0.2


def draw_mask(mask: FreezeMask, ax: Axes | None = None) -> Axes:
    import matplotlib.pyplot as plt

    frame = mask.to_frame()
    sizes = frame.assign(still=frame["size"].where(frame["frozen"], 0)).groupby("block", sort=False)
    table = 100 * sizes[["size", "still"]].sum() / mask.n_params
    below, above = table["still"], table["size"] - table["still"]
    if ax is None:
        _, ax = plt.subplots(figsize=(max(5.0, INCH_A_BLOCK * len(table) + 1.5), 3.6), layout="constrained")
    ax.bar(range(len(table)), below, color=FROZEN, label=f"frozen, {below.sum():.1f} %")
    ax.bar(range(len(table)), above, bottom=below, color=TRAINED, label=f"trained, {above.sum():.1f} %")
    ax.set_xlim(-0.6, len(table) - 0.4)
    ax.set_ylim(0, 1.15 * float(table["size"].max()))  # room for the bands and the legend
    _label_blocks(ax, frame, above=False)
    ax.set_ylabel("share of all parameters, %")
    ax.set_title(_title(mask), fontsize=9, loc="left")
    ax.legend(fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def draw_comparison(comparison: MaskComparison, ax: Axes | None = None) -> Axes:
    import matplotlib.pyplot as plt
    import pandas as pd
    from matplotlib.colors import LinearSegmentedColormap

    frames = {name: mask.to_frame() for name, mask in comparison.masks.items()}
    table = pd.DataFrame({name: shares(frame, "block") for name, frame in frames.items()}).T
    n_masks, n_blocks = table.shape
    if ax is None:
        size = (max(6.0, INCH_A_BLOCK * n_blocks + 3.0), 0.3 * n_masks + 1.9)
        _, ax = plt.subplots(figsize=size, layout="constrained")
    colours = LinearSegmentedColormap.from_list("frozen", [TRAINED, "#F7F7F7", FROZEN])
    mesh = ax.pcolormesh(
        range(n_blocks + 1), range(n_masks + 1), 100 * table.to_numpy(), cmap=colours, vmin=0, vmax=100
    )
    mesh.set(edgecolor="white", linewidth=0.6)
    ax.set_xlim(-0.1, n_blocks + 0.1)
    ax.set_ylim(n_masks, 0)
    names = [f"{name}  {100 * mask.fraction:.1f} %" for name, mask in comparison.masks.items()]
    ax.set_yticks([i + 0.5 for i in range(n_masks)], names, fontsize=8)
    _label_blocks(ax, next(iter(frames.values())), offset=0.5)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.02, fraction=0.05, aspect=12, ticks=[0, 50, 100])
    bar.set_label("frozen, % of\nthe block", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return ax


def _title(mask: FreezeMask) -> str:
    score, freeze = mask.arguments.get("score"), mask.arguments.get("freeze")
    if score is None:
        return mask.strategy
    if isinstance(score, dict):
        score = " ".join(f"{weight:+g} {stat}" for stat, weight in score.items())
    return f"{mask.strategy}: {score}, {freeze} first"


def _label_blocks(ax: Axes, frame: pd.DataFrame, *, offset: float = 0.0, above: bool = True) -> None:
    """Names of blocks below; stage and resolution at the upper edge, outside or inside, and lines between these."""
    blocks = frame.drop_duplicates("block")
    names = list(blocks["block"])
    where = [*zip(blocks["stage"].replace(NOWHERE, ""), blocks["resolution"].fillna(0), strict=True)]
    places = [f"{stage} {resolution or ''}".strip() for stage, resolution in where]
    prefix = "model." if all(n.startswith("model.") for n in names) else ""
    short = [kind_of(n) if resolution else n[len(prefix) :] for n, (_, resolution) in zip(names, where, strict=True)]
    ax.set_xticks([i + offset for i in range(len(names))], short, rotation=90, fontsize=7)
    start = 0
    for place, group in itertools.groupby(places):
        stop = start + len(list(group))
        if start:
            ax.axvline(start + offset - 0.5, color="0.35", linewidth=0.7)
        ax.text(
            (start + stop - 1) / 2 + offset,
            1.01 if above else 0.99,
            place if stop - start > 1 else place.replace(" ", "\n"),
            transform=ax.get_xaxis_transform(),
            ha="center",
            va="bottom" if above else "top",
            fontsize=7,
        )
        start = stop
