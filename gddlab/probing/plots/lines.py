"""One statistic as lines over noise levels, or along depth: alone, at one noise level, or of teacher and student."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gddlab.errors import GddlabError, unknown
from gddlab.probing.plots.axes import (
    Probed,
    Scale,
    borders_of,
    central,
    grey_bands,
    mark_places,
    plain,
    rows_of,
    short_names,
    sigma_axis,
    stat_label,
    titled,
    unit_of,
    value_axis,
    wide,
    x_of,
)
from gddlab.sampling.schedules import nearest_level
from gddlab.theme import BLACK, NULLS, PALETTE, SEQUENTIAL, axes_of, banded, themed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

NAMED = len(PALETTE)
"""Up to this many layers, each has a colour and a name of its own."""
LEVELS = 5
"""Noise levels along depth where `at` names none."""
DASHES = {"enc": "-", "mid": ":", "dec": "--"}
MARKERS = {"enc": "o", "mid": "^", "dec": "s"}
NAME_SIZE = 6.5
"""Of layers' names, points."""


class Lines(Probed):
    """Figures of a `ProbeResult` with a line or a point per layer."""

    @themed
    def lines(
        self,
        stat: str,
        layers: str | Iterable[str] | None = None,
        ax: Axes | None = None,
        *,
        over: str = "sigma",
        at: float | Sequence[float] | None = None,
    ) -> Axes:
        """Draws one statistic over noise levels, one line per layer; or along depth, one line per noise level.

        Up to eight layers have a colour each and a band of one standard error over images. More are thin, in the
        colours of resolutions, with the median of each stage and resolution in bold. Encoders are solid, decoders
        dashed. Null models are grey bands behind: over noise levels from the 5th to the 95th percentile of the layers
        and draws, along depth the range over draws and the levels drawn.

        Args:
            layers: Presets, names, globs, as in `probe`; None takes all that have the statistic.
            over: What the x axis is, "sigma" or "depth".
            at: For "depth": the nearest measured noise levels are drawn; None takes five at equal steps of the grid.

        Raises:
            GddlabError: Unknown statistic or layer, `over` is something else, or `at` is no noise level or not used.
        """
        if over not in ("sigma", "depth"):
            raise unknown("over", over, ("sigma", "depth"))
        if over == "sigma" and at is not None:
            raise GddlabError(f'at={at!r} chooses noise levels of over="depth": omit it, or give over="depth"')
        table, sems = wide(self.frame, stat), wide(self.frame, stat, "sem")
        names = self._pick(table.index, layers)
        rows = rows_of(self.frame, names)
        table, sems = table.loc[names], sems.loc[names]
        note = "bands: standard error over images"
        if over == "depth":
            table = table[_chosen(table.columns, at)]
            ax = _depth_axes(ax, len(rows))
            _over_depth(ax, table, sems, rows)
            ranges = {f"{k}: range": (v.min((0, 2)), v.max((0, 2))) for k, v in self._of_nulls(stat, table).items()}
            grey_bands(ax, x_of(rows)[0], ranges)
        else:
            ax = axes_of(ax, 7.2, 4.0)
            if len(rows) <= NAMED:
                _few(ax, table, sems, rows)
            else:
                _many(ax, table, rows)
                note = "thin: single layers"
            middle = {f"{kind}: 90 % of layers": central(v, (0, 1)) for kind, v in self._of_nulls(stat, table).items()}
            grey_bands(ax, table.columns.to_numpy(), middle)
            sigma_axis(ax, table.columns)
            ax.set_xlabel(self._varied())
        ax.set_ylabel(stat_label(self.frame, stat, value_axis(ax, table, unit_of(self.frame, stat))))
        handles, labels = ax.get_legend_handles_labels()
        if over == "depth":  # drawn from the lowest level up, named from the top down
            handles, labels = handles[::-1], labels[::-1]
        ax.legend(handles, labels, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        title = titled(f"{stat}: {self._about(stat)}, {note}", table.to_numpy())
        if over == "depth":
            return along_depth(ax, rows, title, self._depth_of)
        ax.set_title(title, loc="left")
        return ax

    @themed
    def stem(self, stat: str, at: float = 80.0, ax: Axes | None = None) -> Axes:
        """Draws one statistic at one noise level, the nearest measured one to `at`, along depth with standard errors.

        Null models are grey bars behind, their range over draws.

        Raises:
            GddlabError: `stat` was not measured, or `at` is no noise level.
        """
        table = wide(self.frame, stat)
        sigma = nearest_level(map(float, table.columns), at)
        values, errors = table[sigma].to_numpy(), wide(self.frame, stat, "sem")[sigma].to_numpy()
        rows = rows_of(self.frame, table.index)
        ax = _depth_axes(ax, len(rows))
        scale = Scale.of(values, unit_of(self.frame, stat))
        floor = scale.neutral or (scale.low / 1.5 if scale.kind == "log" else 0.0)
        for x, y, e, colour, stage in zip(x_of(rows)[0], values, errors, rows["colour"], rows["stage"], strict=True):
            ax.vlines(x, floor, y, color=colour, linewidth=1.2, alpha=0.55)
            ax.errorbar(x, y, e, fmt=MARKERS.get(stage, "D"), color=colour, elinewidth=1, capsize=2)
        for shade, (kind, found) in zip(NULLS, self._of_nulls(stat, table[[sigma]]).items(), strict=False):
            ends = found.min((0, 2)), found.max((0, 2))
            ax.vlines(x_of(rows)[0], *ends, color=shade, linewidth=5, zorder=0, label=kind)
        if self.nulls:
            ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title="null models")
        ax.set_ylabel(stat_label(self.frame, stat, value_axis(ax, values, unit_of(self.frame, stat))))
        if scale.kind == "log" and not scale.neutral:
            ax.set_ylim(bottom=floor)
        text = f"{stat} at σ = {plain(sigma)}: {self._about(stat)}, bars: standard error over images"
        return along_depth(ax, rows, titled(text, values), self._depth_of)

    @themed
    def against(self, student: Probed, stat: str, at: float | None = None, ax: Axes | None = None) -> Axes:
        """Draws one statistic of this network, a teacher, and of its student, along depth.

        The teacher's range over all its noise levels is shown behind.

        Args:
            student: Result with the same layers.
            at: Noise level of both; each shows its nearest measured one. None takes the student's largest.

        Raises:
            GddlabError: `stat` was not measured in both, the layers differ, or `at` is no noise level.
        """
        sides = {"teacher": self, "student": student}
        tables = {who: wide(r.frame, stat) for who, r in sides.items()}
        for who, other in (("teacher", "student"), ("student", "teacher")):
            if alone := [n for n in tables[who].index if n not in tables[other].index]:
                count = f" ({len(alone)} such layers)" if len(alone) > 1 else ""
                found = f"the {who} has {stat} of {alone[0]!r}, the {other} has not{count}"
                raise GddlabError(f"{found}: probe both with the same layers=")
        theirs = tables["teacher"]
        wanted: Any = tables["student"].columns[-1] if at is None else at
        sigmas = {who: nearest_level(map(float, t.columns), wanted) for who, t in tables.items()}
        rows = rows_of(self.frame, theirs.index)
        x, _ = x_of(rows)
        ax = _depth_axes(ax, len(rows))
        low, high = theirs.min(axis=1).to_numpy(), theirs.max(axis=1).to_numpy()
        ax.use_sticky_edges = False  # the bars do not begin at the axis
        label = f"teacher, σ {plain(theirs.columns[0])} to {plain(theirs.columns[-1])}"
        ax.bar(x, high - low, 0.6 * min(np.diff(x).min(initial=1.0), 1.0), bottom=low, color="0.85", label=label)
        looks = {"teacher": ("o", BLACK), "student": ("D", PALETTE[3])}
        values = []
        for who, (marker, colour) in looks.items():
            values.append(tables[who].loc[rows.index, sigmas[who]].to_numpy())
            sem = wide(sides[who].frame, stat, "sem").loc[rows.index, sigmas[who]]
            label = f"{who}, σ = {plain(sigmas[who])}"
            ax.errorbar(x, values[-1], sem, fmt=marker, color=colour, elinewidth=1, zorder=3, label=label)
        ax.vlines(x, values[0], values[1], color=looks["student"][1], linewidth=1, alpha=0.7, zorder=2)
        note = value_axis(ax, np.concatenate([*values, low, high]), unit_of(self.frame, stat))
        ax.set_ylabel(stat_label(self.frame, stat, note))
        ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        text = f"{stat}: teacher ({self._about(stat)}), student ({student._about(stat)}); bars: standard error"
        return along_depth(ax, rows, titled(text, np.stack(values, axis=1)), self._depth_of)


