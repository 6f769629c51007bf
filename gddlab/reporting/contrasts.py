"""Arms of a question: means over training seeds, and the differences that it asks for, tested together."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from gddlab.errors import GddlabError
from gddlab.reporting.shown_tables import format_of
from gddlab.reporting.statistics import DIFFERENCE, LEVEL, corrected, difference, interval
from gddlab.reporting.style import draw_levels, fit_scale, log_ticks, look, seeds_text
from gddlab.reporting.tables import When, run_table
from gddlab.runs import Run
from gddlab.theme import GREY, themed

ARM = ("metric", "experiment", "frozen", "images", "seeds", "mean", "low", "high", "state")
PAIR = ("metric", "experiment", "against", "seeds", "seeds_against", *DIFFERENCE, "state")
TICKS = 6
"""Places that have ticks of their own on a log scale, at most."""
WIDEST = 4
"""Panels beside each other in a figure, at most."""


def arm_table(
    runs: Sequence[Run], rows: Sequence[str], *, metrics: Sequence[str] = ("fd-lite2",), at: When = None
) -> pd.DataFrame:
    """Each arm's mean over training seeds, with its 95 % interval by Student's t.

    Args:
        runs: Run directories.
        rows: Experiments, in this order.
        metrics: Scores, as for `run_table`.
        at: Thousands of images after which they count, of all arms or by arm; None for the end of each run.

    Returns:
        One row per score and arm: metric, experiment, frozen, images, seeds, mean, low, high, state. An arm of fewer
        than three seeds has no interval. `state` is "done" where every seed has the score, and says otherwise how many
        have it.

    Raises:
        GddlabError: Scores or trainers differ; seeds of an arm trained for different lengths, and `at` is None.
    """
    tables = []
    for metric in metrics:
        values = run_table(runs, metric, rows=rows, at=at)
        tables += [_arm(metric, values, arm) for arm in rows]
    return pd.DataFrame(tables, columns=[*ARM])


def _arm(metric: str, values: pd.DataFrame, arm: str) -> dict[str, Any]:
    own = values[values["experiment"] == arm]
    x, state = _sample(own, arm)
    low, high = interval(x)
    row = {
        "metric": metric,
        "experiment": arm,
        "frozen": own["frozen"].mean(),
        "images": own["images"].astype(float).mean(),
    }
    return row | {"seeds": len(x), "mean": x.mean() if len(x) else np.nan, "low": low, "high": high, "state": state}


def contrast_table(
    runs: Sequence[Run],
    pairs: Sequence[tuple[str, str]],
    *,
    metrics: Sequence[str] = ("fd-lite2",),
    at: When = None,
) -> pd.DataFrame:
    """Differences between arms, tested together.

    Intervals are of 95 %, by Welch's t, which does not take the variances as equal; they are not corrected. The effect
    size is Hedges' g: the difference over the pooled standard deviation, corrected for few seeds (Hedges 1981). A pair
    differs where it does by each of its scores: its p is the largest of theirs, 1 where they disagree in sign (Berger
    1982), and `p_holm` corrects it for all pairs of the table (Holm 1979). Arms of fewer than 5 seeds have no p.

    Args:
        runs: Run directories.
        pairs: Experiments, and what each is compared with, such as ("gdd-i", "gdd").
        metrics, at: As for `arm_table`.

    Returns:
        One row per score and pair: metric, experiment, against, seeds, seeds_against, difference, low, high, g, p,
        state, p_holm (of the pair).

    Raises:
        GddlabError: As for `arm_table`.
    """
    arms, rows = list(dict.fromkeys(itertools.chain.from_iterable(pairs))), []
    for metric in metrics if pairs else ():
        values = run_table(runs, metric, rows=arms, at=at)
        samples = {arm: _sample(values[values["experiment"] == arm], arm) for arm in arms}
        for arm, other in pairs:
            (x, own), (y, theirs) = samples[arm], samples[other]
            told = dict.fromkeys(f"{look(n).label}: {s}" for n, s in ((arm, own), (other, theirs)) if s != "done")
            row = {"metric": metric, "experiment": arm, "against": other, "seeds": len(x), "seeds_against": len(y)}
            rows.append(row | difference(x, y) | {"state": "; ".join(told) or "done"})
    return corrected(pd.DataFrame(rows, columns=[*PAIR]))


def _sample(own: pd.DataFrame, arm: str) -> tuple[np.ndarray, str]:
    """The values of an arm's seeds, and "done" or how many lack one and why."""
    scored = own[own["value"].notna()]
    if len(twice := scored["seed"][scored["seed"].duplicated()]):
        raise GddlabError(f"arm {arm!r} has two runs of seed {twice.iloc[0]}: give load_runs a folder that holds one")
    if len(lengths := sorted(scored["kimg"].unique())) > 1:
        ends = " and ".join(f"{kimg:g}" for kimg in lengths)
        raise GddlabError(f"runs of {arm!r} end at {ends} thousand images: give at=, when their scores count")
    why = "; ".join(own.loc[own["value"].isna(), "state"].unique())
    if why and len(scored):
        why = f"{len(scored)} of {len(own)} seeds; others: {why}"
    return scored["value"].to_numpy(float), why or "done"


