"""Scores of many runs in one picture: a row an experiment, a dot a seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gddlab.reporting.courses import PALETTE, fit_scale
from gddlab.reporting.tables import experiment_table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["draw_runs"]


def draw_runs(
    runs: pd.DataFrame, *, levels: Mapping[str, float] | None = None, sort: bool = False, ax: Axes | None = None
) -> Axes:
    """Scores of all runs: a row an experiment, a dot a seed, a bar at the mean; logarithmic where they span more than a factor of five.

    Args:
        runs: From `run_table`.
        levels: Label -> value to compare with, such as the teacher's distance.
        sort: Lowest mean first; in the order of `runs` otherwise.
        ax: Where to draw; None makes a figure.
    """
    import matplotlib.pyplot as plt

    table = experiment_table(runs, sort=sort)
    order = list(table.index)
    if ax is None:
        _, ax = plt.subplots(figsize=(6.4, 0.27 * len(order) + 1.1), layout="constrained")
    shown = {name: runs.loc[runs["experiment"] == name, "value"].dropna() for name in order}
    fit_scale(ax, [*runs["value"].dropna(), *(levels or {}).values()], "x", zero=False)
    for i, (name, values) in enumerate(shown.items()):
        ax.plot(values, [i] * len(values), "o", color=PALETTE[0], markersize=5, alpha=0.8)
        if len(values):
            ax.plot([values.mean()] * 2, [i - 0.28, i + 0.28], color=PALETTE[1], linewidth=2.2)
        else:
            state = str(table.loc[name, "state"])
            ax.annotate(state, (0.02, i), xycoords=("axes fraction", "data"), fontsize=8, color="#777777", va="center")
    for j, (label, value) in enumerate((levels or {}).items()):
        ax.axvline(value, color="#777777", linewidth=0.9, linestyle="--", zorder=0)
        ax.annotate(
            f"{label}: {value:.0f}",
            (value, 1),
            (0, 3 + 10 * (j % 2)),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=8,
            color="#555555",
            ha="center",
        )
    ax.set_yticks(range(len(order)), order)
    ax.set_ylim(len(order) - 0.4, -0.6)
    metric = next(iter(runs["metric"].dropna()), "distance")
    ax.set_xlabel(f"{metric}\ndots: seeds, bar: mean")
    ax.grid(axis="y", color="0.92")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return ax