def _few(ax: Axes, table: pd.DataFrame, sems: pd.DataFrame, rows: pd.DataFrame) -> None:
    """A colour and a name for each layer."""
    for colour, name, layer in zip(PALETTE, short_names(list(rows.index)), rows.index, strict=False):
        stage = rows.loc[layer, "stage"]
        look: dict[str, Any] = {"linestyle": DASHES.get(stage, "-"), "marker": MARKERS.get(stage, "D")}
        banded(ax, table.columns.to_numpy(), table.loc[layer], sems.loc[layer], label=name, color=colour, **look)


def _many(ax: Axes, table: pd.DataFrame, rows: pd.DataFrame) -> None:
    """Thin lines, and the median of each stage and resolution."""
    import seaborn as sns

    counts = rows["place"].value_counts()
    names = {p: f"{p}: median of {counts[p]}".removeprefix(": ") for p in dict.fromkeys(rows["place"])}
    long = table.melt(ignore_index=False).reset_index()
    long["place"] = long["layer"].map(rows["place"]).map(names)
    first = rows.assign(name=rows["place"].map(names)).drop_duplicates("name").set_index("name")
    look: dict[str, Any] = {"x": "sigma", "y": "value", "hue": "place", "style": "place", "ax": ax}
    look |= {"palette": dict(first["colour"]), "dashes": {n: _dash(s) for n, s in first["stage"].items()}}
    sns.lineplot(long, units="layer", estimator=None, linewidth=0.8, alpha=0.75, legend=False, **look)
    markers = {n: MARKERS.get(s, "D") for n, s in first["stage"].items()}
    sns.lineplot(
        long, estimator="median", errorbar=None, linewidth=2, zorder=3, markers=markers, markeredgewidth=0, **look
    )


