"""What `decode` found: one panel per target, a thin line per layer, chance behind them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from gddlab.errors import GddlabError
from gddlab.probing.plots.axes import Probed, grey_bands, rows_of, sigma_axis, wide
from gddlab.theme import SEQUENTIAL, themed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PREFIX, SUFFIX = "decode_", "_chance"
FLOOR = -0.25
"""Lowest R² drawn: a readout of ln sigma may be much worse than the mean at single levels."""
PANELS = {
    "image": ("clean image", "R²"),
    "noise": ("noise", "R²"),
    "class": ("class", "accuracy"),
    "sigma": ("ln σ", "R² (one readout for all levels)"),
}
"""Title and label of the values, by target."""


class Readouts(Probed):
    """Figures of a `ProbeResult` of `decode`."""

    @themed
    def readouts(self, layers: str | Iterable[str] | None = None) -> Figure:
        """Draws what `decode` found over noise levels: one panel per target, a line per layer, chance as a grey band.

        Lines are coloured by the order of the layers; encoders are solid, decoders dashed. The band is the range over
        layers of the readouts of shuffled targets. Values below -0.25 are cut off.

        Args:
            layers: Presets, names, globs, as in `probe`; None takes all that were read.

        Raises:
            GddlabError: Nothing was read out, or unknown layers.
        """
        import matplotlib.pyplot as plt
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        found = [t for t in PANELS if (self.frame["stat"] == PREFIX + t).any()]
        if not found:
            raise GddlabError("nothing was read out in this result: give one of gddlab.decode")
        names = self._pick(wide(self.frame, PREFIX + found[0]).index, layers)
        rows, n = rows_of(self.frame, names), len(names)
        size = (2.7 * len(found) + 1, 2.9)
        figure, axes = plt.subplots(1, len(found), squeeze=False, figsize=size, layout="constrained")
        scale, shades = Normalize(1, max(n, 2)), colormaps[SEQUENTIAL]
        for ax, target in zip(axes[0], found, strict=True):
            table = wide(self.frame, PREFIX + target).loc[names]
            chance = wide(self.frame, PREFIX + target + SUFFIX).loc[names]
            range_ = chance.min(axis=0), chance.max(axis=0)  # over layers
            grey_bands(ax, chance.columns.astype(float), {"chance: shuffled targets": range_})
            for k, name in enumerate(names, 1):
                dash = "--" if rows.loc[name, "stage"] == "dec" else "-"
                ax.plot(table.columns, table.loc[name], color=shades(scale(k)), linewidth=0.9, linestyle=dash)
            title, label = PANELS[target]
            ax.set_title(title, loc="left")
            ax.set_ylabel(label)
            low = float(np.nanmin([table.to_numpy(), chance.to_numpy()]))
            ax.set_ylim(0 if target == "class" else max(FLOOR, min(-0.03, low - 0.03)), 1.03)
            sigma_axis(ax, table.columns)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right")
        bar = figure.colorbar(
            ScalarMappable(scale, shades), ax=axes, pad=0.01, aspect=25, label="layer, in the order of the network"
        )
        bar.set_ticks([1, n] if n > 1 else [1])
        about = self._about(PREFIX + found[0])
        figure.suptitle(f"read out of each layer: {about} held out; decoders dashed", x=0.01, ha="left")
        return figure
