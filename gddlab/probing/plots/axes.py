"""Axes of figures: layers and noise levels on them, scales of values, and the strip of stages and resolutions."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gddlab.errors import GddlabError, unknown
from gddlab.probing.layers import match_layers
from gddlab.theme import DIVERGING, GREY, NULLS, RESOLUTIONS, SEQUENTIAL

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

STAGES = {"enc": "encoder", "mid": "middle", "dec": "decoder"}
SPAN = 10
"""Values that differ by more than this factor get a logarithmic scale."""
POINTS = 7
"""Size of the names of stages and resolutions."""


CROSSED = (
    "this result crosses inputs with levels told: choose a part, fixed(told=80), fixed(sigma=80) or diagonal(), or see "
    "effects()"
)


class Probed:
    """What the figures read of a `ProbeResult`."""

    frame: pd.DataFrame
    meta: dict[str, Any]
    matrices: dict[str, dict[str, np.ndarray]]
    nulls: dict[str, tuple[Any, ...]]

    def _of_nulls(self, stat: str, like: pd.DataFrame) -> dict[str, np.ndarray]:
        """A statistic of null models, by kind, (draws, layers, noise levels) as those of a table."""
        return {
            kind: np.stack([wide(r.frame, stat).loc[like.index, like.columns] for r in draws])
            for kind, draws in self.nulls.items()
            if all((r.frame["stat"] == stat).any() for r in draws)  # others were joined to it
        }

    @property
    def _depth_of(self) -> str:
        """What `Layer.depth` counts."""
        return str(self.meta.get("depth_of", "convolutions"))

    def _layer(self, key: str) -> str:
        """Name of the layer that a measured place, by its key in the frame, belongs to."""
        name: str = self.meta.get("sites", {}).get(key, {}).get("layer", key)
        return name

    def _pick(self, known: Iterable[str], layers: str | Iterable[str] | None) -> list[str]:
        """The layers among `known` that a selection means, in their order; all for None."""
        types = {layer["name"]: layer["type"] for layer in self.meta["layers"]}
        types = {name: types.get(self._layer(name), "") for name in known}
        chosen = types if layers is None else match_layers(layers, types)
        return [name for name in types if name in chosen]

    def _about(self, stat: str) -> str:
        """What was probed: "digits, noised, n = 256"; n is that of this statistic, since joined results differ."""
        known = [self.meta["data"]["name"]] if self.meta.get("data") else []
        images = self.frame.loc[self.frame["stat"] == stat, "n_images"]
        n = int(images.max()) if len(images) else self.meta["n_images"]
        fixed = {"told": "told σ = {:g}", "sigma": "input at σ = {:g}"}
        held = [fixed[name].format(level) for name, level in (self.meta.get("fixed") or {}).items()]
        return ", ".join([*known, self.meta["states"], *held, f"n = {n}"])

    def _varied(self) -> str:
        """What noise levels of the result are of, for an axis."""
        return "noise level σ told" if "sigma" in (self.meta.get("fixed") or {}) else "noise level σ"


def wide(frame: pd.DataFrame, stat: str, values: str = "value", across: str = "sigma") -> pd.DataFrame:
    """One statistic: layers in the order of the network down, `across` ascending."""
    part = frame[frame["stat"] == stat] if isinstance(stat, str) else frame[:0]
    if part.empty:
        raise unknown("statistic of this result", stat, frame["stat"])
    if "told" in part:
        raise GddlabError(CROSSED)
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


def x_of(rows: pd.DataFrame, depth_of: str = "convolutions") -> tuple[np.ndarray, str]:
    """Positions of layers on an axis, and its label: their depth, or their order where some share a depth."""
    depth = rows["depth"].to_numpy(dtype=float)
    if (np.diff(depth) > 0).all():
        return depth, f"depth: number of {depth_of} before the layer"
    return np.arange(len(rows), dtype=float), "layer, in the order of the network"


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the whole path components that all of them begin with; a number alone is no name: "blocks.0"."""
    parts = [n.split(".") for n in names]
    columns = zip(*(p[:-1] for p in parts), strict=False)
    shared = len([*itertools.takewhile(lambda column: len(set(column)) == 1, columns)])
    if shared and any(p[shared].isdigit() for p in parts):
        shared -= 1
    return [".".join(p[shared:]) for p in parts]


def unit_of(frame: pd.DataFrame, stat: str) -> str:
    return str(frame.loc[frame["stat"] == stat, "unit"].iloc[0])


def stat_label(frame: pd.DataFrame, stat: str, note: str = "") -> str:
    """The statistic with its unit and a note about the scale in brackets."""
    unit = unit_of(frame, stat)
    inside = ", ".join(filter(None, ["" if unit in (stat, "1") else unit, note]))
    return f"{stat} ({inside})" if inside else stat


def titled(text: str, values: np.ndarray) -> str:
    """A title that says how many of the layers, (layers, ...), lack a value somewhere."""
    missing = int((~np.isfinite(values)).reshape(len(values), -1).any(axis=1).sum())
    return f"{text}; {missing} of {len(values)} layers without a value" if missing else text


def grey_bands(ax: Axes, x: Any, bands: Mapping[str, tuple[Any, Any]]) -> None:
    """Grey bands behind lines, from low to high, of what null models have or chance would find, named in the legend."""
    for shade, (label, (low, high)) in zip(NULLS, bands.items(), strict=False):
        ax.fill_between(x, low, high, color=shade, alpha=0.7, linewidth=1.5, zorder=0, label=label)