def change_table(
    runs: Sequence[Run], rows: Sequence[str], *, metrics: Sequence[str], start: float, end: float
) -> pd.DataFrame:
    """How far each arm's scores move between two lengths of its own runs: means over seeds that have both.

    Args:
        runs, rows, metrics: As for `arm_table`.
        start, end: Thousands of images.

    Returns:
        As `arm_table`; `mean` is the score after `end` less that after `start`, with its 95 % interval over seeds.
    """
    tables = []
    for metric in metrics:
        early, late = (run_table(runs, metric, rows=rows, at=at) for at in (start, end))
        both = late.assign(value=late["value"] - early["value"])
        both["state"] = late["state"].where(late["value"].isna(), early["state"])
        tables += [_arm(metric, both, arm) for arm in rows]
    return pd.DataFrame(tables, columns=[*ARM])


def arm_text(arms: pd.DataFrame) -> pd.DataFrame:
    """A table from `arm_table` to look at with `styled`: text, a row per arm in words, a column per score."""
    out: dict[str, dict[str, str]] = {}
    r: Any
    for r in arms.itertuples():
        row = out.setdefault(look(str(r.experiment)).label, {"frozen": "", "seeds": "0", "state": r.state})
        row["frozen"] = f"{r.frozen:.1%}" if np.isfinite(r.frozen) else ""
        row["seeds"] = max(row["seeds"], str(r.seeds), key=int)
        row[f"{r.metric} (95 %)"] = _ranged(format_of(str(r.metric)), r.mean, r.low, r.high)
        row["state"] = row["state"] if r.state in ("done", row["state"]) else r.state
    table = pd.DataFrame.from_dict(out, orient="index").rename_axis("arm")
    return table.reindex(columns=[*(c for c in table if c != "state"), "state"])


def contrast_text(contrasts: pd.DataFrame) -> pd.DataFrame:
    """A table from `contrast_table` to look at with `styled`: text, a row per pair in words, two columns per score."""
    out: dict[str, dict[str, str]] = {}
    r: Any
    for r in contrasts.itertuples():
        shared = {"frozen": f"{r.frozen:.1%}"} if "frozen" in contrasts else {}
        row = out.setdefault(_pair(r), shared | {"state": r.state})
        row["state"] = row["state"] if r.state in ("done", row["state"]) else r.state
        row["seeds"] = f"{r.seeds} and {r.seeds_against}" if r.against else str(r.seeds)
        row[f"{r.metric} (95 %)"] = _ranged(format_of(str(r.metric)), r.difference, r.low, r.high)
        row[f"g, {r.metric}"] = f"{r.g:.1f}" if np.isfinite(r.g) else ""
        row["p, Holm"] = "" if np.isnan(r.p_holm) else "< 0.001" if r.p_holm < 0.001 else f"{r.p_holm:.3f}"
    table = pd.DataFrame.from_dict(out, orient="index").rename_axis("difference")
    return table.reindex(columns=[*(c for c in table if c not in ("p, Holm", "state")), "p, Holm", "state"])


def _pair(row: Any) -> str:
    """An arm, or an arm and what it is compared with, in words."""
    against = getattr(row, "against", "")
    return look(str(row.experiment)).label + (f" against {look(str(against)).label}" if against else "")


def _ranged(form: str, value: float, low: float, high: float) -> str:
    if not np.isfinite(value):
        return ""
    return form.format(value) + (f" ({form.format(low)} to {form.format(high)})" if np.isfinite(low) else "")


Levels = Mapping[str, Mapping[str, float]]
"""Score -> label -> value to compare with, such as the teacher's."""


