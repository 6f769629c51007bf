"""Runs as tables: by run, by experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from gddlab.reporting.run_summary import NOT_RUN, Summary, table_of
from gddlab.runs import Run

RUN_COLUMNS = ("seed", "strategy", "score", "freeze", "frozen", "images", "nfe", "kimg", "metric", "value", "state")

When = float | Mapping[str, float] | None
"""Thousands of images after which scores count, of all experiments or by experiment; None for the end of each run."""


def run_table(
    runs: Sequence[Run], metric: str = "fd-lite2", *, rows: Sequence[str] = (), at: When = None
) -> pd.DataFrame:
    """One row per run: experiment (the name of its folder's parent), seed, mask, and the student's score at the end.

    Args:
        runs: Run directories.
        metric: Name of the score, without its n; "kd-lite2:held-out" is against held-out images.
        rows: Experiments to show, in this order; one without any run is a row too. All that have runs for ().
        at: Thousands of images after which the score counts, of all experiments or by experiment; the end of each run
            for None and for those without one.

    Returns:
        Columns experiment, seed, strategy, score, freeze, frozen (share of all parameters), images (distinct real
        images trained on; where the run took all, as many as the score's reference has), nfe (network calls per image),
        kimg, metric, value, state. A run that is not finished, cannot be read or has no such score at its end has no
        value, and `state` says why; "not run" is an experiment without a run.

    Raises:
        GddlabError: The scores differ in n, extractor or reference; or there are neither runs nor rows.
    """
    return table_of(runs, rows, RUN_COLUMNS, lambda summary: [_row(summary, metric, at)])


def _row(summary: Summary, metric: str, when: When) -> dict[str, Any]:
    at = when.get(summary.run.run_dir.parent.name) if isinstance(when, Mapping) else when
    row: dict[str, Any] = {"state": summary.state_of(metric, at)}
    config, record = summary.config, summary.at_end(metric, at)
    if config is None:
        return row
    mask = config.mask
    about = mask.arguments if mask is not None else {}
    row |= {
        "seed": config.seed,
        "strategy": "none" if mask is None else mask.strategy,
        "score": about.get("score"),
        "freeze": about.get("freeze"),
        "frozen": 0.0 if mask is None else mask.fraction,
        "images": config.max_images,
        "nfe": 1 + len(config.mid_sigmas),
        "kimg": config.total_kimg if at is None else at,
    }
    if summary.state == "done" and record is not None:
        row |= {"record": record, "images": config.max_images or record.reference_n}
    return row


def experiment_table(runs: pd.DataFrame, *, sort: bool = False) -> pd.DataFrame:
    """One row per experiment.

    Args:
        runs: From `run_table`.
        sort: Lowest mean first; in the order of `runs` otherwise.

    Returns:
        Indexed by experiment: frozen, seeds (runs with a value), mean, sd (sample standard deviation over seeds;
        NaN for one), min, max, unfinished (runs without a value), state ("done", or why its runs have no value).
    """
    groups = runs.groupby("experiment", sort=False)
    out = groups.agg(
        frozen=("frozen", "mean"),
        seeds=("value", "count"),
        mean=("value", "mean"),
        sd=("value", "std"),
        min=("value", "min"),
        max=("value", "max"),
        unfinished=("state", lambda s: int((~s.isin(["done", NOT_RUN])).sum())),
        state=("state", lambda s: "; ".join(s[s != "done"].unique()) or "done"),
    )
    return out.sort_values("mean", kind="stable") if sort else out
