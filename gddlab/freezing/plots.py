"""Figures of masks: blocks in the order of the network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gddlab.freezing.tables import NOWHERE, shares
from gddlab.probing.layers import kind_of
from gddlab.probing.plots.heatmaps import frozen_colours
from gddlab.probing.plots.rows import rows_of
from gddlab.probing.plots.scales import mark_places
from gddlab.theme import FROZEN, TRAINED, axes_of, themed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from gddlab.freezing.compare import MaskComparison
    from gddlab.freezing.mask import FreezeMask

INCH_PER_BLOCK = 0.2


@themed
def draw_mask(mask: FreezeMask, ax: Axes | None = None) -> Axes:
    import seaborn as sns

    frame = mask.to_frame()
    sizes = frame.assign(still=frame["size"].where(frame["frozen"], 0)).groupby("block", sort=False)
    table = 100 * sizes[["size", "still"]].sum() / mask.n_params
    ax = axes_of(ax, max(5.0, INCH_PER_BLOCK * len(table) + 1.5), 3.6)
    still, total = table["still"].sum(), table["size"].sum()
    look: dict[str, Any] = {"ax": ax, "saturation": 1, "width": 0.8, "linewidth": 0}
    sns.barplot(x=table.index, y=table["size"], color=TRAINED, label=f"trained, {total - still:.1f} %", **look)
    sns.barplot(x=table.index, y=table["still"], color=FROZEN, label=f"frozen, {still:.1f} %", **look)
    ax.set_xlim(-0.6, len(table) - 0.4)
    _label_blocks(ax, frame, -0.5)
    ax.set_ylabel("share of all parameters, %")
    ax.set_title(_title(mask), loc="left", pad=30)
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], ncols=2, loc="lower right", bbox_to_anchor=(1, 1.13), borderaxespad=0.2)
    return ax


@themed
def draw_comparison(comparison: MaskComparison, ax: Axes | None = None) -> Axes:
    import pandas as pd
    import seaborn as sns

    frames = {f"{name}  {100 * mask.fraction:.1f} %": mask.to_frame() for name, mask in comparison.masks.items()}
    table = 100 * pd.DataFrame({name: shares(frame, "block") for name, frame in frames.items()}).T
    ax = axes_of(ax, max(6.0, INCH_PER_BLOCK * table.shape[1] + 3.0), 0.3 * table.shape[0] + 1.9)
    bar = {"label": "frozen, % of\nthe block", "ticks": [0, 50, 100], "pad": 0.02, "aspect": 12}
    sns.heatmap(table, ax=ax, cmap=frozen_colours(), vmin=0, vmax=100, linewidths=0.6, cbar_kws=bar, yticklabels=True)
    _label_blocks(ax, next(iter(frames.values())), 0)
    ax.tick_params(length=0)
    ax.set_ylabel("")
    return ax


def _title(mask: FreezeMask) -> str:
    score, freeze = mask.arguments.get("score"), mask.arguments.get("freeze")
    if score is None:
        return mask.strategy
    if isinstance(score, dict):
        score = " ".join(f"{weight:+g} {stat}" for stat, weight in score.items())
    return f"{mask.strategy}: {score}, {freeze} first"


def _label_blocks(ax: Axes, frame: pd.DataFrame, first: float) -> None:
    """Names of blocks below, their stage and resolution above; blocks begin at `first` and are 1 wide."""
    blocks = frame.drop_duplicates("block").assign(layer=lambda f: f["block"], depth=0, n_params=0)
    blocks["stage"] = blocks["stage"].replace(NOWHERE, "")
    rows = rows_of(blocks, blocks["layer"])
    prefix = "model." if all(n.startswith("model.") for n in rows.index) else ""
    known = rows["resolution"].notna()
    names = [kind_of(n) if inside else n.removeprefix(prefix) for n, inside in zip(rows.index, known, strict=True)]
    ax.set_xticks([i + first + 0.5 for i in range(len(rows))], names, rotation=90, fontsize=7)
    ax.set_xlabel("")
    mark_places(ax, rows, [i + first for i in range(len(rows) + 1)], "top", at=1.02)
