"""Masks beside each other: what they share, and where each freezes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gddlab.errors import GddlabError
from gddlab.freezing.mask import FreezeMask
from gddlab.freezing.places import NOWHERE, shares
from gddlab.freezing.tables import same_network, share_text

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["MaskComparison", "compare"]


@dataclass(frozen=True, eq=False)
class MaskComparison:
    """Masks of one network.

    Attributes:
        masks: By name.
        overlap: Jaccard index of the frozen sets, in numbers: what both freeze over what either freezes, 0 to 1; 1 for two that freeze
            nothing.
        stages, resolutions, kinds: Frozen share of the parameters, 0 to 1: masks down; stage of the network, resolution
            (pixels) or kind of layer across.
    """

    masks: dict[str, FreezeMask]
    overlap: pd.DataFrame
    stages: pd.DataFrame
    resolutions: pd.DataFrame
    kinds: pd.DataFrame

    def to_frame(self) -> pd.DataFrame:
        """A row a mask: columns strategy, score, freeze, budget (asked), reached, tensors (frozen), share (of all parameters)."""
        import pandas as pd

        rows = {}
        for name, mask in self.masks.items():
            a = mask.arguments
            asked = [a.get(key) for key in ("score", "freeze", "budget", "reached")]
            rows[name] = [mask.strategy, *asked, len(mask.frozen), mask.fraction]
        columns = ["strategy", "score", "freeze", "budget", "reached", "tensors", "share"]
        return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("mask")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws masks down and blocks of the network along depth across; colour is the frozen share of a block's parameters."""
        from gddlab.freezing.plots import draw_comparison

        return draw_comparison(self, ax)

    def _repr_html_(self) -> str:
        table = self.to_frame()
        for column in ("budget", "reached", "share"):
            table[column] = [share_text(v) for v in table[column]]
        parts = [table.to_html(na_rep="")]
        parts.append(
            "<p>Overlap of the frozen sets (Jaccard index)</p>" + self.overlap.to_html(float_format="{:.2f}".format)
        )
        for what, shown in (("stage", self.stages), ("resolution", self.resolutions), ("kind of layer", self.kinds)):
            parts.append(f"<p>Frozen share by {what}</p>" + shown.to_html(float_format="{:.0%}".format, na_rep=""))
        return "".join(parts)


def compare(masks: Mapping[str, FreezeMask] | Iterable[FreezeMask]) -> MaskComparison:
    """Compares masks of one network.

    Args:
        masks: By name; or a list, where each is named by its strategy, "random (2)" and so on where one comes again.

    Raises:
        GddlabError: No masks, or masks of different networks.
    """
    import pandas as pd

    named = _named(masks)
    frames = {name: mask.to_frame() for name, mask in named.items()}
    sizes = next(iter(frames.values()))["size"]
    overlap = pd.DataFrame(index=list(named), columns=list(named), dtype=float)
    for a, left in frames.items():
        for b, right in frames.items():
            either = sizes[left["frozen"] | right["frozen"]].sum()
            both = sizes[left["frozen"] & right["frozen"]].sum()
            overlap.loc[a, b] = both / either if either else 1.0

    def by(column: str) -> pd.DataFrame:
        table = pd.DataFrame({name: shares(frame, column) for name, frame in frames.items()}).T
        if column == "resolution":
            table.columns = [NOWHERE if pd.isna(r) else int(r) for r in table.columns]
        return table.rename_axis(index="mask", columns=column)

    return MaskComparison(named, overlap, by("stage"), by("resolution"), by("kind"))


def _named(masks: Any) -> dict[str, FreezeMask]:
    if isinstance(masks, FreezeMask) or not isinstance(masks, Iterable):
        raise GddlabError(f"masks is a {type(masks).__name__}: give a mapping of names to masks, or a list of masks")
    if isinstance(masks, Mapping):
        pairs = [(str(name), mask) for name, mask in masks.items()]
    else:
        pairs = [(getattr(mask, "strategy", ""), mask) for mask in masks]
    out: dict[str, FreezeMask] = {}
    for name, mask in pairs:
        if not isinstance(mask, FreezeMask):
            raise GddlabError(f"mask {name!r} is a {type(mask).__name__}: give FreezeMasks")
        count = sum(other == name for other, _ in pairs[: len(out)])
        out[f"{name} ({count + 1})" if count else name] = mask
        same_network(next(iter(out.values())), mask)
    if not out:
        raise GddlabError("masks is empty: give at least one")
    return out
