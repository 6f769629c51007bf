"""Axes of figures: layers and noise levels on them, scales of values, and the strip of stages and resolutions."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gddlab.errors import unknown
from gddlab.probing.layers import match_layers
from gddlab.theme import CHANCE, DIVERGING, GREY, RESOLUTIONS, SEQUENTIAL

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

STAGES = {"enc": "encoder", "mid": "middle", "dec": "decoder"}
SPAN = 10
"""Values that differ by more than this factor get a logarithmic scale."""
POINTS = 7
"""Size of the names of stages and resolutions."""


class Probed:
    """What the figures read of a `ProbeResult`."""

    frame: pd.DataFrame
    meta: dict[str, Any]
    matrices: dict[str, dict[str, np.ndarray]]

    def _pick(self, known: Iterable[str], layers: str | Iterable[str] | None) -> list[str]:
        """The layers among `known` that a selection means, in their order; all for None."""
        types = {layer["name"]: layer["type"] for layer in self.meta["layers"]}
        types = {name: types.get(name, "") for name in known}
        chosen = types if layers is None else match_layers(layers, types)
        return [name for name in types if name in chosen]

    def _about(self, stat: str) -> str:
        """What was probed: "digits, noised, n = 256"; n is that of this statistic, since joined results differ."""
        known = [self.meta["data"]["name"]] if self.meta.get("data") else []
        images = self.frame.loc[self.frame["stat"] == stat, "n_images"]
        n = int(images.max()) if len(images) else self.meta["n_images"]
        return ", ".join([*known, self.meta["states"], f"n = {n}"])


def wide(frame: pd.DataFrame, stat: str, values: str = "value", across: str = "sigma") -> pd.DataFrame:
    """One statistic: layers in the order of the network down, `across` ascending."""
    part = frame[frame["stat"] == stat] if isinstance(stat, str) else frame[:0]
    if part.empty:
        raise unknown("statistic of this result", stat, frame["stat"])
    table = part.pivot(index="layer", columns=across, values=values)
    return table.loc[list(dict.fromkeys(part["layer"]))].sort_index(axis=1).astype(float)


def place_name(stage: str, resolution: int | None) -> str:
    """ "encoder 16", or as much of it as is known."""
    return " ".join(filter(None, [STAGES.get(stage, stage), "" if resolution is None else str(resolution)]))


def rows_of(frame: pd.DataFrame, names: Iterable[str]) -> pd.DataFrame:
    """stage, resolution, depth, n_params, place ("encoder 16", "" where unknown) and colour of layers, by name.

    Colours go by the rank of the resolution in the whole frame, the largest first.
    """
    where = frame.drop_duplicates("layer").set_index("layer")
    ranked = sorted({int(r) for r in where["resolution"].dropna() if r > 0}, reverse=True)
    where = where.loc[list(names), ["stage", "resolution", "depth", "n_params"]]
    known = [int(r) if r > 0 else None for r in where["resolution"].fillna(0)]
    return where.assign(
        place=[place_name(str(s), r) for s, r in zip(where["stage"], known, strict=True)],
        colour=[GREY if r is None else RESOLUTIONS[min(ranked.index(r), len(RESOLUTIONS) - 1)] for r in known],
    )


def neighbours(labels: Iterable[str]) -> list[tuple[str, int, int]]:
    """Label, start and stop of each stretch of equal labels."""
    out, start = [], 0
    for label, same in itertools.groupby(labels):
        stop = start + sum(1 for _ in same)
        out.append((label, start, stop))
        start = stop
    return out


def x_of(rows: pd.DataFrame) -> tuple[np.ndarray, str]:
    """Positions of layers on an axis, and its label: their depth, or their order where some share a depth."""
    depth = rows["depth"].to_numpy(dtype=float)
    if (np.diff(depth) > 0).all():
        return depth, "depth: number of convolutions before the layer"
    return np.arange(len(rows), dtype=float), "layer, in the order of the network"


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the whole path components that all of them begin with."""
    parts = [n.split(".")[:-1] for n in names]
    shared = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    prefix = sum(len(column[0]) + 1 for column in shared)
    return [n[prefix:] for n in names]


