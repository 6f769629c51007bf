"""Arms of a question against one of them: means with intervals, effect sizes, and p corrected for all comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from gddlab.errors import GddlabError
from gddlab.reporting.style import look
from gddlab.reporting.tables import run_table
from gddlab.runs import Run
from gddlab.theme import GREY, PALETTE, themed

LEVEL = 0.95
FIRST = ("metric", "experiment", "frozen", "seeds", "mean", "low", "high")
BETWEEN = ("difference", "difference_low", "difference_high", "g", "p")


def contrast_table(
    runs: Sequence[Run],
    rows: Sequence[str],
    *,
    against: str,
    metrics: Sequence[str] = ("fd-lite2",),
    at: float | None = None,
) -> pd.DataFrame:
    """Each arm's mean over training seeds, and its difference to one of them.

    Intervals are of 95 %, by Student's t over seeds; of a difference by Welch's, which does not take the variances as
    equal. The effect size is Hedges' g: the difference over the pooled standard deviation, corrected for few seeds
    (Hedges 1981). p is Welch's, two-sided, and `p_holm` is corrected for all arms and scores of the table (Holm 1979).

    Args:
        runs: Run directories.
        rows: Experiments, in this order.
        against: The one that others are compared with.
        metrics: Scores, as for `run_table`.
        at: Thousands of images after which they count; None for the end of each run.

    Returns:
        One row per score and arm: metric, experiment, frozen, seeds, mean, low, high, difference, difference_low,
        difference_high, g, p, p_holm, state. The arm compared with has no difference; an arm with one seed has a mean
        alone.

    Raises:
        GddlabError: The arm compared with has no score; scores or trainers differ.
    """
    arms = [*rows] if against in rows else [against, *rows]
    tables = [
        _contrasts(run_table(runs, metric, rows=arms, at=at), arms, against).assign(metric=metric) for metric in metrics
    ]
    out = pd.concat(tables, ignore_index=True)
    out["p_holm"] = holm(out["p"].to_numpy(float))
    return out[[*FIRST, *BETWEEN, "p_holm", "state"]]


def _contrasts(values: pd.DataFrame, arms: Sequence[str], against: str) -> pd.DataFrame:
    samples = {arm: values.loc[values["experiment"] == arm, "value"].dropna().to_numpy(float) for arm in arms}
    if len(samples[against]) == 0:
        raise GddlabError(f"{against!r}, which others are compared with, has no score: run it first")
    rows = []
    for arm in arms:
        x, own = samples[arm], values[values["experiment"] == arm]
        low, high = interval(x)
        row: dict[str, Any] = {"experiment": arm, "frozen": own["frozen"].mean(), "seeds": len(x)}
        row |= {"mean": x.mean() if len(x) else np.nan, "low": low, "high": high}
        row["state"] = "done" if len(x) else "; ".join(own["state"].unique())
        if arm != against:
            row |= difference(x, samples[against])
        rows.append(row)
    return pd.DataFrame(rows, columns=["experiment", "frozen", "seeds", "mean", "low", "high", *BETWEEN, "state"])


def interval(x: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a mean, by Student's t; NaN for fewer than two values."""
    from scipy.stats import t

    if len(x) < 2:
        return np.nan, np.nan
    half = t.ppf(0.5 + LEVEL / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return float(x.mean() - half), float(x.mean() + half)


def difference(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Difference of two means with Welch's interval and p, and Hedges' g; {} where one has fewer than two values."""
    from scipy.stats import ttest_ind

    if min(len(x), len(y)) < 2:
        return {}
    found = ttest_ind(x, y, equal_var=False)
    bounds = found.confidence_interval(LEVEL)
    n = len(x) + len(y) - 2
    pooled = np.sqrt(((len(x) - 1) * x.var(ddof=1) + (len(y) - 1) * y.var(ddof=1)) / n)
    gap = float(x.mean() - y.mean())
    g = gap / pooled * (1 - 3 / (4 * n - 1)) if pooled > 0 else np.nan
    return {
        "difference": gap,
        "difference_low": float(bounds.low),
        "difference_high": float(bounds.high),
        "g": float(g),
        "p": float(found.pvalue),
    }


def holm(p: np.ndarray) -> np.ndarray:
    """p corrected for all that are not NaN, step-down (Holm 1979)."""
    out = np.full(len(p), np.nan)
    order = [i for i in np.argsort(p) if np.isfinite(p[i])]
    least = 0.0
    for k, i in enumerate(order):
        least = max(least, min(1.0, (len(order) - k) * p[i]))
        out[i] = least
    return out


@themed
def draw_dose(
    contrasts: pd.DataFrame,
    groups: Mapping[str, Sequence[str]],
    *,
    levels: Mapping[str, Mapping[str, float]] | None = None,
) -> Figure:
    """Scores over the share of the parameters that is frozen: a panel per score, means with 95 % intervals over seeds.

    Args:
        contrasts: From `contrast_table`; its columns frozen, mean, low and high are drawn.
        groups: Label -> experiments, which a line joins in the order of their share.
        levels: Score -> label -> value to compare with.
    """
    metrics = list(dict.fromkeys(contrasts["metric"]))
    figure, panels = plt.subplots(
        1, len(metrics), figsize=(3.3 * len(metrics), 3.2), layout="constrained", squeeze=False
    )
    for ax, metric in zip(panels[0], metrics, strict=True):
        rows = contrasts[(contrasts["metric"] == metric) & contrasts["mean"].notna()].set_index("experiment")
        for (label, names), colour in zip(groups.items(), PALETTE, strict=False):
            own = rows.loc[[n for n in names if n in rows.index]].sort_values("frozen")
            errors = [own["mean"] - own["low"], own["high"] - own["mean"]]
            bars: dict[str, Any] = {"marker": "o", "capsize": 2, "elinewidth": 1, "color": colour}
            ax.errorbar(100 * own["frozen"], own["mean"], yerr=errors, label=label, **bars)
        for (label, value), style in zip((levels or {}).get(metric, {}).items(), ("--", ":", "-."), strict=False):
            ax.axhline(value, color=GREY, linewidth=1, linestyle=style, zorder=0)
            ax.annotate(label, (0.02, value), xycoords=("axes fraction", "data"), va="bottom", fontsize=8, color=GREY)
        ax.set(xlabel="parameters frozen, %", title=metric)
    panels[0][0].legend(loc="best")
    seeds = contrasts.loc[contrasts["mean"].notna(), "seeds"]
    if len(seeds):
        figure.suptitle(
            f"means and 95 % intervals over {seeds.min()} to {seeds.max()} training seeds", x=0.01, ha="left"
        )
    return figure


@themed
def draw_contrasts(contrasts: pd.DataFrame) -> Figure:
    """Differences to the arm compared with, and their 95 % intervals; a panel per score, filled where p_holm < 0.05."""
    rows = contrasts[contrasts["difference"].notna()]
    metrics = list(dict.fromkeys(rows["metric"]))
    arms = list(dict.fromkeys(rows["experiment"]))
    size = (2.2 + 2.6 * len(metrics), 0.28 * len(arms) + 1)
    figure, panels = plt.subplots(1, len(metrics), figsize=size, layout="constrained", squeeze=False, sharey=True)
    for ax, metric in zip(panels[0], metrics, strict=True):
        for r in rows[rows["metric"] == metric].itertuples():
            y, colour = arms.index(str(r.experiment)), look(str(r.experiment)).colour
            ax.plot([r.difference_low, r.difference_high], [y, y], color=colour, linewidth=1.4)
            ax.plot(r.difference, y, "o", color=colour, fillstyle="full" if r.p_holm < 1 - LEVEL else "none")
        ax.axvline(0, color=GREY, linewidth=1, zorder=0)
        ax.set(xlabel=f"difference in {metric}")
    panels[0][0].set_yticks(range(len(arms)), [look(arm).label for arm in arms])
    panels[0][0].invert_yaxis()
    return figure
