"""Is it the input or the noise level told? Parts of a crossed result, and how much of its variation is due to which."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gddlab.errors import GddlabError, unknown
from gddlab.probing.plots.axes import Probed, Scale, rows_of
from gddlab.probing.plots.heatmaps import layers_down
from gddlab.probing.statistics import Statistic
from gddlab.sampling.schedules import nearest_level
from gddlab.theme import themed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

BLOCKS = 16
"""Blocks of images whose sums are kept, so that any number derived from a result has an error."""
NOTHING = 1e-12
"""Variation below this share of the size is rounding."""

Statistics = Mapping[str, Mapping[str, Statistic]]


class Crossing(Probed):
    """What a `ProbeResult` says of inputs and noise levels told that were crossed; attributes as there."""

    statistics: Statistics
    blocks: tuple[Statistics, ...]

    @property
    def told(self) -> list[float]:
        """Noise levels that the network was told for every input, descending; empty where it was told the input's."""
        return [float(t) for t in self.meta.get("told", ())]

    def fixed(self, *, told: float | None = None, sigma: float | None = None) -> Self:
        """One line of a crossed result: one level told and all inputs, or one input and all levels told.

        Args:
            told: The level told; the nearest one measured is taken. The result is that of a probe in which the network
                is told this level whatever the input's is.
            sigma: The input's noise level, the nearest one measured; the result's column `sigma` is the level told.

        Returns:
            A result without `told`, with all methods of one but `merge`, for which the crossed results are merged
            first; similarities are to the largest level of the line.

        Raises:
            GddlabError: The result is not crossed, or both or neither is given.
        """
        levels, given = self._crossed(), [told, sigma]
        if (told is None) == (sigma is None):
            raise GddlabError(f"fixed(told={told}, sigma={sigma}): give one of them")
        axis = 0 if told is None else 1
        value = nearest_level(levels[axis], next(x for x in given if x is not None), ("sigma", "told")[axis])
        where = levels[axis].index(value)
        grid = np.arange(len(levels[0]) * len(levels[1])).reshape(len(levels[0]), -1)
        line = grid[:, where] if axis else grid[where]
        return self._at(line.tolist(), levels[1 - axis], {"fixed": {"told" if axis else "sigma": value}})

    def diagonal(self) -> Self:
        """The part of a crossed result in which the network is told its input's level: what `probe` measures without.

        Raises:
            GddlabError: The result is not crossed, or no level is both an input's and told.
        """
        sigmas, told = self._crossed()
        shared = [s for s in sigmas if s in told]
        if not shared:
            raise GddlabError(f"no input's level is told, of {sigmas} and {told}: give fixed(told=) one of the latter")
        return self._at([sigmas.index(s) * len(told) + told.index(s) for s in shared], shared, {"fixed": {}})

    def effects(self, stat: str) -> pd.DataFrame:
        """Shares of a statistic's variation that are due to the input, to what the network is told, and to both.

        A two-way analysis of variance over the grid of inputs and levels told: "input" is the share of the variance of
        the means over levels told, "told" that of the means over inputs, "both" the rest, which neither explains alone.
        For a statistic that compares noise levels, such as "correlation", it is that of the activations themselves,
        as vectors, from the inner products of all pairs.

        Returns:
            One row per layer: `input`, `told`, `both`, which add up to 1, NaN where nothing varies; `spread`,
            sqrt(variance / mean square); and their standard errors over images, `sem_input` and so on, by the
            jackknife over `blocks`.

        Raises:
            GddlabError: The result is not crossed; `stat` was not measured.
        """
        import pandas as pd

        self._crossed()
        layers, value, sem = self._derived(stat, self._shares)
        names = ["input", "told", "both", "spread"]
        table = pd.DataFrame(value, layers, names).rename_axis("layer")
        return table.join(pd.DataFrame(sem, layers, [f"sem_{n}" for n in names]).rename_axis("layer"))

    def responses(self, similarity: str = "correlation", size: str = "rel_update", at: float = 80.0) -> pd.DataFrame:
        """How much layers respond to what is varied, in two numbers, beside null models.

        Args:
            similarity: A statistic that compares noise levels: its value between the largest and the smallest level.
            size: A positive statistic: log2 of its largest over its smallest value among the levels, in octaves.
            at: The level that is told throughout, or at which the input stays; the nearest one measured is taken.

        Returns:
            One row for each thing varied, of this network and of each kind of null model: `varied`, `network`, and for
            both statistics the median over layers, its standard error (over images by the jackknife over `blocks`; of
            null models over draws), and the quartiles over layers. Without `told`, input and level vary together; with
            neither `told` nor null models there are no blocks, and the error is NaN.

        Raises:
            GddlabError: A statistic was not measured, or is not of this kind.
        """
        import pandas as pd

        for stat, across in ((similarity, True), (size, False)):
            name, _ = self._find(stat)
            if next(by[name] for by in self.statistics.values() if name in by).across != across:
                kind = "compares no noise levels" if across else "compares noise levels"
                raise GddlabError(
                    f"{stat!r} {kind}: give similarity= a statistic that does, and size= one that does not"
                )
        rows = []
        for varied, line in self._lines(at).items():
            row: dict[str, Any] = {"varied": varied, "network": "trained"}
            for stat in (similarity, size):
                row |= self._response(stat, line)
            rows.append(row)
            for kind, draws in self.nulls.items():
                row = {"varied": varied, "network": kind}
                for stat in (similarity, size):
                    found = [draw._response(stat, line) for draw in draws]
                    row |= {key: float(np.mean([f[key] for f in found])) for key in found[0]}
                    row[f"{stat}_sem"] = standard_error([f[stat] for f in found])
                rows.append(row)
        return pd.DataFrame(rows)

    @themed
    def effects_heatmap(self, stat: str, ax: Axes | None = None) -> Axes:
        """Draws `effects`: of each layer's variation, the shares due to the input, to the level told, and to both.

        Null models are strips at the right, the mean over their draws.

        Raises:
            GddlabError: The result is not crossed; `stat` was not measured.
        """
        columns = ["input", "told", "both"]
        table = self.effects(stat)
        rows = rows_of(self.frame, table.index)
        parts = table[columns].rename(columns={"told": "level told"})
        nulls = {
            kind: np.mean([draw.effects(stat).loc[table.index, columns] for draw in draws], axis=0)
            for kind, draws in self.nulls.items()
        }
        scale = Scale("linear", 0.0, 1.0, 1.0, missing=bool(parts.isna().any(axis=None)))
        look: dict[str, Any] = {"width": 4.6, "scale": scale, "label": "share of the variance", "nulls": nulls}
        ax = layers_down(ax, self.frame, stat, parts, rows, **look)
        ax.set_title(f"{stat}: what it responds to\n{self._about(stat)}", loc="left")
        return ax

    # Inside.

    def _crossed(self) -> tuple[list[float], list[float]]:
        if not self.told:
            raise GddlabError('this result is not crossed: probe with told="cross", or a list of levels to tell')
        if not self.statistics:
            raise GddlabError("this result has lost its sums over images: ask before results are joined")
        return [float(s) for s in self.meta["sigmas"]], self.told

    def _lines(self, at: float) -> dict[str, list[int]]:
        """What varies, and the positions of the rows that differ in it, largest level first."""
        sigmas = [float(s) for s in self.meta["sigmas"]]
        both = "the input and what the network is told"
        if not self.told:
            return {both: list(range(len(sigmas)))}
        told = self.told
        t, s = nearest_level(told, at), nearest_level(sigmas, at)
        lines = {both: [i * len(told) + told.index(x) for i, x in enumerate(sigmas) if x in told]}
        alone = f"the input, the network being told {t:g}"
        lines[alone] = [i * len(told) + told.index(t) for i in range(len(sigmas))]
        label = f"what the network is told, the input staying at {s:g}"
        lines[label] = [sigmas.index(s) * len(told) + j for j in range(len(told))]
        return {k: v for k, v in lines.items() if len(v) > 1}

    def _at(self, rows: Sequence[int], levels: list[float], about: dict[str, Any]) -> Self:
        """The result at some rows of the grid, as one over `levels`."""
        result: Any = self

        def chosen(statistics: Statistics) -> dict[str, dict[str, Statistic]]:
            return {layer: {k: s.at(rows) for k, s in by.items()} for layer, by in statistics.items()}

        meta = {k: v for k, v in copy.deepcopy(self.meta).items() if k != "told"} | about
        blocks = [chosen(b) for b in self.blocks]
        out: Any = result.of(result._measured(), levels, chosen(self.statistics), meta, blocks)
        for stat in [s for s in out.stats if s in out.matrices]:  # sums of their squares are for another first level
            layers, _, sem = out._derived(stat, lambda s, _: s.result()[0])
            errors = {(n, level): sem[i, j] for i, n in enumerate(layers) for j, level in enumerate(levels)}
            mine = out.frame["stat"] == stat
            where = out.frame.loc[mine, ["layer", "sigma"]].itertuples(index=False, name=None)
            out.frame.loc[mine, "sem"] = [errors[key] for key in where]
        empty = out.frame[out.frame["value"].isna()]
        cells = {(n, about["fixed"].get("sigma", s)) for n, s in zip(empty["layer"], empty["sigma"], strict=True)}
        out.meta["nonfinite"] = [b for b in out.meta["nonfinite"] if (b["layer"], b["sigma"]) in cells]
        nulls = {kind: tuple(r._at(rows, levels, about) for r in draws) for kind, draws in self.nulls.items()}
        return out.copy(nulls=nulls)

    def _derived(
        self,
        stat: str,
        number: Callable[[Statistic, int], Tensor],
        summary: Callable[[Tensor], Tensor] = lambda each: each,
    ) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Layers that have a statistic, a number (or several) derived from it, and its error by the jackknife.

        `number` takes the statistic of a layer and which of its parts is meant; `summary` the numbers of all layers.
        """
        name, part = self._find(stat)
        layers = [layer for layer, by in self.statistics.items() if name in by]
        whole = [self.statistics[layer][name] for layer in layers]
        value = summary(torch.stack([number(s, part) for s in whole]))
        left = [
            summary(torch.stack([number(w.without(b[n][name]), part) for w, n in zip(whole, layers, strict=True)]))
            for b in self.blocks
        ]
        return layers, value.numpy(), jackknife(left, value, self._sizes(name)).numpy()

    def _sizes(self, name: str) -> list[int]:
        """Samples of a statistic in each block."""
        return [next(by[name].samples for by in b.values() if name in by) for b in self.blocks]

    def _find(self, stat: str) -> tuple[str, int]:
        """The statistic behind a name of the frame, and which of its parts it is."""
        for by in self.statistics.values():
            for name, s in by.items():
                names = [f"{name}_{p}" for p in s.parts] or [name]
                if s.in_frame and stat in names:
                    return name, names.index(stat)
        if not self.statistics and stat in set(self.frame["stat"]):
            raise GddlabError("this result has lost its sums over images: ask before results are joined")
        raise unknown("statistic of this result", stat, dict.fromkeys(self.frame["stat"]))

    def _shares(self, stat: Statistic, part: int) -> Float[Tensor, " 4"]:
        shape = (len(self.meta["sigmas"]), len(self.told))
        if stat.across:
            return shares((stat.sums["matrix"] / stat.samples).reshape(*shape, *shape))
        v = stat.result()[0].reshape(shape[0] * shape[1], -1)[:, part].reshape(shape)
        return shares(torch.einsum("st,uv->stuv", v, v))

    def _response(self, stat: str, line: Sequence[int]) -> dict[str, float]:
        """Median over layers of how much a statistic changes along a line, its error, and the quartiles."""
        rows = list(line)

        def change(s: Statistic, part: int) -> Tensor:
            if s.across:
                m = s.sums["matrix"]
                return m[rows[0], rows[-1]] / (m[rows[0], rows[0]] * m[rows[-1], rows[-1]]).sqrt()
            v = s.result()[0].reshape(len(s.sums["first"]), -1)[rows, part]
            return (v.amax() / v.amin()).log2() if v.amin() > 0 else v.new_full((), torch.nan)

        quartiles = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
        _, value, sem = self._derived(stat, change, lambda each: each.nanquantile(quartiles))
        out = {"": value[0], "_sem": sem[0], "_q25": value[1], "_q75": value[2]}
        return {f"{stat}{suffix}": float(x) for suffix, x in out.items()}


def shares(inner: Float[Tensor, "s t s t"]) -> Float[Tensor, " 4"]:
    """Shares of the variance of vectors on an S x T grid due to rows, to columns and to both, and the spread, (4,).

    `inner` holds their inner products. With a the vectors, a_s their means over t, a_t over s and m over all: the
    variance is mean |a - m|^2; of it rows explain mean |a_s - m|^2, columns mean |a_t - m|^2 (two-way analysis of
    variance without replication). The spread is sqrt(variance / mean |a|^2). Shares are NaN where nothing varies.
    """
    s, t = inner.shape[:2]
    size, middle = torch.einsum("stst->", inner) / (s * t), inner.mean()
    rows = torch.einsum("stsu->", inner) / (s * t * t) - middle
    columns = torch.einsum("stut->", inner) / (s * s * t) - middle
    variance = size - middle
    if not variance > NOTHING * size:
        return torch.stack([*[variance.new_full((), torch.nan)] * 3, variance.clamp(min=0).sqrt()])
    return torch.stack([rows, columns, variance - rows - columns, (variance / size).sqrt() * variance]) / variance


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean of independent values; NaN for one."""
    return float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def jackknife(left: Sequence[Tensor], whole: Tensor, sizes: Sequence[int]) -> Tensor:
    """Standard error of a number from its values without each of several parts of the images; NaN for fewer than two.

    Parts may differ in size (Busing, Meijer & van der Leeden 1999, "Delete-m jackknife for unequal m"). Of K equal
    parts it is the root of (K - 1) / K times the sum of squared deviations from their mean.

    Args:
        left: The number without each of K parts, each of the shape of `whole`.
        whole: The number from all; one or several.
        sizes: Images of each part.
    """
    k = len(left)
    if k < 2:
        return torch.full_like(whole, torch.nan)
    part = torch.tensor(sizes, dtype=whole.dtype)
    part = (part / part.sum()).reshape(-1, *[1] * whole.ndim)  # (K, 1, ...)
    values = torch.stack(list(left))
    pseudo = (whole - (1 - part) * values) / part  # (K, ...)
    estimate = k * whole - ((1 - part) * values).sum(0)
    return (((pseudo - estimate).square() * part / (1 - part)).sum(0) / k).sqrt()