def stat_label(frame: pd.DataFrame, stat: str, note: str = "") -> str:
    """The statistic with its unit and a note about the scale in brackets."""
    unit = str(frame.loc[frame["stat"] == stat, "unit"].iloc[0])
    inside = ", ".join(filter(None, ["" if unit in (stat, "1") else unit, note]))
    return f"{stat} ({inside})" if inside else stat


def titled(text: str, values: np.ndarray) -> str:
    """A title that says how many of the layers, (layers, ...), lack a value somewhere."""
    missing = int((~np.isfinite(values)).reshape(len(values), -1).any(axis=1).sum())
    return f"{text}; {missing} of {len(values)} layers without a value" if missing else text


# Scales.


def plain(x: Any, digits: int = 2) -> str:
    """A number without an exponent as far as that is readable: 0.002, 0.59, 13, 80."""
    if x == 0:
        return "0"
    if not 1e-4 <= abs(x) < 1e6:
        return f"{x:.{digits}g}".replace("e-0", "e-").replace("e+0", "e")
    if abs(x) >= 10 ** (digits - 1):
        return f"{x:.0f}"
    return np.format_float_positional(x, precision=digits, fractional=False, trim="-")


def _tick(x: float, _: Any = None) -> str:
    return plain(x, 6)


@dataclass(frozen=True)
class Scale:
    """The scale that suits some values.

    Attributes:
        kind: "log" where positive values span more than a factor of 10; "symlog" where 0 is among them, or where values
            of both signs do; else "linear".
        linear: For "symlog", values nearer to 0 than this are on a linear scale.
        note: What a label says about it.
        missing: Some values are not finite.
    """

    kind: Literal["linear", "log", "symlog"]
    low: float
    high: float
    linear: float
    missing: bool

    @classmethod
    def of(cls, values: Any) -> Scale:
        values = np.asarray(values, dtype=float)
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        size = np.abs(finite[finite != 0])
        linear, kind = 1.0, "linear"
        if low < 0 < high:
            linear = float(np.median(size))
            kind = "symlog" if size.max() > SPAN * linear else "linear"
        elif low >= 0 and size.size and high > SPAN * size.min():
            linear, kind = float(size.min()), "log" if low > 0 else "symlog"
        return cls(kind, low, high, linear, finite.size < values.size)  # type: ignore[arg-type]

    @property
    def signed(self) -> bool:
        return self.low < 0 < self.high

    @property
    def note(self) -> str:
        return {"linear": "", "log": "log scale", "symlog": "log scale away from 0"}[self.kind]

    def colours(self, *, correlation: bool = False) -> dict[str, Any]:
        """`norm` and `cmap` for a heat map; around 0, in two hues, where values have both signs.

        A `correlation` reaches 1 at most: its scale ends there and begins at 0, or at -1 if some values are negative.
        """
        from matplotlib.colors import LogNorm, Normalize, SymLogNorm

        high = self.high if self.high > self.low else self.low + 1
        top = max(-self.low, high)
        ends: dict[str, Any] = {"vmin": -top if self.signed else self.low, "vmax": top if self.signed else high}
        norm: Normalize = Normalize(**ends)
        if correlation:
            norm = Normalize(-1 if self.signed else 0, 1)
        elif self.kind == "log":
            norm = LogNorm(**ends)
        elif self.kind == "symlog":
            norm = SymLogNorm(self.linear, **ends)
        return {"norm": norm, "cmap": DIVERGING if self.signed else SEQUENTIAL}

    def bar(self, label: str, **more: Any) -> dict[str, Any]:
        """Arguments of the colour bar."""
        ticks = {"ticks": self.decades()} if self.kind == "log" else {}
        return {"label": label + ", grey: no value" * self.missing, "format": _tick, "pad": 0.02} | ticks | more

    def decades(self) -> Any:
        """Ticks of a logarithmic axis, between decades too where there are few of them."""
        from matplotlib.ticker import LogLocator

        return LogLocator(subs=(1, 2, 5) if self.high < 500 * self.low else (1,), numticks=12)


