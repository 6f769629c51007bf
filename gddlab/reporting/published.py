"""Published results, each with its source; and ours beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gddlab.errors import GddlabError, NotFound, unknown
from gddlab.files import data_dir
from gddlab.reporting.networks import look
from gddlab.reporting.reading import NOT_RUN, teacher_scores
from gddlab.reporting.tables import experiment_table, run_table
from gddlab.runs import Run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["SETTINGS", "draw_published", "main_table", "published"]

COLUMNS = ("method", "dataset", "conditional", "nfe", "metric", "value", "images", "source")
SETTINGS = {
    "cifar10": "CIFAR-10",
    "cifar10_cond": "CIFAR-10 cond",
    "afhqv2": "AFHQv2 64",
    "ffhq": "FFHQ 64",
    "imagenet64": "ImageNet 64",
}
"""Published settings -> how they are called. ImageNet is conditional, AFHQv2 and FFHQ are not."""
OURS = "here"
"""Source of our rows."""
FIDS = {"fid-min3@50000": "", "fid@50000": ", one block"}
"""What ours must be to stand in the column of published FIDs, which are the least of three blocks of 50,000 images -> what is said of it."""


def published(path: str | Path | None = None) -> pd.DataFrame:
    """Published results, one value a row.

    Args:
        path: A CSV file; None reads the one that ships with gddlab.

    Returns:
        Columns method, dataset, conditional, nfe (network calls an image), metric ("fid", "clip-fid"; at 50,000 images), value, images (training images
        seen, NA where the source does not say), source.

    Raises:
        GddlabError: A column is missing or unknown, a value is not a positive number, or a value has no source.
        NotFound: No such file.
    """
    import pandas as pd

    path = data_dir() / "published.csv" if path is None else Path(path)
    if not path.is_file():
        raise NotFound(f"no such file: {path}")
    text = pd.read_csv(path, dtype=str, keep_default_na=False)
    if list(text.columns) != list(COLUMNS):
        raise GddlabError(f"{path.name} has the columns {list(text.columns)}: they must be {list(COLUMNS)}")
    kinds = {"cifar10", "afhqv2", "ffhq", "imagenet64"}
    for line, row in enumerate(text.to_dict("records"), start=2):
        where = f"{path.name}, line {line}"
        if empty := [c for c in COLUMNS if c != "images" and not row[c].strip()]:
            raise GddlabError(f"{where} has no {empty[0]}: every value needs one")
        if row["dataset"] not in kinds:
            raise GddlabError(f"{where}: {unknown('dataset', row['dataset'], sorted(kinds))}")
        if row["conditional"] not in ("true", "false"):
            raise GddlabError(f"{where}: conditional={row['conditional']!r}; give true or false")
        for name, whole in (("nfe", True), ("value", False), ("images", True)):
            if row[name] and not _positive(row[name], whole):
                raise GddlabError(
                    f"{where}: {name}={row[name]!r} is no {'whole number' if whole else 'number'} above 0"
                )
    return pd.DataFrame(
        {
            "method": text["method"],
            "dataset": text["dataset"],
            "conditional": text["conditional"] == "true",
            "nfe": text["nfe"].astype("int64"),
            "metric": text["metric"],
            "value": text["value"].astype("float64"),
            "images": pd.to_numeric(text["images"].replace("", None)).astype("Int64"),
            "source": text["source"],
        }
    )


def _positive(text: str, whole: bool) -> bool:
    try:
        return 0 < (int(text) if whole else float(text)) < float("inf")
    except ValueError:
        return False


def _setting(dataset: str, conditional: bool) -> str:
    return f"{dataset}_cond" if conditional and f"{dataset}_cond" in SETTINGS else dataset


def main_table(
    results: pd.DataFrame,
    runs_by_setting: Mapping[str, Sequence[Run]],
    *,
    rows: Sequence[str] = ("gdd", "gdd-i"),
    teachers: Mapping[str, pd.DataFrame] | None = None,
) -> pd.DataFrame:
    """Methods against settings: published FIDs with their sources, ours in the rows below those of the same method.

    Distances on other features than Inception's stand in a column of their own, "digits", since they are no FID.

    Args:
        results: From `published`.
        runs_by_setting: A key of `SETTINGS` or "digits" -> runs.
        rows: Experiments to show; "not run" where there are none.
        teachers: A key as in `runs_by_setting` -> the study `teacher-steps`; without it, the teacher's scores are those on its card.

    Returns:
        Text, indexed by method and source: network calls an image, digits, then a column a published setting. Published cells are FID, or empty where no value was verified; ours
        are the mean and range over seeds, "not run", or why there is no value; where only one block of 50,000 was scored, that is said.

    Raises:
        GddlabError: Unknown setting, or scores in one cell that cannot be compared.
    """
    import pandas as pd

    studies = teachers or {}
    for name in (*runs_by_setting, *studies):
        if name not in (*SETTINGS, "digits"):
            raise unknown("setting", name, (*SETTINGS, "digits"))
    digits, metric = _ours(runs_by_setting.get("digits", ()), ("fd-lite2",), rows, studies.get("digits"))
    ours = {
        name: _ours(runs_by_setting.get(name, ()), ("fid-min3", "fid"), rows, studies.get(name))[0] for name in SETTINGS
    }
    last = f"digits, {metric}"
    out: dict[tuple[str, str], dict[str, str]] = {}
    fids = results[results["metric"] == "fid"]
    for r in fids.itertuples():
        cell = out.setdefault((str(r.method), str(r.source)), {"network calls": ""})
        calls = dict.fromkeys([*filter(None, cell["network calls"].split(", ")), str(r.nfe)])
        cell["network calls"] = ", ".join(calls)
        cell[SETTINGS[_setting(str(r.dataset), bool(r.conditional))]] = f"{r.value:.2f}"
    for name in ("teacher", *rows):
        method = "EDM" if name == "teacher" else look(name).label
        cells = {"network calls": digits[name][1], last: digits[name][0]}
        out[method, OURS] = cells | {SETTINGS[s]: ours[s][name][0] for s in SETTINGS}
    order = list(dict.fromkeys(_family(method) for method, _ in out))
    index = sorted(out, key=lambda key: (order.index(_family(key[0])), key[1] == OURS))
    table = pd.DataFrame([out[key] for key in index], columns=["network calls", last, *SETTINGS.values()]).fillna("")
    return table.set_index(pd.MultiIndex.from_tuples(index, names=["method", "source"]))


def _family(method: str) -> str:
    """The method of a row without what is said in parentheses."""
    return method.partition(" (")[0]


def _ours(
    runs: Sequence[Run], metrics: Sequence[str], rows: Sequence[str], study: pd.DataFrame | None
) -> tuple[dict[str, tuple[str, str]], str]:
    """Cell and network calls of the teacher and of each experiment in one setting, by the first metric that a run has; and it with its n."""
    tables = {metric: run_table(runs, metric, rows=rows) for metric in metrics}
    metric = next((m for m, t in tables.items() if t["value"].notna().any()), metrics[-1])
    table = tables[metric]
    named = next(iter(table["metric"].dropna()), metric)
    found = experiment_table(table)
    calls = table.groupby("experiment")["nfe"].first()
    out: dict[str, tuple[str, str]] = {}
    for name in rows:
        row: Any = found.loc[name]
        values = [row["mean"], row["min"], row["max"]] if row["seeds"] > 1 else [row["mean"]]
        cell = _cell(named, values) if row["seeds"] else str(row["state"])
        out[name] = cell, "" if calls.isna()[name] else str(calls[name])
    out["teacher"] = _teacher([r for r in runs if r.run_dir.parent.name in rows], named, study)
    return out, named


def _cell(metric: str, values: Sequence[float]) -> str:
    """A value, or mean, least and greatest; what is no FID at 50,000 images is not written as one."""
    if metric.startswith("fid") and metric not in FIDS:
        return f"{metric}, not comparable"
    mean, *ends = (_number(v, metric) for v in values)
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


def _number(value: float, metric: str) -> str:
    return f"{value:.{2 if metric.startswith('fid') else 1}f}"


def draw_published(results: pd.DataFrame, *, metric: str = "fid", ax: Axes | None = None) -> Axes:
    """Published scores against the training images seen, both logarithmic; results whose source does not say how many are left out.

    Args:
        results: From `published`.
        metric: "fid" or "clip-fid".
        ax: Where to draw; None makes a figure.
    """
    import matplotlib.pyplot as plt

    from gddlab.reporting.courses import PALETTE

    shown = results[(results["metric"] == metric) & results["images"].notna()]
    if not len(shown):
        raise GddlabError(f"no published {metric!r} says how many images were seen: accepted are 'fid', 'clip-fid'")
    if ax is None:
        _, ax = plt.subplots(figsize=(3.4, 3.4), layout="constrained")
    dots: list[tuple[float, float, str, str]] = []
    for color, (dataset, rows) in zip(PALETTE, shown.groupby("dataset", sort=False), strict=False):
        millions = rows["images"].to_numpy(dtype=float) / 1e6
        ax.plot(millions, rows["value"], "o", color=color, markersize=5, label=SETTINGS[str(dataset)])
        dots += [(x, y, name, color) for x, y, name in zip(millions, rows["value"], rows["method"], strict=True)]
    ax.set(xscale="log", yscale="log", xlabel="training images seen, millions", ylabel=f"{metric.upper()}, published")
    ticks = [t for t in (0.2, 0.5, 1, 2, 5, 10) if shown["value"].min() / 1.3 <= t <= 1.3 * shown["value"].max()]
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    ax.set_xticks([10, 100, 1000], ["10", "100", "1,000"])
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=7, loc="upper left", handletextpad=0.1)
    ax.spines[["top", "right"]].set_visible(False)
    _name_dots(ax, dots)
    return ax


def _name_dots(ax: Axes, dots: Sequence[tuple[float, float, str, str]], size: float = 7) -> None:
    """Writes a name beside each dot (x, y, name, colour), on the first side where it covers neither a dot nor another name."""
    ax.figure.canvas.figure.draw_without_rendering()  # the layout says where the dots lie
    points = ax.transData.transform([(x, y) for x, y, *_ in dots]) * 72 / ax.figure.dpi
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in points]
    sides = [(4, 0, "left", "center"), (-4, 0, "right", "center"), (0, 4, "center", "bottom"), (0, -4, "center", "top")]
    for (x, y), (x_data, y_data, name, color) in zip(points, dots, strict=True):
        w, h = 0.6 * size * len(name), 1.1 * size
        boxes = []
        for dx, dy, ha, va in sides:
            left = x + dx - {"left": 0, "center": w / 2, "right": w}[ha]
            low = y + dy - {"bottom": 0, "center": h / 2, "top": h}[va]
            boxes.append((left, low, left + w, low + h))
        free = [not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in taken) for a in boxes]
        best = free.index(True) if True in free else 0
        dx, dy, ha, va = sides[best]
        taken.append(boxes[best])
        style: dict[str, Any] = {"textcoords": "offset points", "fontsize": size, "ha": ha, "va": va}
        ax.annotate(name, (x_data, y_data), (dx, dy), color=color, **style)
