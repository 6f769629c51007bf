"""Arms of a question against one of them: means with intervals, effect sizes, and p corrected for all comparisons."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gddlab.errors import GddlabError
from gddlab.reporting.style import checked, fit_scale, look, seeds_text
from gddlab.reporting.tables import format_of, run_table
from gddlab.runs import Run
from gddlab.theme import GREY, themed

LEVEL = 0.95
FIRST = ("metric", "experiment", "frozen", "images", "seeds", "mean", "low", "high")
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
        One row per score and arm: metric, experiment, frozen, images, seeds, mean, low, high, difference,
        difference_low, difference_high, g, p, p_holm, state. The arm compared with has no difference; an arm with one
        seed has a mean alone.

    Raises:
        GddlabError: The arm compared with has no score; scores or trainers differ; seeds of an arm trained for
            different lengths, and `at` is None.
    """
    arms = [*rows] if against in rows else [against, *rows]
    tables = [
        _contrasts(run_table(runs, metric, rows=arms, at=at), arms, against).assign(metric=metric) for metric in metrics
    ]
    out = pd.concat(tables, ignore_index=True)
    out["p_holm"] = holm(out["p"].to_numpy(float))
    out = out[[*FIRST, *BETWEEN, "p_holm", "state"]]
    out.attrs["against"] = against
    return out


def _contrasts(values: pd.DataFrame, arms: Sequence[str], against: str) -> pd.DataFrame:
    samples = {arm: values.loc[values["experiment"] == arm, "value"].dropna().to_numpy(float) for arm in arms}
    if len(samples[against]) == 0:
        raise GddlabError(f"{against!r}, which others are compared with, has no score: run it first")
    rows = []
    for arm in arms:
        x, own = samples[arm], values[values["experiment"] == arm]
        low, high = interval(x)
        if len(lengths := sorted(own.loc[own["value"].notna(), "kimg"].unique())) > 1:
            ends = " and ".join(f"{kimg:g}" for kimg in lengths)
            raise GddlabError(f"runs of {arm!r} end at {ends} thousand images: give at=, when their scores count")
        row: dict[str, Any] = {"experiment": arm, "frozen": own["frozen"].mean(), "seeds": len(x)}
        row["images"] = own["images"].astype(float).mean()
        row |= {"mean": x.mean() if len(x) else np.nan, "low": low, "high": high}
        row["state"] = "done" if len(x) else "; ".join(own["state"].unique())
        if arm != against:
            row |= difference(x, samples[against])
        rows.append(row)
    return pd.DataFrame(rows, columns=[*FIRST[1:], *BETWEEN, "state"])


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


def followed_table(study: pd.DataFrame) -> pd.DataFrame:
    """The study "followed" as a table for `draw_dose`: means over seeds, with their 95 % intervals.

    Scores are "teacher's image found", the share of a student's images to which the teacher's image of the same noise
    is the nearest one, and "distance to it", in pixels, root mean square over [-1, 1].

    Raises:
        GddlabError: Another table.
    """
    names = {"retrieved": "teacher's image found", "pixel": "distance to it"}
    study = checked(study, ("experiment", "seed", "frozen", *names), "followed")
    rows = []
    for (column, name), (arm, own) in itertools.product(names.items(), study.groupby("experiment", sort=False)):
        x = own[column].to_numpy(float)
        low, high = interval(x)
        row = {"metric": name, "experiment": arm, "frozen": own["frozen"].mean(), "seeds": len(x), "mean": x.mean()}
        rows.append(row | {"low": low, "high": high, "state": "done"})
    return pd.DataFrame(rows)