def _dash(stage: str) -> Any:
    """As seaborn takes it: lengths of dashes and gaps."""
    return {"-": "", ":": (1, 1), "--": (4, 1.5)}[DASHES.get(stage, "-")]


def _over_depth(ax: Axes, table: pd.DataFrame, sems: pd.DataFrame, rows: pd.DataFrame) -> None:
    import seaborn as sns

    shades = sns.color_palette(SEQUENTIAL, table.shape[1] + 1)  # the last shade would be lost on white
    for sigma, shade, marker in zip(table.columns, shades, "osD^vP*X" * 9, strict=False):
        look: dict[str, Any] = {"color": shade, "marker": marker, "linewidth": 1.1, "markersize": 3.5}
        banded(ax, x_of(rows)[0], table[sigma], sems[sigma], label=f"σ = {plain(sigma)}", **look)


def _chosen(measured: Iterable[Any], at: float | Sequence[float] | None) -> list[float]:
    """Noise levels to draw, ascending."""
    measured = list(measured)
    if at is None:
        return [measured[i] for i in sorted({round(s) for s in np.linspace(0, len(measured) - 1, LEVELS)})]
    wanted: Any = list(at) if isinstance(at, Iterable) and not isinstance(at, str) else [at]
    if not wanted:
        raise GddlabError("at is an empty list: give noise levels, or omit it")
    return sorted({nearest_level(measured, a) for a in wanted})


def _depth_axes(ax: Axes | None, n: int) -> Axes:
    """`ax`, or axes wide enough for `n` layers."""
    return axes_of(ax, min(13.0, max(5.5, 0.13 * n + 2.2)), 4.2)


def along_depth(ax: Axes, rows: pd.DataFrame, title: str, depth_of: str = "convolutions") -> Axes:
    """Ends a figure with layers along the x axis: strip, title, and names if there is room, else depth."""
    x, label = x_of(rows, depth_of)
    borders = borders_of(x)
    ax.set_xlim(borders[0], borders[-1])
    mark_places(ax, rows, borders, "top")
    ax.set_title(title, loc="left", pad=32)
    points = ax.get_window_extent().width / ax.figure.dpi * 72 / (borders[-1] - borders[0])
    if np.diff(x).min(initial=np.inf) * points >= NAME_SIZE:
        ax.set_xticks(x, short_names(list(rows.index)), rotation=90, fontsize=NAME_SIZE)
    else:
        ax.set_xlabel(label)
    return ax
