"""Picture of a mask."""

from __future__ import annotations

import re
from collections import defaultdict
from math import prod
from typing import TYPE_CHECKING

from gddlab.freezing.mask import FreezeMask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_mask"]

FROZEN, TRAINED = "#0072B2", "#E69F00"
"""Okabe and Ito's blue and orange."""


def draw_mask(mask: FreezeMask, ax: Axes | None = None) -> Axes:
    import matplotlib.pyplot as plt

    frozen = set(mask.frozen)
    shares: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, shape in mask.parameters:
        shares[_block_of(name)][name not in frozen] += 100 * prod(shape) / mask.n_params
    names = list(shares)
    if ax is None:
        _, ax = plt.subplots(figsize=(max(5.0, 0.2 * len(names) + 1.5), 3.6), layout="constrained")
    below = [shares[n][0] for n in names]
    above = [shares[n][1] for n in names]
    ax.bar(range(len(names)), below, color=FROZEN, label=f"frozen, {sum(below):.1f} %")
    ax.bar(range(len(names)), above, bottom=below, color=TRAINED, label=f"trained, {sum(above):.1f} %")
    prefix = "model." if all(n.startswith("model.") for n in names) else ""
    ax.set_xticks(range(len(names)), [n[len(prefix) :] for n in names], rotation=90, fontsize=7)
    ax.set_xlim(-0.6, len(names) - 0.4)
    ax.set_ylabel("share of all parameters, %")
    ax.set_title(f"{mask.strategy}", fontsize=9)
    ax.legend(fontsize=8, frameon=False)
    return ax


def _block_of(parameter: str) -> str:
    """The module along depth that a parameter belongs to: up to its part with a resolution, else its own module."""
    found = re.match(r"(.*?\d+x\d+_[^.]+)\.", parameter)
    return found[1] if found else parameter.rpartition(".")[0]