def value_axis(ax: Axes, values: Any) -> str:
    """Gives the y axis the scale that suits its values, with a line at 0 if they have both signs; returns its note."""
    from matplotlib.ticker import NullFormatter, SymmetricalLogLocator

    s = Scale.of(values)
    if s.kind == "log":
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(s.decades())
    elif s.kind == "symlog":
        ax.set_yscale("symlog", linthresh=s.linear)
        locator = SymmetricalLogLocator(base=10, linthresh=s.linear)
        locator.set_params(numticks=7)
        ax.yaxis.set_major_locator(locator)
    elif 0 <= s.low < s.high / 2:
        ax.set_ylim(bottom=0)
    if s.signed:
        ax.axhline(0, color="0.4", linewidth=0.8, zorder=1)
    if s.kind != "linear":
        ax.yaxis.set_major_formatter(_tick)
        ax.yaxis.set_minor_formatter(NullFormatter())
    return s.note


def sigma_axis(ax: Axes, sigmas: Iterable[Any]) -> None:
    """A logarithmic x axis: labels at the ends and at some decades, small ticks at the measured noise levels."""
    from matplotlib.ticker import NullFormatter

    sigmas = sorted(float(s) for s in sigmas)
    low, high = sigmas[0], sigmas[-1]
    decades = (0.01, 0.1, 1.0, 10.0) if ax.get_window_extent().width / ax.figure.dpi > 3 else (0.1, 1.0, 10.0)
    ticks = [low, *(d for d in decades if 3 * low < d < high / 3), high]
    ax.set_xscale("log")
    ax.set_xticks(ticks, [plain(t) for t in ticks])
    ax.set_xticks(sigmas, minor=True)
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("noise level σ")


def chance_band(ax: Axes, table: pd.DataFrame, label: str) -> None:
    """A grey band behind lines: the range over layers, at each noise level, of what would be found by chance."""
    low, high = table.min(axis=0), table.max(axis=0)
    ax.fill_between(table.columns.astype(float), low, high, color=CHANCE, linewidth=1.5, zorder=0, label=label)


def borders_of(centres: Any) -> np.ndarray:
    """Borders of cells around ascending centres, half way between neighbours."""
    centres = np.asarray(centres, dtype=float)
    middle = (centres[1:] + centres[:-1]) / 2
    first = middle[0] - centres[0] if len(middle) else 0.5
    last = centres[-1] - middle[-1] if len(middle) else 0.5
    return np.concatenate([[centres[0] - first], middle, [centres[-1] + last]])


def mark_places(
    ax: Axes,
    rows: pd.DataFrame,
    borders: Sequence[float] | np.ndarray,
    side: Literal["right", "top"],
    *,
    at: float = 1.01,
) -> None:
    """A strip beside layers in the colours of resolutions, with stage and resolution, and lines where they change.

    `borders` are the ends of the layers on the axis, in data; the strip begins `at` widths (right) or heights (top).
    """
    from matplotlib.patches import Rectangle

    if not any(rows["place"]):
        return
    right, box = side == "right", ax.get_window_extent()
    inches = (box.width if right else box.height) / ax.figure.dpi
    points = (box.height if right else box.width) / ax.figure.dpi * 72 / abs(borders[-1] - borders[0])
    thick, transform = 0.1 / inches, ax.get_yaxis_transform() if right else ax.get_xaxis_transform()
    for label, start, stop in neighbours(rows["place"]):
        if not label:
            continue
        a, b = float(borders[start]), float(borders[stop])
        corner, size = ((at, a), (thick, b - a)) if right else ((a, at), (b - a, thick))
        style = {"facecolor": rows["colour"].iloc[start], "edgecolor": "white", "linewidth": 1}
        ax.add_patch(Rectangle(corner, *size, transform=transform, clip_on=False, **style))
        if start:
            (ax.axhline if right else ax.axvline)(
                a, color="white" if right else "0.7", linewidth=1, zorder=3 if right else 0
            )
        room = (b - a) * points
        fits = [s for s in (label, label.replace(" ", "\n")) if 0.6 * POINTS * max(map(len, s.split("\n"))) <= room]
        if right and room >= POINTS:
            ax.text(at + 1.5 * thick, (a + b) / 2, label, transform=transform, va="center", fontsize=POINTS)
        elif not right and fits:
            where: dict[str, Any] = {"ha": "center", "va": "bottom", "linespacing": 0.9}
            ax.text((a + b) / 2, at + 1.3 * thick, fits[0], transform=transform, fontsize=POINTS, **where)