def rewound_table(study: pd.DataFrame, into: str = "student") -> pd.DataFrame:
    """The study "rewound" as a table for `draw_arms`: what each score becomes when a group of layers is put back.

    Args:
        study: "rewound", as `gddlab.load_study` gives it.
        into: "student" for the teacher's weights in a student, "teacher" for the reverse.

    Returns:
        metric, experiment (the group; "none" is the network as it was, "all" the other one), frozen (the group's share
        of the squared movement of all weights), mean, difference (to "none"), state; one training seed, so that
        intervals and p are NaN.

    Raises:
        GddlabError: Another table.
    """
    study = checked(study, ("into", "group", "share", "metric", "value"), "rewound")
    own = study[study["into"] == into].rename(columns={"group": "experiment", "share": "frozen", "value": "mean"})
    whole = own[own["experiment"] == "none"].set_index("metric")["mean"]
    gap = own["mean"] - own["metric"].map(whole)
    out = own.assign(difference=gap.where(own["experiment"] != "none"), seeds=1, low=np.nan, high=np.nan)
    out = out.assign(p_holm=np.nan, state="done")
    out.attrs["against"] = "none"
    return out


def contrast_text(contrasts: pd.DataFrame) -> pd.DataFrame:
    """A table from `contrast_table` to look at with `styled`: text, indexed by score and arm, both in words."""
    rows = []
    r: Any
    for r in contrasts.itertuples():
        form = format_of(str(r.metric))
        rows.append(
            {
                "score": str(r.metric),
                "arm": look(str(r.experiment)).label,
                "frozen": f"{r.frozen:.1%}" if np.isfinite(r.frozen) else "",
                "seeds": str(r.seeds),
                "mean (95 %)": _ranged(form, r.mean, r.low, r.high),
                "difference (95 %)": _ranged(form, r.difference, r.difference_low, r.difference_high),
                "g": f"{r.g:.1f}" if np.isfinite(r.g) else "",
                "p, Holm": "" if np.isnan(r.p_holm) else "< 0.001" if r.p_holm < 0.001 else f"{r.p_holm:.3f}",
                "state": r.state,
            }
        )
    return pd.DataFrame(rows).set_index(["score", "arm"])


def _ranged(form: str, value: float, low: float, high: float) -> str:
    if not np.isfinite(value):
        return ""
    return form.format(value) + (f" ({form.format(low)} to {form.format(high)})" if np.isfinite(low) else "")


Levels = Mapping[str, Mapping[str, float]]
"""Score -> label -> value to compare with, such as the teacher's."""


@themed
def draw_arms(contrasts: pd.DataFrame, *, levels: Levels | None = None, title: str | None = None) -> Figure:
    """Means of arms with their 95 % intervals, a panel per score.

    A dot is filled where the arm differs from the one compared with, p_holm < 0.05; a line goes through the latter.

    Args:
        contrasts: From `contrast_table`, or another table like it.
        levels: Score -> label -> value to compare with.
        title: What is drawn; None says over how many seeds.
    """
    scored = contrasts[contrasts["mean"].notna()]
    metrics, arms = (list(dict.fromkeys(scored[c])) for c in ("metric", "experiment"))
    size = (3.8 + 2.4 * len(metrics), 0.27 * len(arms) + 1.2)
    figure, panels = plt.subplots(
        1, max(1, len(metrics)), figsize=size, layout="constrained", squeeze=False, sharey=True
    )
    for ax, metric in zip(panels[0], metrics, strict=False):
        rows = scored[scored["metric"] == metric]
        r: Any
        for r in rows.itertuples():
            y, colour = arms.index(str(r.experiment)), look(str(r.experiment)).colour
            differs = r.p_holm < 1 - LEVEL
            ax.plot([r.low, r.high], [y, y], color=colour, linewidth=1.4)
            ax.plot(r.mean, y, "o", color=colour, fillstyle="full" if differs else "none", markersize=5)
            if r.experiment == contrasts.attrs.get("against"):
                ax.axvline(r.mean, color=colour, linewidth=0.8, zorder=0)
        _levels(ax, levels, metric, "x")
        fit_scale(ax, [*rows["mean"], *(levels or {}).get(metric, {}).values()], "x")
        ax.set(xlabel=metric)
        ax.grid(axis="y", color="0.93", zorder=-1)
    panels[0][0].set_yticks(range(len(arms)), [look(arm).label for arm in arms])
    panels[0][0].invert_yaxis()
    _legend(figure, panels)
    title = title or f"means and 95 % intervals over {_seeds(scored)}; filled: differs, p < 0.05"
    figure.suptitle(title, x=0.01, ha="left")
    return figure


