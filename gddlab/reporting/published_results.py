"""Published results, and ours beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from pydantic import BeforeValidator, PositiveFloat, PositiveInt, StringConstraints

from gddlab.distill.parts import Settings
from gddlab.errors import GddlabError, NotFound, unknown
from gddlab.files import data_dir, path_of
from gddlab.reporting.run_summary import NOT_RUN, teacher_scores
from gddlab.reporting.statistics import interval
from gddlab.reporting.style import look
from gddlab.reporting.tables import experiment_table, run_table
from gddlab.runs import Run
from gddlab.theme import PALETTE, axes_of, themed

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class PublishedRow(Settings):
    """A row of published.csv."""

    method: Text
    dataset: Literal["cifar10", "afhqv2", "ffhq", "imagenet64"]
    conditional: Literal["true", "false"]
    nfe: PositiveInt
    metric: Text
    value: PositiveFloat
    images: Annotated[PositiveInt | None, BeforeValidator(lambda text: text or None)]
    source: Text
    note: str
    """What one must know to compare the value; mostly empty."""


SETTINGS = {
    "cifar10": "CIFAR-10",
    "cifar10_cond": "CIFAR-10 cond",
    "afhqv2": "AFHQv2 64",
    "ffhq": "FFHQ 64",
    "imagenet64": "ImageNet 64",
}
"""Published settings -> their names. ImageNet is conditional, AFHQv2 and FFHQ are not."""
OURS = "here"
"""Source of our rows."""
FIDS = {"fid-min3@50000": "", "fid@50000": ", one block"}
"""Our scores that may stand beside published FIDs, the least of three blocks of 50,000 images -> remark on them."""


def published(path: str | Path | None = None) -> pd.DataFrame:
    """Published results, one row per value.

    Args:
        path: A CSV file; None reads the one that ships with gddlab.

    Returns:
        Columns method, dataset, conditional, nfe (network calls per image), metric ("fid", "clip-fid"; at 50,000
        images), value, images (training images seen, NA where the source does not say), source, note (other values of
        the same, how it was read; "" where there is nothing to say).

    Raises:
        GddlabError: A column is missing or unknown, a value is not a positive number, or has no source.
        NotFound: No such file.
    """
    path = data_dir() / "published.csv" if path is None else path_of("path", path)
    if not path.is_file():
        raise NotFound(f"no such file: {path}")
    text, columns = pd.read_csv(path, dtype=str, keep_default_na=False), PublishedRow.model_fields
    if list(text.columns) != list(columns):
        raise GddlabError(f"{path.name} has the columns {list(text.columns)}: they must be {list(columns)}")
    rows = []
    for line, row in enumerate(text.itertuples(index=False), start=2):
        try:
            rows.append(PublishedRow(**dict(zip(columns, row, strict=True))).model_dump())
        except GddlabError as e:
            raise GddlabError(f"{path.name}, line {line}: {e}") from None
    table = pd.DataFrame(rows, columns=list(columns)).astype({"images": "Int64"})
    return table.assign(conditional=table["conditional"] == "true")


def main_table(
    results: pd.DataFrame,
    runs_by_setting: Mapping[str, Sequence[Run]],
    *,
    rows: Sequence[str] = ("gdd", "gdd-i"),
    teachers: Mapping[str, pd.DataFrame] | None = None,
    at: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """Methods against settings: published FIDs with their sources, ours in the rows below those of the same method.

    Distances on other features than Inception's stand in a column of their own, "digits", since they are no FID.

    Args:
        results: From `published`.
        runs_by_setting: A key of `SETTINGS` or "digits" -> runs.
        rows: Experiments to show; "not run" where there are none.
        teachers: A key as in `runs_by_setting` -> the study `teacher-steps`; without it, the teacher's scores are those
            on its card.
        at: A key as in `runs_by_setting` -> thousands of images after which its scores count; the end of each run
            where there is none.

    Returns:
        Text, indexed by method and source: network calls per image, digits, then one column per published setting.
        Published cells are FID, with a star where `results` has a note, or empty where no value was verified; ours are
        the mean over seeds and from three on its 95 % interval, "not run", or why there is no value; a score of only
        one block of 50,000 is marked.

    Raises:
        GddlabError: Unknown setting, or scores in one cell that cannot be compared.
    """
    studies, at = teachers or {}, at or {}
    for name in (*runs_by_setting, *studies):
        if name not in (*SETTINGS, "digits"):
            raise unknown("setting", name, (*SETTINGS, "digits"))

    def found(name: str, metrics: Sequence[str]) -> tuple[dict[str, tuple[str, str]], str]:
        return _ours(runs_by_setting.get(name, ()), metrics, rows, studies.get(name), at.get(name))

    digits, metric = found("digits", ("fd-lite2",))
    ours = {name: found(name, ("fid-min3", "fid"))[0] for name in SETTINGS}
    last = f"digits, {metric}"
    out: dict[tuple[str, str], dict[str, str]] = {}
    fids = results[results["metric"] == "fid"]
    for r in fids.itertuples():
        cell = out.setdefault((str(r.method), str(r.source)), {"network calls": ""})
        calls = dict.fromkeys([*filter(None, cell["network calls"].split(", ")), str(r.nfe)])
        cell["network calls"] = ", ".join(calls)
        conditional = f"{r.dataset}_cond" if r.conditional else ""
        cell[SETTINGS.get(conditional) or SETTINGS[str(r.dataset)]] = f"{r.value:.2f}{'*' if r.note else ''}"
    for name in ("teacher", *rows):
        method = "EDM" if name == "teacher" else look(name).label
        told = [own[name][1] for own in (digits, *ours.values())]
        cells = {"network calls": next(filter(None, told), ""), last: digits[name][0]}
        out[method, OURS] = cells | {SETTINGS[s]: ours[s][name][0] for s in SETTINGS}
    families = [method.partition(" (")[0] for method, _ in out]  # without what is said in parentheses
    index = sorted(out, key=lambda key: (families.index(key[0].partition(" (")[0]), key[1] == OURS))
    table = pd.DataFrame([out[key] for key in index], columns=["network calls", last, *SETTINGS.values()]).fillna("")
    return table.set_index(pd.MultiIndex.from_tuples(index, names=["method", "source"]))


def _ours(
    runs: Sequence[Run], metrics: Sequence[str], rows: Sequence[str], study: pd.DataFrame | None, at: float | None
) -> tuple[dict[str, tuple[str, str]], str]:
    """Cells and network calls of teacher and experiments by the first metric that a run has; and that metric."""
    tables = {metric: run_table(runs, metric, rows=rows, at=at) for metric in metrics}
    metric = next((m for m, t in tables.items() if t["value"].notna().any()), metrics[-1])
    table = tables[metric]
    named = next(iter(table["metric"].dropna()), metric)
    found = experiment_table(table)
    calls = table.groupby("experiment")["nfe"].first()
    out: dict[str, tuple[str, str]] = {}
    for name in rows:
        values = table.loc[table["experiment"] == name, "value"].dropna().to_numpy(float)
        cell = _cell(named, [values.mean(), *interval(values)]) if len(values) else str(found.loc[name, "state"])
        out[name] = cell, "" if calls.isna()[name] else str(calls[name])
    out["teacher"] = _teacher([r for r in runs if r.run_dir.parent.name in rows], named, study)
    return out, named


def _cell(metric: str, values: Sequence[float]) -> str:
    """A value, with its interval if there is one; what is no FID at 50,000 images is not written as one."""
    if metric.startswith("fid") and metric not in FIDS:
        return f"{metric}, not comparable"
    mean, *ends = (f"{value:.{2 if metric.startswith('fid') else 1}f}" for value in values if np.isfinite(value))
    return mean + (f" ({' to '.join(ends)})" if ends else "") + FIDS.get(metric, "")


def _teacher(runs: Sequence[Run], metric: str, study: pd.DataFrame | None) -> tuple[str, str]:
    """Cell and network calls of the teacher at its most steps: of the study, or of the card in the runs."""
    if study is not None:
        scored = study[study["steps"].notna()]
        for named in (metric, *FIDS) if metric.startswith("fid") else (metric,):
            if len(own := scored[scored["metric"] == named]):
                full: Any = own[own["steps"] == own["steps"].max()].iloc[0]
                return _cell(named, [full["value"]]), str(full["nfe"])
    scores = teacher_scores(runs, metric.partition("@")[0])
    if scores and not (metric.startswith("fid") and metric not in FIDS):
        steps = max(scores)
        return _cell(metric, [scores[steps]]), str(2 * steps - 1)
    return "" if runs else NOT_RUN, ""


@themed
def draw_published(results: pd.DataFrame, *, metric: str = "fid", ax: Axes | None = None) -> Axes:
    """Published scores against the training images seen, both logarithmic, where the source says how many.

    Args:
        results: From `published`.
        metric: "fid" or "clip-fid".
    """
    shown = results[(results["metric"] == metric) & results["images"].notna()]
    if not len(shown):
        raise GddlabError(f"no published {metric!r} says how many images were seen: accepted are 'fid', 'clip-fid'")
    ax = axes_of(ax, 4.6, 3.4)
    dots = shown.assign(millions=shown["images"].astype(float) / 1e6, dataset=shown["dataset"].map(SETTINGS))
    colours = list(PALETTE[: dots["dataset"].nunique()])
    look: dict[str, Any] = {"hue": "dataset", "style": "method", "palette": colours, "s": 50, "linewidth": 0}
    sns.scatterplot(dots, x="millions", y="value", ax=ax, **look)
    ax.set(xscale="log", yscale="log", xlabel="training images seen, millions", ylabel=f"{metric.upper()}, published")
    low, high = shown["value"].min() / 1.3, 1.3 * shown["value"].max()
    ticks = [t for t in (0.2, 0.5, 1, 2, 5, 10) if low <= t <= high]
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    ax.set_xticks([10, 100, 1000], ["10", "100", "1,000"])
    ax.minorticks_off()
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax
