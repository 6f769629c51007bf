"""Runs as tables: by run, by experiment, several scores side by side; beside published results; and their cost."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from pandas.io.formats.style import Styler
from pydantic import BeforeValidator, PositiveFloat, PositiveInt, StringConstraints

from gddlab.distill.parts import Settings
from gddlab.errors import GddlabError, NotFound, unknown
from gddlab.files import data_dir, path_of
from gddlab.reporting.run_summary import NOT_RUN, Summary, table_of, teacher_scores
from gddlab.reporting.style import checked, look
from gddlab.runs import Run
from gddlab.theme import PALETTE, axes_of, themed

LEVEL = 0.95
FEWEST = 3
"""Seeds from which a mean has an interval."""
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


def interval(x: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a mean, by Student's t; NaN for fewer than three values, whose interval says nothing."""
    from scipy.stats import t

    if len(x) < FEWEST:
        return np.nan, np.nan
    half = t.ppf(0.5 + LEVEL / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return float(x.mean() - half), float(x.mean() + half)


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


HEADS = {
    "frozen": "frozen parameters",
    "kimg": "thousand images seen",
    "value": "distance",
    "sd": "sd over seeds",
    "nfe": "network calls per image",
    "images": "distinct images",
    "trained": "parameters trained",
    "discriminator": "discriminator's, trained",
    "sec_per_kimg": "seconds per thousand images",
    "minutes": "training, minutes",
    "peak_mem_mib": "peak memory, MiB",
    "clip-fid": "CLIP-FID",
    "fid": "FID",
}
"""Column -> head with its unit; a column that is not here is its own head."""
FORMATS = (
    dict.fromkeys(("mean", "sd", "min", "max", "value", "sec_per_kimg", "minutes", "fd-"), "{:.1f}")
    | dict.fromkeys(("frozen", "share trained"), "{:.1%}")
    | dict.fromkeys(("kd-", "precision", "recall", "confidence", "class-chi2", "copying"), "{:.3f}")
    | {"fd-digits": "{:.2f}"}
    | dict.fromkeys(("fid", "clip-fid"), "{:.2f}")
    | {"kid": "{:.4f}", "kimg": "{:g}", "peak_mem_mib": "{:,.0f}"}
)
"""Column, or how its name begins -> format of its numbers; otherwise commas or three digits."""
STYLES: Any = [
    {"selector": "", "props": "border-collapse:collapse;font-size:.85rem"},
    {"selector": "caption", "props": "caption-side:top;text-align:left;max-width:46rem;padding:0 0 .5rem"},
    {"selector": "th, td", "props": "padding:.15rem .4rem;vertical-align:top"},
    {"selector": "th.col_heading", "props": "text-align:right;max-width:5.5rem;border-bottom:1px solid #888"},
    {"selector": "th.row_heading", "props": "text-align:left;font-weight:normal;white-space:nowrap"},
    {"selector": "th.index_name", "props": "text-align:left;border-bottom:1px solid #888"},
    {"selector": "td", "props": "text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums"},
]
WRAPPED = ";white-space:normal;max-width:16rem"


def styled(
    table: pd.DataFrame,
    caption: str = "",
    *,
    heads: Mapping[str, str] | None = None,
    formats: Mapping[str, str] | None = None,
) -> Styler:
    """A table to look at; its HTML and its text are the same each time, so that a notebook's output can be compared.

    Args:
        table: Numbers and text. Where it has a column `state`, empty cells of a row that was not run say so; the column
            itself is shown where it says more than that.
        caption: What is seen: n, extractor, seeds, unit.
        heads: Column -> head, beside `HEADS`.
        formats: Column, or how its name begins -> format, beside `FORMATS`.
    """
    state = table.get("state")
    told = state is None or not state.isin(["done", NOT_RUN]).all()
    shown = table if told else table.drop(columns="state")
    states = [NOT_RUN] * len(table) if state is None else list(state)
    heads, formats = HEADS | dict(heads or {}), FORMATS | dict(formats or {})
    columns: dict[str, list[str]] = {}
    text: dict[str, Any] = {}
    for name in shown.columns:
        head = heads.get(name, str(name))
        form = format_of(str(name), formats)
        columns[head] = [_written(v, form, s) for v, s in zip(shown[name], states, strict=True)]
        if not pd.api.types.is_numeric_dtype(shown[name].dtype):
            long = max(map(len, columns[head]), default=0) > 24
            text[head] = [{"selector": "th, td", "props": "text-align:left" + (WRAPPED if long else "")}]
    frame = pd.DataFrame(columns, index=shown.index)

    class Table(Styler):
        def __repr__(self) -> str:  # a Styler shows its address in memory
            return str(frame.to_string())

    out = Table(frame, uuid=hashlib.sha256(caption.encode()).hexdigest()[:8], cell_ids=False)
    out.format(escape="html").format_index(escape="html", axis=1).format_index(escape="html", axis=0)
    if caption:
        out.set_caption(escape(caption))
    out.set_table_styles(STYLES)
    out.set_table_styles(text, axis=0, overwrite=False)
    if isinstance(shown.index, pd.RangeIndex):
        out.hide(axis="index")
    return out


def format_of(name: str, formats: Mapping[str, str] = FORMATS) -> str:
    """The format of a column's numbers, or of a score's."""
    start = next((start for start in formats if name.startswith(start)), "")
    return formats.get(name) or formats.get(start, "{:.3g}")


def _written(value: Any, form: str, state: str) -> str:
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return NOT_RUN if state == NOT_RUN else "–"
    if hasattr(value, "__index__"):  # whole numbers, numpy's too
        return f"{value:,d}"
    return form.format(value)


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


COST_COLUMNS = ("experiment", "kimg", "sec_per_kimg", "peak_mem_mib", "parameters", "trained", "discriminator", "state")


def cost_table(study: pd.DataFrame) -> pd.DataFrame:
    """One row per experiment: the cost of a step of its training, without evaluation.

    Args:
        study: "costs", as `gddlab.load_study` gives it.

    Returns:
        Indexed by experiment: trained (parameters of the student), share trained (of all), discriminator (its trained
        parameters), sec_per_kimg (median over iterations, R1's share included), minutes (of the whole training),
        peak_mem_mib (of the process on a CPU, of the accelerator otherwise), state.

    Raises:
        GddlabError: Another table.
    """
    study = checked(study, COST_COLUMNS, "costs")
    out = pd.DataFrame(
        {
            "trained": study["trained"].astype("Int64"),
            "share trained": study["trained"] / study["parameters"],
            "discriminator": study["discriminator"].astype("Int64"),
            "sec_per_kimg": study["sec_per_kimg"],
            "minutes": study["sec_per_kimg"] * study["kimg"] / 60,
            "peak_mem_mib": study["peak_mem_mib"],
            "state": study["state"],
        }
    )
    return out.set_index(study["experiment"])
