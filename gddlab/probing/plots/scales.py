"""Colours, axes and numbers: which scale suits some values, and how it is labelled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize

__all__ = ["ColourScale", "Spread", "edges", "plain", "sigma_axis", "value_axis"]

SPAN = 10
"""Values that differ by more than this factor get a logarithmic scale."""


def plain(x: float, digits: int = 2) -> str:
    """A number without an exponent, as far as that is readable: 0.002, 0.59, 13, 80."""
    if x == 0:
        return "0"
    if not 1e-4 <= abs(x) < 1e6:
        return f"{x:.{digits}g}".replace("e-0", "e-").replace("e+0", "e")
    if abs(x) >= 10 ** (digits - 1):
        return f"{x:.0f}"
    return np.format_float_positional(x, precision=digits, fractional=False, trim="-")


def _tick(x: float, _: Any) -> str:
    return plain(x, 6)


@dataclass(frozen=True)
class Spread:
    """How values are spread.

    Attributes:
        kind: "log" where positive values span more than a factor of 10; "symlog" where 0 is among them, or where values
            of both signs do; else "linear".
        linear: For "symlog", values nearer to 0 than this are on a linear scale.
        signed: Some are below 0 and some above.
    """

    kind: Literal["linear", "log", "symlog"]
    low: float
    high: float
    linear: float = 1.0
    signed: bool = False

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        finite = values[np.isfinite(values)]
        if finite.size == 0:
            return cls("linear", 0.0, 1.0)
        low, high = float(finite.min()), float(finite.max())
        size = np.abs(finite[finite != 0])
        if low < 0 < high:
            typical = float(np.median(size))
            return cls("symlog" if size.max() > SPAN * typical else "linear", low, high, typical, True)
        if low >= 0 and size.size and high > SPAN * float(size.min()):
            return cls("log" if low > 0 else "symlog", low, high, float(size.min()))
        return cls("linear", low, high)


@dataclass(frozen=True)
class ColourScale:
    """A norm, a colour map that colour-blind people can read (grey: no value), and what to say about it."""

    norm: Normalize
    colours: Colormap
    note: str
    zero: float | None
    """What 0 is drawn as where a logarithmic scale begins above it."""

    @classmethod
    def of(cls, values: np.ndarray, *, correlation: bool = False) -> ColourScale:
        """Logarithmic where values span more than a factor of 10; around 0, in two hues, where they have both signs.

        Args:
            correlation: Values reach 1 at most: the scale ends there, and begins at 0, or at -1 where some are negative.
        """
        import matplotlib.pyplot as plt
        from matplotlib.colors import LogNorm, Normalize, SymLogNorm

        s = Spread.of(values)
        colours = plt.get_cmap("PuOr_r" if s.signed else "cividis").with_extremes(bad="0.75", under="white")
        top = max(-s.low, s.high)
        note, zero = "", None
        norm: Normalize = Normalize(s.low, s.high if s.high > s.low else s.low + 1)
        if correlation:
            norm = Normalize(-1 if s.signed else 0, 1)
        elif s.signed and s.kind == "symlog":
            norm, note = SymLogNorm(s.linear, vmin=-top, vmax=top), "log scale away from 0"
        elif s.signed:
            norm = Normalize(-top, top)
        elif s.kind == "symlog":
            norm, note, zero = LogNorm(s.linear, s.high), "log scale, white: 0", s.linear / 2
        elif s.kind == "log":
            norm, note = LogNorm(s.low, s.high), "log scale"
        if not np.isfinite(values).all():
            note = f"{note}, grey: no value".removeprefix(", ")
        return cls(norm, colours, note, zero)

    def shown(self, values: np.ndarray) -> np.ma.MaskedArray:
        if self.zero is not None:
            values = np.where(values == 0, self.zero, values)
        return np.ma.masked_invalid(values)

    def bar(self, mappable: Any, label: str, *, font: float = 1.0, **where: Any) -> Any:
        """A colour bar with plain numbers, beside `ax=` or in `cax=`; `font` scales its text."""
        from matplotlib.colors import LogNorm

        assert self.norm.vmin is not None and self.norm.vmax is not None
        bar = next(iter(where.values())).figure.colorbar(mappable, **where)
        bar.set_label(label, fontsize=8 * font)
        if isinstance(self.norm, LogNorm):
            bar.ax.yaxis.set_major_locator(_log_locator(self.norm.vmin, self.norm.vmax))
        bar.ax.yaxis.set_major_formatter(_tick)
        bar.ax.minorticks_off()
        bar.ax.tick_params(labelsize=7 * font)
        return bar


def _log_locator(low: float, high: float) -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1, 2, 5) if high / low < 500 else (1,), numticks=12)


def _around_zero(s: Spread) -> list[float]:
    """0, and on either side powers of ten beyond the linear part, four at most."""
    low = math.floor(math.log10(s.linear)) + 1
    powers = range(low, max(low, math.floor(math.log10(max(-s.low, s.high)))) + 1)
    ticks = [10.0**p for p in reversed(powers[:: -math.ceil(len(powers) / 4)])]
    return [*(-t for t in reversed(ticks) if s.low < 0), 0.0, *ticks]


def edges(centres: np.ndarray) -> np.ndarray:
    """Borders of cells around ascending centres, half way between neighbours."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    mid = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - mid[0]], mid, [2 * centres[-1] - mid[-1]]])


def sigma_axis(ax: Axes, sigmas: Sequence[float]) -> None:
    """A logarithmic x axis: labels at the ends and at whole decades, small ticks at the measured noise levels."""
    from matplotlib.ticker import NullFormatter

    ends = [min(sigmas), max(sigmas)]
    decades = [10.0**k for k in range(math.ceil(math.log10(ends[0])), math.floor(math.log10(ends[1])) + 1)]
    ticks = sorted({*ends, *(d for d in decades if min(abs(math.log10(d / e)) for e in ends) > 0.3)})
    ax.set_xscale("log")
    ax.set_xticks(ticks, [plain(t) for t in ticks], fontsize=8)
    ax.set_xticks(list(sigmas), minor=True)
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("noise level σ", fontsize=9)


def value_axis(ax: Axes, values: np.ndarray) -> str:
    """The y axis on the scale that suits its values, a line at 0 where they have both signs; returns what to say about it."""
    from matplotlib.ticker import FixedLocator, NullLocator

    s = Spread.of(values)
    note = ""
    if s.kind == "symlog":
        ax.set_yscale("symlog", linthresh=s.linear)
        ax.yaxis.set_major_locator(FixedLocator(_around_zero(s)))
        ax.yaxis.set_minor_locator(NullLocator())
        note = "log scale away from 0"
    elif s.kind == "log":
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(_log_locator(s.low, s.high))
        note = "log scale"
    elif 0 <= s.low < s.high / 2:
        ax.set_ylim(bottom=0)
    if s.signed:
        ax.axhline(0, color="0.4", linewidth=0.8, zorder=1)
    if s.kind != "linear":
        ax.yaxis.set_major_formatter(_tick)
        ax.yaxis.set_minor_formatter("")
    ax.tick_params(axis="y", labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    return note
