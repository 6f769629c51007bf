"""How every figure looks: one seaborn theme, one palette for colour-blind readers too; and how a figure is saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from gddlab.errors import GddlabError, shown
from gddlab.files import atomic_path

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#56b4e9", "#ca9161", "#949494")
"""seaborn's "colorblind" without its pale pink and its yellow, which white paper swallows."""
BLACK, GREY = "#000000", "#777777"
SEQUENTIAL, DIVERGING = "viridis", "vlag"
"""Colour maps: for values of one sign, and around 0."""
MISSING = "0.8"
"""Colour of cells without a value."""
NULLS = ("0.82", "0.7", "0.58")
"""Greys of null models, by kind; the first also of what chance would find."""
FROZEN, TRAINED = PALETTE[0], PALETTE[1]
"""Colours of frozen and of trained parameters."""
RESOLUTIONS = ("#86cfae", "#23907f", "#0f5560", "#0a3442", "#061c28")
"""One hue, darker from the largest resolution to the smallest, which nothing else in a figure has."""
OWN = {
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.title_fontsize": 8,
    "legend.frameon": False,
    "figure.titlesize": 9,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
"""Sizes in points, beside seaborn's style "ticks"."""

P = ParamSpec("P")
T = TypeVar("T")


def themed(draw: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function that returns `Axes` or a `Figure`: it draws in the theme, and no setting outlives it."""

    @wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> T:
        import seaborn as sns
        from matplotlib import rcParams

        look = sns.axes_style("ticks") | sns.plotting_context("paper") | OWN
        before = {key: rcParams[key] for key in look}  # a notebook's backend sets others while it draws
        rcParams.update(look)
        try:
            drawn: Any = draw(*args, **kwargs)
            figure = drawn.figure.canvas.figure
            for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
                axis.get_major_ticks(1)  # all later ticks are copies of the first, which must be made here
        finally:
            rcParams.update(before)
        return drawn

    return inside


def axes_of(ax: Axes | None, width: float, height: float) -> Axes:
    """`ax`, or the axes of a new figure, inches.

    A figure without a layout engine gets the constrained one, which makes room for names and colour bars.
    """
    import matplotlib.pyplot as plt

    if ax is None:
        return plt.subplots(figsize=(width, height), layout="constrained")[1]
    if not hasattr(ax, "spines"):
        raise GddlabError(f"ax={shown(ax)}: give matplotlib's Axes")
    ax.spines[["top", "right"]].set_visible(False)
    figure = ax.figure.canvas.figure
    if figure.get_layout_engine() is None:
        figure.set_layout_engine("constrained")
    return ax


def banded(ax: Axes, x: Any, y: Any, error: Any, **style: Any) -> None:
    """A line with a band of known errors; seaborn would need the samples that they come from."""
    ax.plot(x, y, **style)
    ax.fill_between(x, y - error, y + error, color=style["color"], alpha=0.2, linewidth=0)


def columns_over_kimg(ax: Axes, metrics: pd.DataFrame, names: Mapping[str, str], ylabel: str) -> None:
    """A line for each column of a run's metrics that is there, named by `names`, over thousands of images seen."""
    import seaborn as sns

    if shown := [name for name in names if name in metrics]:
        long = metrics.melt("kimg", shown).replace({"variable": dict(names)})
        colours = list(PALETTE[: len(shown)])
        sns.lineplot(long, x="kimg", y="value", hue="variable", estimator=None, palette=colours, ax=ax)
        ax.legend()
    ax.set(xlabel="real images seen, thousands", ylabel=ylabel)


def save_figure(drawn: Axes | Figure, path: str | Path, *, dpi: int = 150) -> None:
    """Writes a figure, or that of some axes, as a PNG atomically, and frees it."""
    import matplotlib.pyplot as plt

    figure = drawn.figure.canvas.figure
    with atomic_path(path) as tmp:
        figure.savefig(tmp, format="png", dpi=dpi)
    plt.close(figure)