@themed
def draw_arms(table: pd.DataFrame, *, levels: Levels | None = None, title: str | None = None) -> Figure:
    """Means of arms, or differences between them, with their 95 % intervals, a panel per score.

    Of differences, a line stands at 0; where they were tested, a dot is filled if p_holm < 0.05.

    Args:
        table: From `arm_table` or `contrast_table`, or another like them.
        levels: Score -> label -> value to compare with.
        title: What is drawn; None says over how many seeds.
    """
    between, tested = "against" in table, "p_holm" in table and table["p_holm"].notna().any()
    scored = table.assign(mean=table["difference"]) if between else table
    scored = scored[scored["mean"].notna()]
    scored = scored.assign(arm=[_pair(r) for r in scored.itertuples()])
    metrics, arms = (list(dict.fromkeys(scored[c])) for c in ("metric", "arm"))
    columns = max(1, min(len(metrics), WIDEST))
    shape = max(1, -(-len(metrics) // columns)), columns
    size = (3.8 + between + 2.4 * columns, (0.27 * len(arms) + 1.0) * shape[0] + 0.2)
    figure, panels = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False, sharey=True)
    for ax, metric in zip(panels.flat, metrics, strict=False):
        rows = scored[scored["metric"] == metric]
        r: Any
        for r in rows.itertuples():
            y, colour = arms.index(r.arm), look(str(r.experiment)).colour
            filled = not tested or r.p_holm < 1 - LEVEL
            ax.plot([r.low, r.high], [y, y], color=colour, linewidth=1.4)
            ax.plot(r.mean, y, "o", color=colour, fillstyle="full" if filled else "none", markersize=5)
        if between:
            ax.axvline(0, color=GREY, linewidth=0.8, zorder=0)
        draw_levels(ax, _of_panel(levels, metric), "x")
        if not between:
            fit_scale(ax, [*_ends(rows), *(levels or {}).get(metric, {}).values()], "x")
        ax.set(xlabel=f"{metric}, difference" if between else metric)
        ax.grid(axis="y", color="0.93", zorder=-1)
    panels[0][0].set_yticks(range(len(arms)), arms)
    panels[0][0].set_ylim(max(1, len(arms)) - 0.5, -0.5)  # the first at the top
    for ax in panels.flat[len(metrics) :]:
        ax.set_axis_off()
    _legend(figure, panels)
    means = "differences and 95 % intervals" if between else "means and 95 % intervals"
    title = title or f"{means} over {_seeds(scored)}{'; filled: p < 0.05, corrected' if tested else ''}"
    figure.suptitle(title, x=0.01, ha="left")
    return figure


@themed
def draw_dose(
    arms: pd.DataFrame,
    groups: Mapping[str, Sequence[str]],
    *,
    places: Mapping[str, float] | None = None,
    xlabel: str = "parameters frozen, %",
    log: bool = False,
    levels: Levels | None = None,
) -> Figure:
    """Scores over something that arms differ in: a panel per score, means with 95 % intervals over seeds.

    Args:
        arms: From `arm_table`.
        groups: Label -> experiments, which a line joins in the order of their places.
        places: Experiment -> its place on the horizontal axis; None for the share of the parameters that is frozen.
        xlabel: What the horizontal axis is.
        log: Whether it is logarithmic.
        levels: Score -> label -> value to compare with.
    """
    metrics = list(dict.fromkeys(arms["metric"]))
    columns = max(1, min(len(metrics), WIDEST))
    shape = max(1, -(-len(metrics) // columns)), columns
    size = (2.7 * shape[1] + 1.9, 2.7 * shape[0] + 0.4)
    figure, panels = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
    scored = arms[arms["mean"].notna()]
    colours = [look(names[-1]).colour for names in groups.values()]  # the first may be where all lines begin
    if len({*colours}) == 1 < len(colours):  # lines of one method, as by its learning rate
        colours = [*plt.get_cmap("viridis")(np.linspace(0, 0.85, len(colours)))]
    for ax, metric in zip(panels.flat, metrics, strict=False):
        rows = scored[scored["metric"] == metric].set_index("experiment")
        drawn, dots = list[float](), list[float]()
        for i, (label, names) in enumerate(groups.items()):
            own = rows.loc[[n for n in names if n in rows.index]]
            x = 100 * own["frozen"] if places is None else own.index.map(places).to_series(index=own.index)
            own, x = own.loc[x.sort_values().index], x.sort_values()
            drawn, dots = [*drawn, *_ends(own)], [*dots, *x]
            errors = [own["mean"] - own["low"], own["high"] - own["mean"]]
            bars: dict[str, Any] = {"marker": "osD^v"[i % 5], "capsize": 2, "elinewidth": 1, "color": colours[i]}
            ax.errorbar(x, own["mean"], yerr=errors, label=label, **bars)
        draw_levels(ax, _of_panel(levels, metric), "y")
        fit_scale(ax, [*drawn, *(levels or {}).get(metric, {}).values()], "y")
        ax.set(xlabel=xlabel, title=metric, xscale="log" if log else "linear")
        if log:
            at = sorted(set(dots))
            if len(at) <= TICKS:
                ax.set_xticks(at, [f"{x:g}" for x in at])
            else:
                log_ticks(ax, "x")
            ax.minorticks_off()
    for ax in panels.flat[len(metrics) :]:
        ax.set_axis_off()
    _legend(figure, panels)
    figure.suptitle(f"means and 95 % intervals over {_seeds(scored)}", x=0.01, ha="left")
    return figure


def _of_panel(levels: Levels | None, metric: str) -> dict[str, float]:
    """All levels that any score has, NaN where this one lacks it, so that each has the same dashes in all panels."""
    labels = dict.fromkeys(label for own in (levels or {}).values() for label in own)
    return {label: (levels or {}).get(metric, {}).get(label, np.nan) for label in labels}


def _ends(rows: pd.DataFrame) -> list[float]:
    """Means and ends of intervals; of means above 0 not those ends that are not, which would forbid a log scale."""
    values, least = rows[["mean", "low", "high"]].to_numpy(float).ravel(), rows["mean"].min()
    return [float(x) for x in values if np.isfinite(x) and (x > 0 or least <= 0)]


def _seeds(scored: pd.DataFrame) -> str:
    return seeds_text(scored["seeds"]) or "no seeds"


def _legend(figure: Figure, panels: Any) -> None:
    """What is named in any panel, once, beside them."""
    found: dict[str, Any] = {}
    for ax in panels.flat:
        handles, labels = ax.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    if found:
        figure.legend(list(found.values()), list(found), loc="outside right upper")
