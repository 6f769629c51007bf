"""Distance over training: of several experiments, with all seeds; and against the number of distinct images."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from gddlab.files import atomic_path
from gddlab.reporting.run_summary import NOT_RUN, Same, read, select
from gddlab.reporting.style import WIDE, name_lines
from gddlab.reporting.tables import experiment_table
from gddlab.runs import Run
from gddlab.sampling import image_grid

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "PALETTE",
    "course_table",
    "draw_courses",
    "draw_efficiency",
    "draw_images",
    "draw_levels",
    "draw_metrics",
    "draw_runs",
    "figure_html",
    "fit_scale",
    "image_html",
    "save_figure",
]

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
"""Okabe and Ito's, colour-blind safe."""


def save_figure(figure: Any, path: str | Path, *, dpi: int = 150) -> None:
    """Writes a PNG atomically and frees the figure."""
    import matplotlib.pyplot as plt

    with atomic_path(path) as tmp:
        figure.savefig(tmp, format="png", dpi=dpi)
    plt.close(figure)


def figure_html(figure: Any, alt: str, *, dpi: int = 130) -> str:
    """A figure as an <img> with the picture inside, and frees it."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    width = round(figure.get_size_inches()[0] * 88)
    return _img(buffer.getvalue(), alt, f"max-width:100%;width:{width}px")


def image_html(pixels: np.ndarray, alt: str, *, scale: int = 2) -> str:
    """uint8 (H, W, 3) as an <img>, enlarged without smoothing."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return _img(buffer.getvalue(), alt, f"width:{pixels.shape[1] * scale}px;image-rendering:pixelated")


def _img(png: bytes, alt: str, style: str) -> str:
    from html import escape

    data = base64.b64encode(png).decode()
    return f'<img alt="{escape(alt)}" style="{style}" src="data:image/png;base64,{data}">'


def draw_metrics(metrics: pd.DataFrame, names: Mapping[str, str], *, ax: Axes | None = None, ylabel: str = "") -> Axes:
    """Columns of a run's metrics over kimg.

    Args:
        metrics: A row a tick, with `kimg`.
        names: Column -> label.
        ylabel: What is drawn.
    """
    ax = _axes(ax)
    for color, (name, label) in zip(COLORS, names.items(), strict=False):
        if name in metrics:
            shown = metrics.dropna(subset=[name])
            ax.plot(shown["kimg"], shown[name], color=color, label=label, linewidth=1.4)
    ax.set(xlabel="real images seen, thousands", ylabel=ylabel)
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def draw_images(images: Tensor, *, columns: int = 8, ax: Axes | None = None, title: str = "") -> Axes:
    """A grid of images, float [-1, 1], (N, C, H, W)."""
    ax = _axes(ax)
    ax.imshow(image_grid(images, columns=columns), interpolation="nearest")
    ax.set_axis_off()
    ax.set_title(title, fontsize=9)
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(5.2, 3.2), layout="constrained")[1]


PALETTE = (*COLORS, "#D55E00", "#56B4E9", "#000000")
"""Okabe and Ito's, without their yellow, which is hard to see on white."""


def course_table(runs: Sequence[Run], metric: str = "fd-lite2", *, rows: Sequence[str] = ()) -> pd.DataFrame:
    """Every score of a metric over the training of runs, finished or not.

    Args:
        runs: Run directories.
        metric: Name of the score, without its n.
        rows: Experiments to show, in this order; all that have runs for ().

    Returns:
        Columns experiment, seed, kimg (thousands of images seen), metric, value, state, by experiment, seed and kimg. A run without a score, and
        an experiment without a run, is one row without value.

    Raises:
        GddlabError: The scores differ in n, extractor or reference; or there are neither runs nor rows.
    """
    import pandas as pd

    same = Same()
    out: list[dict[str, Any]] = []
    for experiment, found in select(runs, rows).items():
        for run in found:
            reading = read(run)
            about = {"experiment": experiment, "seed": reading.config.seed if reading.config else None}
            scores = {r.kimg: same(r) for r in reading.records if r.name == metric and r.kimg}
            for kimg in sorted(k for k in scores if k is not None):
                record = scores[kimg]
                out.append(
                    about | {"kimg": kimg, "metric": record.metric, "value": record.value, "state": reading.state}
                )
            if not scores:
                out.append(about | {"state": reading.state_of(metric)})
        if not found:
            out.append({"experiment": experiment, "state": NOT_RUN})
    table = pd.DataFrame(out, columns=["experiment", "seed", "kimg", "metric", "value", "state"])
    return table.astype({"seed": "Int64", "kimg": "float64", "value": "float64"})