@themed
def draw_dose(
    contrasts: pd.DataFrame,
    groups: Mapping[str, Sequence[str]],
    *,
    places: Mapping[str, float] | None = None,
    xlabel: str = "parameters frozen, %",
    log: bool = False,
    levels: Levels | None = None,
) -> Figure:
    """Scores over something that arms differ in: a panel per score, means with 95 % intervals over seeds.

    Args:
        contrasts: From `contrast_table`.
        groups: Label -> experiments, which a line joins in the order of their places.
        places: Experiment -> its place on the horizontal axis; None for the share of the parameters that is frozen.
        xlabel: What the horizontal axis is.
        log: Whether it is logarithmic.
        levels: Score -> label -> value to compare with.
    """
    metrics = list(dict.fromkeys(contrasts["metric"]))
    columns = min(len(metrics), 4)
    shape = -(-len(metrics) // columns), columns
    size = (2.7 * shape[1] + 1.9, 2.7 * shape[0] + 0.4)
    figure, panels = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
    scored = contrasts[contrasts["mean"].notna()]
    for ax, metric in zip(panels.flat, metrics, strict=False):
        rows, drawn = scored[scored["metric"] == metric].set_index("experiment"), list[float]()
        for i, (label, names) in enumerate(groups.items()):
            own = rows.loc[[n for n in names if n in rows.index]]
            x = 100 * own["frozen"] if places is None else own.index.map(places).to_series(index=own.index)
            own, x = own.loc[x.sort_values().index], x.sort_values()
            drawn += list(own["mean"])
            errors = [own["mean"] - own["low"], own["high"] - own["mean"]]
            colour = look(names[-1]).colour  # the first may be where all lines begin
            bars: dict[str, Any] = {"marker": "osD^v"[i % 5], "capsize": 2, "elinewidth": 1, "color": colour}
            ax.errorbar(x, own["mean"], yerr=errors, label=label, **bars)
        _levels(ax, levels, metric, "y")
        fit_scale(ax, [*drawn, *(levels or {}).get(metric, {}).values()], "y")
        ax.set(xlabel=xlabel, title=metric, xscale="log" if log else "linear")
    for ax in panels.flat[len(metrics) :]:
        ax.set_axis_off()
    _legend(figure, panels)
    figure.suptitle(f"means and 95 % intervals over {_seeds(scored)}", x=0.01, ha="left")
    return figure


def _seeds(scored: pd.DataFrame) -> str:
    return seeds_text(scored["seeds"]) or "no seeds"


DASHES = ("--", ":", "-.")


def _levels(ax: Axes, levels: Levels | None, metric: str, axis: Literal["x", "y"]) -> None:
    """Grey lines at the levels of a score, each label in its own dashes in all panels."""
    names = list(dict.fromkeys(label for own in (levels or {}).values() for label in own))
    for label, value in (levels or {}).get(metric, {}).items():
        how: dict[str, Any] = {"color": GREY, "linewidth": 1, "zorder": 0, "label": label}
        (ax.axhline if axis == "y" else ax.axvline)(value, linestyle=DASHES[names.index(label) % len(DASHES)], **how)


def _legend(figure: Figure, panels: Any) -> None:
    """What is named in any panel, once, beside them."""
    found: dict[str, Any] = {}
    for ax in panels.flat:
        handles, labels = ax.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    if found:
        figure.legend(list(found.values()), list(found), loc="outside right upper")
