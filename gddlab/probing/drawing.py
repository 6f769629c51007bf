"""The pictures that a probe result draws of itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gddlab.probing.plots.bands import Mask
    from gddlab.probing.result import ProbeResult

__all__ = ["Pictures"]


class Pictures:
    """Methods of `ProbeResult` that draw; each takes `ax` and returns it, and makes a figure that fits without one."""

    def heatmap(self: Any, stat: str, ax: Axes | None = None, *, mask: Mask | None = None) -> Axes:
        """Draws one statistic, layers down, noise levels across (log scale), with bands of stage and resolution.

        Args:
            stat: A statistic of the frame.
            ax: Where to draw; None makes a figure that fits the number of layers.
            mask: A `FreezeMask`: marks what it freezes.

        Raises:
            GddlabError: `stat` was not measured.
        """
        from gddlab.probing.plots import draw_heatmap

        return draw_heatmap(self, stat, ax, mask=mask)

    def lines(
        self: Any,
        stat: str,
        layers: Sequence[str] | None = None,
        ax: Axes | None = None,
        *,
        over: str = "sigma",
        at: float | Sequence[float] | None = None,
    ) -> Axes:
        """Draws one statistic over "sigma", a line a layer, or over "depth", a line a noise level."""
        from gddlab.probing.plots import draw_lines

        return draw_lines(self, stat, layers, ax, over=over, at=at)

    def stem(self: Any, stat: str, at: float = 80.0, ax: Axes | None = None) -> Axes:
        """Draws one statistic at one noise level, layers by depth and resolution, with standard errors."""
        from gddlab.probing.plots import draw_stem

        return draw_stem(self, stat, at, ax)

    def against(self: Any, student: ProbeResult, stat: str, at: float | None = None, ax: Axes | None = None) -> Axes:
        """Draws one statistic of this network, a teacher, beside that of its student: each layer at one noise level, with the teacher's range over all.

        Raises:
            GddlabError: They share no layer with this statistic.
        """
        from gddlab.probing.plots import draw_pair

        return draw_pair(self, student, stat, at, ax)

    def similarity(self: Any, layer: str, ax: Axes | None = None, *, kind: str = "cosine") -> Axes:
        """Draws the cosines (or "cka") of one layer's outputs between all pairs of noise levels.

        Raises:
            GddlabError: No such matrix of `layer`.
        """
        from gddlab.probing.plots import draw_similarity

        return draw_similarity(self, layer, ax, kind=kind)

    def similarities(self: Any, layers: Sequence[str] | None = None, *, kind: str = "cosine") -> Figure:
        """Draws `similarity` of all layers, or some, as small multiples."""
        from gddlab.probing.plots import draw_similarities

        return draw_similarities(self, layers, kind=kind)
