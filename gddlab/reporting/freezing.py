"""Which masks train well: runs of several masks and seeds as a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gddlab.errors import GddlabError
from gddlab.evaluation import compare, load_records
from gddlab.runs import Run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["draw_runs", "experiment_table", "run_table"]


def run_table(runs: Sequence[Run], metric: str = "fd-lite2") -> pd.DataFrame:
    """A row a run: experiment (the name of its folder's parent), seed, mask, and the student's distance at the end.

    Args:
        runs: Run directories.
        metric: Name of the distance, without its n.

    Returns:
        Columns experiment, seed, strategy, score, freeze, frozen (share of all parameters), kimg, metric, value, state; a
        run that is not finished, or has no such score at its end, has no value, and `state` says why.

    Raises:
        GddlabError: The scores differ in n, extractor or reference, and cannot stand in one table.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    first = None
    for run in runs:
        config = run.config
        mask = config.mask
        about = mask.arguments if mask is not None else {}
        row: dict[str, Any] = {
            "experiment": run.run_dir.parent.name,
            "seed": config.seed,
            "strategy": "none" if mask is None else mask.strategy,
            "score": about.get("score"),
            "freeze": about.get("freeze"),
            "frozen": 0.0 if mask is None else mask.fraction,
            "kimg": config.total_kimg,
            "metric": None,
            "value": float("nan"),
            "state": str(run.written_status.get("state", "not started")),
        }
        records = [r for r in load_records(run.run_dir) if r.name == metric and r.kimg == config.total_kimg]
        if row["state"] == "done" and not records:
            row["state"] = f"no {metric} at the end"
        for record in records[-1:]:
            if first is not None:
                compare(record, first)
            first = first or record
            row |= {"metric": record.metric, "value": record.value}
        rows.append(row)
    if not rows:
        raise GddlabError("no runs given: load them with gddlab.load_runs(folder)")
    return pd.DataFrame(rows)


def experiment_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row an experiment, nearest to the data first.

    Args:
        runs: From `run_table`.

    Returns:
        Indexed by experiment: frozen, seeds (runs with a value), mean, sd (sample standard deviation over seeds; NaN for one), min, max,
        unfinished (runs without a value).
    """
    import pandas as pd

    groups = runs.groupby("experiment", sort=False)
    out = pd.DataFrame(
        {
            "frozen": groups["frozen"].mean(),
            "seeds": groups["value"].count(),
            "mean": groups["value"].mean(),
            "sd": groups["value"].std(),
            "min": groups["value"].min(),
            "max": groups["value"].max(),
            "unfinished": groups["value"].apply(lambda v: int(v.isna().sum())),
        }
    )
    return out.sort_values("mean", kind="stable")


def draw_runs(runs: pd.DataFrame, *, lines: Mapping[str, float] | None = None, ax: Axes | None = None) -> Axes:
    """Distances of all runs: a row an experiment, a dot a seed, a bar at the mean.

    Args:
        runs: From `run_table`.
        lines: Label -> level to compare with, such as the teacher's distance.
        ax: Where to draw; None makes a figure.
    """
    import matplotlib.pyplot as plt

    from gddlab.reporting.figures import COLORS

    order = list(experiment_table(runs).index)
    if ax is None:
        _, ax = plt.subplots(figsize=(6.4, 0.36 * len(order) + 1.3), layout="constrained")
    for i, name in enumerate(order):
        values = runs.loc[runs["experiment"] == name, "value"].dropna()
        ax.plot(values, [i] * len(values), "o", color=COLORS[0], markersize=5, alpha=0.8)
        if len(values):
            ax.plot([values.mean()] * 2, [i - 0.28, i + 0.28], color=COLORS[1], linewidth=2.2)
        else:
            ax.annotate("not finished", (0.02, i), xycoords=("axes fraction", "data"), fontsize=8, va="center")
    for label, value in (lines or {}).items():
        ax.axvline(value, color="#777777", linewidth=0.9, linestyle="--", zorder=0)
        ax.annotate(
            f"{label}: {value:.0f}",
            (value, 1),
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=8,
            ha="center",
        )
    ax.set_yticks(range(len(order)), order)
    ax.set_ylim(len(order) - 0.4, -0.6)
    metric = next(iter(runs["metric"].dropna()), "distance")
    ax.set_xlabel(f"{metric} (lower is nearer to the data); dots: seeds, bar: mean")
    ax.grid(axis="y", color="0.92")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return ax
