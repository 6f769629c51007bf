"""Training: a run's metrics, and scores over the training and at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from gddlab.reporting.run_summary import Summary, table_of
from gddlab.reporting.statistics import FEWEST, interval
from gddlab.reporting.style import draw_levels, fit_scale, look, seeds_text
from gddlab.reporting.tables import experiment_table
from gddlab.runs import Run
from gddlab.theme import BLACK, GREY, PALETTE, axes_of, columns_over_kimg, themed

LINES = (*PALETTE, BLACK)
LINED = 5
"""Seeds up to which each has a line of its own, in place of bands."""
MARKERS = "osD^vP"
BESIDE: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
KIMG = "real images seen, thousands"


@themed
def draw_metrics(metrics: pd.DataFrame, names: Mapping[str, str], *, ax: Axes | None = None, ylabel: str = "") -> Axes:
    """Columns of a run's metrics over kimg.

    Args:
        metrics: One row per tick, with `kimg`.
        names: Column -> label.
        ylabel: What is drawn.
    """
    ax = axes_of(ax, 5.2, 3.2)
    columns_over_kimg(ax, metrics, names, ylabel)
    return ax


def curve_table(runs: Sequence[Run], metric: str = "fd-lite2", *, rows: Sequence[str] = ()) -> pd.DataFrame:
    """Every score of a metric over the training of runs, finished or not.

    Args:
        runs: Run directories.
        metric: Name of the score, without its n.
        rows: Experiments to show, in this order; all that have runs for ().

    Returns:
        Columns experiment, seed, kimg (thousands of images seen), metric, value, state, by experiment, seed and kimg.
        A run without a score, and an experiment without a run, is one row without value.

    Raises:
        GddlabError: The scores differ in n, extractor or reference; or there are neither runs nor rows.
    """
    return table_of(runs, rows, ("seed", "kimg", "metric", "value", "state"), lambda run: _scores(run, metric))


def _scores(summary: Summary, metric: str) -> list[dict[str, Any]]:
    """One row per score of a run, or one that says why there is none."""
    seed = summary.config.seed if summary.config else None
    scores = {float(r.kimg): r for r in summary.scores if r.label == metric and r.kimg}
    if not scores:
        return [{"seed": seed, "state": summary.state_of(metric)}]
    return [{"seed": seed, "kimg": k, "record": scores[k], "state": summary.state} for k in sorted(scores)]


@themed
def draw_curves(curves: pd.DataFrame, *, levels: Mapping[str, float] | None = None, ax: Axes | None = None) -> Axes:
    """Distance over images seen: the mean of each experiment, with its 95 % interval over training seeds.

    An axis is logarithmic where its values span more than a factor of five. The title says over how many seeds, and
    which experiments have no score, by what became of them.

    Args:
        curves: From `curve_table`.
        levels: Label -> value to compare with, such as the teacher's distances.
    """
    ax, levels = axes_of(ax, 6.4, 3.6), levels or {}
    looks = {name: look(str(name)) for name in curves["experiment"].unique()}
    curves = curves.assign(experiment=curves["experiment"].map({name: own.label for name, own in looks.items()}))
    shown = curves.dropna(subset=["value", "kimg"]).astype({"kimg": float})
    groups = shown.groupby(["experiment", "kimg"])
    each = "seed" in shown and groups.size().max() <= LINED
    if len(shown):
        others = iter(LINES * 9)  # for those without a colour of their own
        colours = {own.label: next(others) if own.sort == "other" else own.colour for own in looks.values()}
        labels = list(dict.fromkeys(shown["experiment"]))
        # lines of one colour differ in their markers
        same = {name: [x for x in labels if colours[x] == colours[name]].index(name) for name in labels}
        style: dict[str, Any] = {"palette": {x: colours[x] for x in labels}, "dashes": False, "markeredgewidth": 0}
        style |= {"style": "experiment", "markers": {x: MARKERS[same[x] % len(MARKERS)] for x in labels}, "ax": ax}
        sns.lineplot(shown, x="kimg", y="value", hue="experiment", errorbar=None if each else _band, **style)
        if each:
            for (label, _), own in shown.sort_values("kimg").groupby(["experiment", "seed"]):
                ax.plot(own["kimg"], own["value"], color=colours[str(label)], linewidth=0.6, alpha=0.6, zorder=1)
    fit_scale(ax, [*shown["value"], *levels.values()], "y")
    fit_scale(ax, shown["kimg"], "x")
    draw_levels(ax, levels, "y", told=True)
    ax.set(xlabel=KIMG, ylabel=next(iter(curves["metric"].dropna()), "distance"))
    seeds = seeds_text(groups.size())
    if seeds not in ("", "1 seed"):
        how = "thin: each seed" if each else f"band: 95 % interval, from {FEWEST} seeds on"
        seeds = f"mean over {seeds}; {how}"
    missing = curves.groupby("experiment", sort=False).filter(lambda rows: rows["value"].isna().all())
    states = missing.drop_duplicates(["experiment", "state"]).groupby("state", sort=False)["experiment"].agg(", ".join)
    absent = [fill(f"{state}: {names}", 60) for state, names in states.items()]
    ax.set_title("\n".join(filter(None, [seeds, *absent])), loc="left", fontsize=8)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(**BESIDE)
    return ax


def _band(values: pd.Series) -> tuple[float, float]:
    return interval(values.to_numpy(float))


@themed
def draw_runs(
    runs: pd.DataFrame, *, levels: Mapping[str, float] | None = None, sort: bool = False, ax: Axes | None = None
) -> Axes:
    """Scores of all runs: one row per experiment, one dot per seed, a bar at the mean.

    The axis is logarithmic where scores span more than a factor of five.

    Args:
        runs: From `run_table`.
        levels: Label -> value to compare with, such as the teacher's distance.
        sort: Lowest mean first; in the order of `runs` otherwise.
    """
    table = experiment_table(runs, sort=sort)
    order = list(table.index)
    ax = axes_of(ax, 6.4, 0.27 * len(order) + 1.3)
    how: dict[str, Any] = {"x": "value", "y": "experiment", "order": order, "ax": ax}
    sns.stripplot(runs, jitter=False, size=5, alpha=0.8, color=PALETTE[0], linewidth=0, **how)
    bar: dict[str, Any] = {"marker": "|", "markersize": 12, "markeredgewidth": 2, "color": PALETTE[1]}
    sns.pointplot(runs, errorbar=None, linestyle="none", **bar, **how)
    fit_scale(ax, [*runs["value"].dropna(), *(levels or {}).values()], "x")
    draw_levels(ax, levels or {}, "x", told=True)
    for i, name in enumerate(order):
        if not table.loc[name, "seeds"]:
            place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8}
            ax.annotate(str(table.loc[name, "state"]), (0.02, i), color=GREY, **place)
    ax.set(xlabel=next(iter(runs["metric"].dropna()), "distance"), ylabel="")
    ax.grid(axis="y", color="0.92")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.set_title(f"dots: {seeds_text(table['seeds'][table['seeds'] > 0])}, bar: mean", loc="left")
    if levels:
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.3)
    return ax
