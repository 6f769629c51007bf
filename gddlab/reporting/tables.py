"""Runs as tables: a row a run, a row an experiment, several scores side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gddlab.reporting.reading import NOT_RUN, Reading, Same, read, select
from gddlab.runs import Run

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["experiment_table", "run_table", "score_table"]

TYPES = {"seed": "Int64", "nfe": "Int64", "images": "Int64"}


def run_table(runs: Sequence[Run], metric: str = "fd-lite2", *, rows: Sequence[str] = ()) -> pd.DataFrame:
    """A row a run: experiment (the name of its folder's parent), seed, mask, and the student's score at the end.

    Args:
        runs: Run directories.
        metric: Name of the score, without its n.
        rows: Experiments to show, in this order; one without any run is a row too. All that have runs for ().

    Returns:
        Columns experiment, seed, strategy, score, freeze, frozen (share of all parameters), images (distinct real images trained on; where the run
        took all, as many as the score's reference has), nfe (network calls an image), kimg, metric, value, state. A run that is not finished, cannot
        be read or has no such score at its end has no value, and `state` says why; "not run" is an experiment without a run.

    Raises:
        GddlabError: The scores differ in n, extractor or reference, and cannot stand in one table; or there are neither runs nor rows.
    """
    import pandas as pd

    same = Same()
    out: list[dict[str, Any]] = []
    for experiment, found in select(runs, rows).items():
        for run in found:
            out.append(_row(read(run), metric, same))
        if not found:
            out.append({"experiment": experiment, "state": NOT_RUN})
    columns = [
        "experiment",
        "seed",
        "strategy",
        "score",
        "freeze",
        "frozen",
        "images",
        "nfe",
        "kimg",
        "metric",
        "value",
    ]
    table = pd.DataFrame(out, columns=[*columns, "state"])
    return table.astype(TYPES | dict.fromkeys(("frozen", "kimg", "value"), "float64"))


def _row(reading: Reading, metric: str, same: Same) -> dict[str, Any]:
    row: dict[str, Any] = {"experiment": reading.experiment, "state": reading.state_of(metric)}
    config = reading.config
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
        "kimg": config.total_kimg,
    }
    record = reading.at_end(metric)
    if reading.state == "done" and record is not None:
        same(record)
        row |= {"metric": record.metric, "value": record.value}
        row["images"] = config.max_images or record.reference_n
    return row


def experiment_table(runs: pd.DataFrame, *, sort: bool = False) -> pd.DataFrame:
    """A row an experiment.

    Args:
        runs: From `run_table`.
        sort: Lowest mean first; in the order of `runs` otherwise.

    Returns:
        Indexed by experiment: frozen, seeds (runs with a value), mean, sd (sample standard deviation over seeds; NaN for one), min, max,
        unfinished (runs without a value), state ("done", or what its runs without a value say).
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
            "unfinished": groups["state"].apply(lambda s: int((~s.isin(["done", NOT_RUN])).sum())),
            "state": groups["state"].apply(lambda s: "; ".join(s[s != "done"].unique()) or "done"),
        }
    )
    return out.sort_values("mean", kind="stable") if sort else out


def score_table(runs: Sequence[Run], metrics: Sequence[str], *, rows: Sequence[str] = ()) -> pd.DataFrame:
    """Several scores of the same students side by side: a row an experiment, means over seeds.

    Args:
        runs: Run directories.
        metrics: Names of the scores, without their n.
        rows: As for `run_table`.

    Returns:
        Indexed by experiment: a column a score, named with its n where there is one; state.

    Raises:
        GddlabError: As for `run_table`, for each score.
    """
    import pandas as pd

    parts: dict[str, pd.Series] = {}
    states: dict[str, pd.Series] = {}
    for metric in metrics:
        table = run_table(runs, metric, rows=rows)
        found = experiment_table(table)
        parts[next(iter(table["metric"].dropna()), metric)] = found["mean"]
        states[metric] = found["state"]
    out = pd.DataFrame(parts)
    out["state"] = [_together({m: s[name] for m, s in states.items()}) for name in out.index]
    return out


def _together(states: dict[str, str]) -> str:
    """What an experiment has come to, from what it has come to for each score."""
    missing = [m for m, s in states.items() if s == f"no {m} at the end"]
    other = dict.fromkeys(s for m, s in states.items() if m not in missing and s != "done")
    return "; ".join([*other, *([f"no {', '.join(missing)} at the end"] if missing else [])]) or "done"
