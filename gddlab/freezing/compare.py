"""Compares masks: what they share and where each freezes; and makes masks to compare one with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

from gddlab.errors import GddlabError, shown
from gddlab.freezing.candidates import Unit, fill, names_of, recorded, shuffled, split
from gddlab.freezing.mask import (
    INCH_PER_BLOCK,
    NOWHERE,
    FreezeMask,
    check_same_network,
    label_blocks,
    share_text,
    shares,
)
from gddlab.probing.plots.heatmaps import frozen_colours
from gddlab.theme import axes_of, themed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class MaskComparison:
    """Masks of one network.

    Attributes:
        masks: By name.
        overlap: Jaccard index of the frozen sets, in numbers: what both freeze over what either freezes, 0 to 1; 1 for
            two that freeze nothing.
        stages, resolutions, kinds: Frozen share of the parameters, 0 to 1: masks down; stage of the network, resolution
            (pixels) or kind of layer across.
    """

    masks: dict[str, FreezeMask]
    overlap: pd.DataFrame
    stages: pd.DataFrame
    resolutions: pd.DataFrame
    kinds: pd.DataFrame

    def to_frame(self) -> pd.DataFrame:
        """One row per mask: strategy, score, freeze, budget asked, reached, tensors frozen, share of all parameters."""
        import pandas as pd

        rows = {}
        for name, mask in self.masks.items():
            a = mask.arguments
            asked = [a.get(key) for key in ("score", "freeze", "budget", "reached")]
            rows[name] = [mask.strategy, *asked, len(mask.frozen), mask.fraction]
        columns = ["strategy", "score", "freeze", "budget", "reached", "tensors", "share"]
        return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("mask")

    @themed
    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws masks down, blocks along depth across; colour is the frozen share of a block's parameters."""
        import pandas as pd
        import seaborn as sns

        frames = {f"{name}  {100 * mask.fraction:.1f} %": mask.to_frame() for name, mask in self.masks.items()}
        table = 100 * pd.DataFrame({name: shares(frame, "block") for name, frame in frames.items()}).T
        ax = axes_of(ax, max(6.0, INCH_PER_BLOCK * table.shape[1] + 3.0), 0.3 * table.shape[0] + 1.9)
        look = {"cmap": frozen_colours(), "vmin": 0, "vmax": 100, "linewidths": 0.6, "yticklabels": True}
        bar = {"label": "frozen, % of\nthe block", "ticks": [0, 50, 100], "pad": 0.02, "aspect": 12}
        sns.heatmap(table, ax=ax, cbar_kws=bar, **look)
        label_blocks(ax, next(iter(frames.values())), 0)
        ax.tick_params(length=0)
        ax.set_ylabel("")
        return ax

    def _repr_html_(self) -> str:
        table = self.to_frame()
        for column in ("budget", "reached", "share"):
            table[column] = [share_text(v) for v in table[column]]
        parts = [table.to_html(na_rep=""), "<p>Overlap of the frozen sets (Jaccard index)</p>"]
        parts.append(self.overlap.to_html(float_format="{:.2f}".format))
        for what, share in (("stage", self.stages), ("resolution", self.resolutions), ("kind of layer", self.kinds)):
            parts.append(f"<p>Frozen share by {what}</p>" + share.to_html(float_format="{:.0%}".format, na_rep=""))
        return "".join(parts)


def compare(masks: Mapping[str, FreezeMask] | Iterable[FreezeMask]) -> MaskComparison:
    """Compares masks of one network.

    Args:
        masks: By name; or a list, where each is named by its strategy, "random (2)" and so on where one is repeated.

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
        check_same_network(next(iter(out.values())), mask)
    if not out:
        raise GddlabError("masks is empty: give at least one")
    return out


def controls(mask: FreezeMask, seeds: Sequence[int] = (0, 1, 2)) -> dict[str, FreezeMask]:
    """Masks of equal budget over the same candidates: "inverse", "random-0", "random-1", ...

    The budget is the share of all parameters that `mask` freezes; it is not exceeded. The inverse freezes the
    candidates that `mask` trains, and then, where room is left, those that it froze last: both in the opposite order of
    the scores, unscored ones after scored; without scores in random order (seed 0). For a mask that records no
    candidates, like the rules on roles, these are `select_freeze`'s default, and whatever it freezes.

    Args:
        mask: What to compare with.
        seeds: Of the random masks.

    Raises:
        GddlabError: `mask` freezes nothing, or all of its candidates, so that there is no other choice; bad seeds.
    """
    if not isinstance(mask, FreezeMask):
        raise GddlabError(f"mask is a {type(mask).__name__}: give a FreezeMask")
    listed: list[Any] = [*seeds] if isinstance(seeds, Iterable) else []
    whole = all(isinstance(s, Integral) and not isinstance(s, bool) for s in listed)
    if not isinstance(seeds, Iterable) or not whole or len({*listed}) < len(listed):
        raise GddlabError(f"seeds={shown(seeds)}: give whole numbers, each once")
    units = recorded(mask)
    candidates = {u.name: u.layers for u in units}
    granularity = mask.arguments.get("granularity", "layer")
    parts = split(units, granularity)
    frozen = set(mask.frozen)
    trained = [u for u in parts if not frozen.issuperset(u.parameters)]
    if not frozen or not trained:
        what = "nothing" if not frozen else f"all of its {len(units)} candidates"
        raise GddlabError(f"this mask freezes {what}: no other choice has its budget, select one among more candidates")

    def of_equal_budget(ordered: Sequence[Unit], name: str, **arguments: Any) -> FreezeMask:
        chosen = names_of(fill(ordered, mask.n_frozen))
        about = {"mask": mask.hash, "of": mask.strategy, "granularity": granularity, **arguments}
        about["budget"] = mask.fraction
        return FreezeMask(tuple(chosen), mask.parameters, name, about, candidates=candidates).with_reached()

    later = {id(u) for u in parts} - {id(u) for u in trained}
    order, about = _opposite(mask, parts)
    out = {"inverse": of_equal_budget(sorted(order, key=lambda u: id(u) in later), "inverse", **about)}
    return out | {f"random-{s}": of_equal_budget(shuffled(parts, s), "random", seed=int(s)) for s in listed}


def _opposite(mask: FreezeMask, parts: Sequence[Unit]) -> tuple[list[Unit], dict[str, Any]]:
    """Units in the opposite order of the mask's scores, or in random order; and arguments that describe it."""
    scores = mask.scores
    if not scores:
        return shuffled(parts[::-1], 0), {"seed": 0}  # reversed: not the order of "random-0"
    opposite = "low" if mask.arguments.get("freeze", "low") == "high" else "high"
    sign = 1 if opposite == "low" else -1
    about = {"score": mask.arguments.get("score"), "freeze": opposite}
    return sorted(parts, key=lambda u: sign * scores[u.name] if u.name in scores else math.inf), about
