"""Where to draw."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["axes"]


def axes(ax: Axes | None, width: float, height: float) -> Axes:
    """`ax`, or the axes of a new figure, inches.

    A figure that has no layout engine gets the constrained one, without which names and colour bars would be cut off.
    """
    import matplotlib.pyplot as plt

    if ax is None:
        return plt.subplots(figsize=(width, height), layout="constrained")[1]
    figure = ax.figure.canvas.figure
    if figure.get_layout_engine() is None:
        figure.set_layout_engine("constrained")
    return ax