def central(values: Any, axis: Any) -> tuple[Any, Any]:
    """The 5th and the 95th percentile along some axes."""
    low, high = np.nanquantile(values, [0.05, 0.95], axis=axis)
    return low, high


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
        kind: "log" where positive values span more than a factor of 10, and for ratios; "symlog" where 0 is among them,
            or where values on both sides of what is neutral do; else "linear".
        linear: For "symlog", values nearer to what is neutral than this are on a linear scale.
        neutral: 0 where values have both signs; 1 for ratios on both sides of 1, whose logarithms count; else None.
        note: What a label says about it.
        missing: Some values are not finite.
    """

    kind: Literal["linear", "log", "symlog"]
    low: float
    high: float
    linear: float
    missing: bool
    neutral: float | None = None

    @classmethod
    def of(cls, values: Any, unit: str = "") -> Scale:
        """The scale of values in `unit`: a "ratio" has 1 as its neutral value, a "similarity" none."""
        values = np.asarray(values, dtype=float)
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        missing = finite.size < values.size
        if unit == "similarity":
            return cls("linear", *((0.0, 1.0) if low == high else (low, high)), 1.0, missing)
        neutral = 1.0 if unit == "ratio" and 0 < low < 1 < high else 0.0 if low < 0 < high else None
        size = np.abs(np.log(finite) if neutral else finite)
        size = size[size > 0]
        linear, kind = 1.0, "linear"
        if neutral is not None:
            linear, kind = float(np.median(size)), "log" if neutral else "linear"
            kind = "symlog" if size.max() > SPAN * linear else kind
        elif low >= 0 and size.size and high > SPAN * size.min():
            linear, kind = float(size.min()), "log" if low > 0 else "symlog"
        return cls(kind, low, high, linear, missing, neutral)  # type: ignore[arg-type]

    @property
    def note(self) -> str:
        where = "from 1" if self.neutral else "from 0"
        return {"linear": "", "log": "log scale", "symlog": f"log scale away {where}"}[self.kind]

    @property
    def top(self) -> float:
        """How far the values are from what is neutral, a factor where that is 1."""
        return max(1 / self.low, self.high) if self.neutral else max(-self.low, self.high)

    def colours(self) -> dict[str, Any]:
        """`norm` and `cmap` for a heat map; in two hues around what is neutral, which is in the middle of the scale."""
        from matplotlib.colors import FuncNorm, LogNorm, Normalize, SymLogNorm

        ends: dict[str, Any] = {"vmin": self.low, "vmax": self.high if self.high > self.low else self.low + 1}
        if self.neutral is not None:
            ends = {"vmin": 1 / self.top if self.neutral else -self.top, "vmax": self.top}
        norm: Normalize = Normalize(**ends)
        if self.kind == "log":
            norm = LogNorm(**ends)
        elif self.kind == "symlog" and self.neutral:
            norm = FuncNorm((self._bent, self._unbent), **ends)
        elif self.kind == "symlog":
            norm = SymLogNorm(self.linear, **ends)
        return {"norm": norm, "cmap": SEQUENTIAL if self.neutral is None else DIVERGING}

    def _bent(self, x: Any) -> Any:
        """Ratios to where they are on the scale, 0 for 1: their logarithms, and again the logarithm of large ones."""
        logs = np.log(np.maximum(x, 1e-300))
        return np.arcsinh(logs / self.linear) if self.kind == "symlog" else logs

    def _unbent(self, y: Any) -> Any:
        return np.exp(self.linear * np.sinh(y))

    def bar(self, label: str, **more: Any) -> dict[str, Any]:
        """Arguments of the colour bar."""
        ticks: dict[str, Any] = {}
        if self.neutral or self.kind == "log":
            ticks = {"ticks": self._steps() if self.neutral else self.decades()}
        return {"label": label + ", grey: no value" * self.missing, "format": _tick, "pad": 0.02} | ticks | more

    def decades(self) -> Any:
        """Ticks of a logarithmic axis, between decades too where there are few of them."""
        from matplotlib.ticker import LogLocator

        return LogLocator(subs=(1, 2, 5) if self.high < 500 * self.low else (1,), numticks=12)

    def _steps(self) -> list[float]:
        """1, and as many round ratios around it as have room on the scale."""
        room = 0.07 * float(self._bent(self.high) - self._bent(self.low))
        out = [1.0]
        for x in (10, 0.1, 100, 0.01, 1000, 0.001, 2, 0.5, 5, 0.2, 1.2, 0.8, 1.5, 0.9, 1.1, 0.95, 1.05, 0.98, 1.02):
            if self.low <= x <= self.high and all(abs(self._bent(x) - self._bent(y)) > room for y in out):
                out.append(x)
        return sorted(out)


def value_axis(ax: Axes, values: Any, unit: str = "") -> str:
    """Gives the y axis the scale that suits its values, with a line at what is neutral; returns its note."""
    from matplotlib.ticker import NullFormatter, SymmetricalLogLocator

    s = Scale.of(values, unit)
    log = s.high > SPAN * s.low if s.neutral else s.kind == "log"
    if log:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(s.decades())
    elif s.kind == "symlog" and not s.neutral:
        ax.set_yscale("symlog", linthresh=s.linear)
        locator = SymmetricalLogLocator(base=10, linthresh=s.linear)
        locator.set_params(numticks=7)
        ax.yaxis.set_major_locator(locator)
    elif 0 <= s.low < s.high / 2:
        ax.set_ylim(bottom=0)
    if s.neutral or s.low < 0 < s.high:
        ax.axhline(s.neutral or 0, color="0.4", linewidth=0.8, zorder=1)
    if ax.get_yscale() != "linear":
        ax.yaxis.set_major_formatter(_tick)
        ax.yaxis.set_minor_formatter(NullFormatter())
    return s.note if not s.neutral else "log scale" if log else ""


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