def draw_courses(
    courses: pd.DataFrame,
    *,
    levels: Mapping[str, float] | None = None,
    labels: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Distance over images seen: a line through the means of an experiment, a dot a seed, its name at the line's end.

    An axis is logarithmic where its values span more than a factor of five.

    Args:
        courses: From `course_table`.
        levels: Label -> value to compare with, such as the teacher's distances.
        labels: Experiment -> its name in the figure.
        ax: Where to draw; None makes a figure.
    """
    import matplotlib.pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    ends: list[tuple[float, str, Any]] = []
    missing: dict[str, str] = {}
    for i, (name, rows) in enumerate(courses.groupby("experiment", sort=False)):
        label = (labels or {}).get(str(name), str(name))
        shown = rows.dropna(subset=["value"])
        if not len(shown):
            missing[label] = "; ".join(rows["state"].unique())
            continue
        color = PALETTE[i % len(PALETTE)]
        means = shown.groupby("kimg")["value"].mean()
        style = "-" if i < len(PALETTE) else "--"
        ax.plot(means.index, means, style, color=color, linewidth=1.6)
        ax.plot(shown["kimg"], shown["value"], "o", color=color, markersize=3, alpha=0.55, markeredgewidth=0)
        ends.append((float(means.iloc[-1]), label, color))
    fit_scale(ax, list(courses["kimg"].dropna()), "x")
    if ends:
        ax.set_xlim(right=1.03 * courses["kimg"].max())
    fit_scale(ax, [*courses["value"].dropna(), *(levels or {}).values()], "y")
    draw_levels(ax, levels or {})
    ax.set_xlabel("real images seen, thousands")
    ax.set_ylabel(next(iter(courses["metric"].dropna()), "distance"))
    ax.spines[["top", "right"]].set_visible(False)
    _note(ax, missing)
    if ends:
        name_lines(ax, ends, size=8)
    return ax


def draw_efficiency(
    runs: pd.DataFrame, courses: pd.DataFrame, *, levels: Mapping[str, float] | None = None, width: float = 6.4
) -> Figure:
    """How few images are enough: distance against the number of distinct images, and over images seen for each of them.

    Args:
        runs: From `run_table`; its column `images` is drawn.
        courses: From `course_table`, of the same runs.
        levels: Label -> value to compare with.
        width: Of the figure, inches; narrow ones stack the panels.
    """
    import matplotlib.pyplot as plt

    stacked = width < WIDE
    figure, (left, right) = plt.subplots(
        *((2, 1) if stacked else (1, 2)), figsize=(width, 5.4 if stacked else 3.1), layout="constrained"
    )
    shown = runs.dropna(subset=["value", "images"])
    for i, (kimg, rows) in enumerate(shown.groupby("kimg")):
        means = rows.groupby("images")["value"].mean()
        about: dict[str, Any] = {"color": PALETTE[i % len(PALETTE)], "markersize": 4}
        left.plot(means.index.to_numpy(dtype=float), means, "-", label=f"{kimg:g} thousand images seen", **about)
        left.plot(rows["images"].to_numpy(dtype=float), rows["value"], "o", alpha=0.7, **about)
    if len(shown):
        counts = sorted({int(n) for n in shown["images"]})
        left.set_xscale("log")
        left.set_xticks(counts, [f"{n:,}" for n in counts], fontsize=8, rotation=45)
        left.minorticks_off()
        left.legend(frameon=False, fontsize=8)
    fit_scale(left, [*shown["value"], *(levels or {}).values()], "y")
    draw_levels(left, levels or {})
    left.set(xlabel="distinct real images", ylabel=next(iter(runs["metric"].dropna()), "distance"))
    left.spines[["top", "right"]].set_visible(False)
    empty = runs[runs["value"].isna()].drop_duplicates("experiment")
    _note(left, dict(zip(empty["experiment"], empty["state"], strict=True)))
    images = runs.dropna(subset=["images"]).groupby("experiment", sort=False)["images"].first()
    shared = images.duplicated(keep=False)
    labels = {
        str(name): f"{int(n):,} images" + (f", {name}" if twice else "")
        for (name, n), twice in zip(images.items(), shared, strict=True)
    }
    seen = courses[courses["value"].notna()]
    if len(seen):
        draw_courses(seen, labels=labels, ax=right)
    else:
        right.set_axis_off()
    return figure


def fit_scale(ax: Axes, values: Sequence[float], axis: str, *, zero: bool = True) -> None:
    """Makes an axis ("x" or "y") logarithmic where its values span more than a factor of five; else it begins at 0, if asked for."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if values and min(values) > 0 and max(values) > 5 * min(values):
        ax.set(**{f"{axis}scale": "log", f"{axis}lim": (0.8 * min(values), 1.25 * max(values))})
        ticks = ax.xaxis if axis == "x" else ax.yaxis
        ticks.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        ticks.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        ticks.set_minor_formatter(NullFormatter())
    elif values and zero:
        ax.set(**{f"{axis}lim": (min(0, *values), 1.05 * max(values))})


def draw_levels(ax: Axes, levels: Mapping[str, float]) -> None:
    """Dashed horizontal lines with their names and values at the left."""
    for label, value in levels.items():
        ax.axhline(value, color="#777777", linewidth=0.9, linestyle="--", zorder=0)
        ax.annotate(
            f"{label}: {value:.0f}",
            (0, value),
            (3, 2),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=8,
            color="#555555",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
        )


def _note(ax: Axes, states: Mapping[str, str]) -> None:
    """What could not be drawn and why, above the axes, where it covers nothing."""
    names: dict[str, list[str]] = {}
    for name, state in states.items():
        names.setdefault(state, []).append(name)
    text = "\n".join(fill(f"{state}: {', '.join(found)}", 44) for state, found in names.items())
    ax.set_title(text, loc="left", fontsize=7, color="#777777")


def draw_runs(
    runs: pd.DataFrame, *, levels: Mapping[str, float] | None = None, sort: bool = False, ax: Axes | None = None
) -> Axes:
    """Scores of all runs: a row an experiment, a dot a seed, a bar at the mean; logarithmic where they span more than a factor of five.

    Args:
        runs: From `run_table`.
        levels: Label -> value to compare with, such as the teacher's distance.
        sort: Lowest mean first; in the order of `runs` otherwise.
        ax: Where to draw; None makes a figure.
    """
    import matplotlib.pyplot as plt

    table = experiment_table(runs, sort=sort)
    order = list(table.index)
    if ax is None:
        _, ax = plt.subplots(figsize=(6.4, 0.27 * len(order) + 1.1), layout="constrained")
    shown = {name: runs.loc[runs["experiment"] == name, "value"].dropna() for name in order}
    fit_scale(ax, [*runs["value"].dropna(), *(levels or {}).values()], "x", zero=False)
    for i, (name, values) in enumerate(shown.items()):
        ax.plot(values, [i] * len(values), "o", color=PALETTE[0], markersize=5, alpha=0.8)
        if len(values):
            ax.plot([values.mean()] * 2, [i - 0.28, i + 0.28], color=PALETTE[1], linewidth=2.2)
        else:
            state = str(table.loc[name, "state"])
            ax.annotate(state, (0.02, i), xycoords=("axes fraction", "data"), fontsize=8, color="#777777", va="center")
    for j, (label, value) in enumerate((levels or {}).items()):
        ax.axvline(value, color="#777777", linewidth=0.9, linestyle="--", zorder=0)
        ax.annotate(
            f"{label}: {value:.0f}",
            (value, 1),
            (0, 3 + 10 * (j % 2)),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=8,
            color="#555555",
            ha="center",
        )
    ax.set_yticks(range(len(order)), order)
    ax.set_ylim(len(order) - 0.4, -0.6)
    metric = next(iter(runs["metric"].dropna()), "distance")
    ax.set_xlabel(f"{metric}\ndots: seeds, bar: mean")
    ax.grid(axis="y", color="0.92")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return ax
