"""Labels that ask how much room there is each time they are drawn, since a layout settles late.

Imports matplotlib, so import it where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axis import XAxis, YAxis
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, Locator, NullLocator

__all__ = ["BandLabel", "label_axis"]


class BandLabel(Text):
    """A text that is drawn where it is no longer than its band, `ends` in data of the x or the y axis."""

    def __init__(self, x: float, y: float, text: str, *, ends: tuple[float, float], axis: str, **style: Any) -> None:
        super().__init__(x, y, text, **style)
        self.ends, self.axis = ends, axis

    def fits(self, renderer: Any = None) -> bool:
        assert self.axes is not None
        box = self.get_window_extent(renderer)
        a, b = self.axes.transData.transform([(e, e) for e in self.ends])
        need, room = (box.width, abs(b - a)[0]) if self.axis == "x" else (box.height, abs(b - a)[1])
        return bool(need <= room)

    def draw(self, renderer: Any, *args: Any, **kwargs: Any) -> None:
        if self.fits(renderer):
            super().draw(renderer, *args, **kwargs)


class _Roomy(Locator):
    """Those of some places that have `points` to themselves, the first ones first."""

    def __init__(self, places: np.ndarray, points: np.ndarray) -> None:
        self.places, self.points = places, points

    def __call__(self) -> Any:
        axis: Any = self.axis
        box = axis.axes.get_window_extent()
        pixels = max(box.width if axis.axis_name == "x" else box.height, 1)
        scaled = axis.get_transform().transform
        data = np.ptp(scaled(axis.get_view_interval())) / pixels * axis.axes.figure.dpi / 72  # of one point
        at, half = scaled(self.places), 0.4995 * self.points * data
        kept: list[int] = []
        for i in range(len(at)):
            if not kept or abs(at[i] - at[kept[-1]]) >= half[i] + half[kept[-1]]:
                kept.append(i)
        return np.sort(self.places[kept])


def label_axis(
    axis: XAxis | YAxis, places: Sequence[float] | np.ndarray, names: Sequence[str], *, size: float, rotation: float = 0
) -> None:
    """Names at places of an axis, as many as have room, the first ones first.

    Args:
        size: Of the text, points.
        rotation: 90 on an x axis and 0 on a y axis set the names side by side, 0 on an x axis one after the other.
    """
    places = np.asarray(places, dtype=float)
    one_after_other = axis.axis_name == "x" and rotation == 0
    points = size * np.array([0.6 * len(n) + 1 if one_after_other else 1.1 for n in names])
    known = dict(zip(places.tolist(), names, strict=True))
    axis.set_major_locator(_Roomy(places, points))
    axis.set_major_formatter(FuncFormatter(lambda x, _: known.get(float(x), "")))
    axis.set_tick_params(which="major", labelsize=size, labelrotation=rotation, length=2)
    axis.set_minor_locator(NullLocator())
