"""What a probe found: a tidy table, matrices between noise levels, numbers of channels, and where they come from."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from gddlab.errors import GddlabError, unknown
from gddlab.files import hash_tensors
from gddlab.nets import Precond, architecture
from gddlab.probing.drawing import Pictures
from gddlab.probing.layers import Layer, denoiser_of, inventory, parameter_table, plain_name, unwrap
from gddlab.probing.statistics import Statistic
from gddlab.provenance import versions

if TYPE_CHECKING:
    import pandas as pd
__all__ = ["COLUMNS", "ProbeResult", "Statistics", "network_meta"]

COLUMNS = (
    *("layer", "block", "kind", "stage", "resolution", "depth", "n_params"),
    *("sigma", "stat", "value", "sem", "n_images", "unit"),
)
Statistics = Mapping[str, Mapping[str, Statistic]]
"""By layer name and statistic name."""


def network_meta(model: nn.Module, measured: Iterable[Layer] = ()) -> dict[str, Any]:
    """What a result says of its network: class, fingerprint, architecture, parameters, layers."""
    names = {layer.name for layer in measured}
    bare, denoiser = unwrap(model), denoiser_of(model)
    about: dict[str, Any] = {"class": type(bare).__name__}
    about["fingerprint"] = hash_tensors({plain_name(k): v for k, v in bare.state_dict().items()})
    if isinstance(denoiser, Precond):
        about |= architecture(denoiser)
    return {
        "model": about,
        "parameters": [[name, list(shape)] for name, shape in parameter_table(bare)],
        "layers": [layer.to_dict() for layer in inventory(bare).values() if layer.type or layer.name in names],
    }


@dataclass(frozen=True, eq=False)
class ProbeResult(Pictures):
    """Statistics of layers over noise levels.

    Attributes:
        frame: A row a layer, noise level and statistic, columns `COLUMNS`; layers in the order of the network, sigma
            (data scale) descending; `sem` is the standard error over images, NaN for one image.
        meta: Network, data, seed, noise levels, versions, definitions of the statistics, non-finite activations,
            and the network's parameters, from which masks are made.
        matrices: By statistic ("cosine", "cka") and layer: noise levels against each other, (S, S) float64, same order of sigma.
        channels: By layer: "mean" and "var" of each channel, (S, C) float64, with `per_channel=True`.
        statistics: The sums behind the table, by layer and statistic; they let results merge. Empty where values are not
            means over images.
    """

    frame: pd.DataFrame
    meta: dict[str, Any]
    matrices: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    channels: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    statistics: Statistics = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, layers: Iterable[Layer], sigmas: Sequence[float], statistics: Statistics, meta: Mapping[str, Any]
    ) -> ProbeResult:
        """The table of statistics that have seen their images.

        Args:
            layers: What was measured, in the order of the network.
            sigmas: Noise levels, descending.
            statistics: By layer name and statistic name.
            meta: What to add to the statistics' definitions and the versions.
        """
        import pandas as pd

        rows: list[tuple[Any, ...]] = []
        matrices: dict[str, dict[str, np.ndarray]] = {}
        channels: dict[str, dict[str, np.ndarray]] = {}
        about: dict[str, dict[str, str]] = {}
        for layer in layers:
            place = (*(getattr(layer, c) for c in COLUMNS[1:7]),)
            for stat in statistics[layer.name].values():
                about[stat.name] = stat.describe()
                if (matrix := stat.matrix()) is not None:
                    matrices.setdefault(stat.name, {})[layer.name] = matrix.cpu().numpy()
                if found := stat.channels():
                    channels[layer.name] = {k: v.cpu().numpy() for k, v in found.items()}
                if not stat.in_frame:
                    continue
                value, sem = (x.reshape(len(sigmas), -1).tolist() for x in stat.result())
                names = [f"{stat.name}_{p}" for p in stat.parts] or [stat.name]
                for k, name in enumerate(names):
                    rows += [
                        (layer.name, *place, sigma, name, v[k], e[k], stat.n_images, stat.unit)
                        for sigma, v, e in zip(sigmas, value, sem, strict=True)
                    ]
        frame = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"resolution": "Int64"})
        full = {**meta, "sigmas": list(sigmas), "stats": about, "versions": versions()}
        return cls(frame, {"nonfinite": [], **full}, matrices, channels, statistics)

    @property
    def gram(self) -> dict[str, np.ndarray]:
        """Cosines between noise levels by layer, (S, S); where "cosine" was measured."""
        return self.matrices.get("cosine", {})

    @property
    def sigmas(self) -> list[float]:
        """Noise levels, descending."""
        return [float(s) for s in self.meta["sigmas"]]

    @property
    def stats(self) -> list[str]:
        """Statistics in the frame."""
        return list(dict.fromkeys(self.frame["stat"]))

    @property
    def layers(self) -> list[str]:
        """Layers in the frame, in the order of the network."""
        return list(dict.fromkeys(self.frame["layer"]))

    @property
    def hash(self) -> str:
        """sha256 of the frame and of the network's fingerprint."""
        table = self.frame.to_csv(index=False, float_format="%.17g")
        return hashlib.sha256((str(self.meta["model"]["fingerprint"]) + table).encode()).hexdigest()

    def to_frame(self) -> pd.DataFrame:
        return self.frame

    def pivot(self, stat: str, values: str = "value") -> pd.DataFrame:
        """One statistic: layers in the order of the network down, noise levels across, descending.

        Args:
            stat: A statistic of the frame.
            values: "value" or "sem".

        Raises:
            GddlabError: `stat` was not measured.
        """
        if stat not in self.stats:
            raise unknown("statistic", stat, self.stats)
        if values not in ("value", "sem"):
            raise unknown("column", values, ("value", "sem"))
        part = self.frame[self.frame["stat"] == stat]
        wide = part.pivot(index="layer", columns="sigma", values=values)
        return wide.loc[list(dict.fromkeys(part["layer"])), sorted(wide.columns, reverse=True)]

    def nearest(self, at: float, stat: str | None = None) -> float:
        """The noise level nearest to `at`, on the log scale; among those at which `stat` was measured, if it is given.

        Raises:
            GddlabError: `at` is no sigma.
        """
        if isinstance(at, bool) or not isinstance(at, int | float) or not (math.isfinite(at) and at > 0):
            raise GddlabError(f"at={at!r}: give a sigma above 0")
        levels = self.sigmas if stat is None else [float(s) for s in self.pivot(stat).columns]
        return min(levels, key=lambda s: abs(math.log(s / at)))

    def contrast(self, stat: str, at: float = 80.0) -> pd.DataFrame:
        """How much a statistic at one noise level, where the student lives, differs from the others.

        Args:
            stat: A statistic of the frame.
            at: A sigma; the nearest one measured is taken.

        Returns:
            A row a layer: `at` (the value there), `sem`, `others` (median over the other noise levels), `difference` (at - others), `ratio`
            (at / others), `z` (difference in standard deviations of the others over noise levels).

        Raises:
            GddlabError: `stat` was not measured, or at one noise level only.
        """
        import pandas as pd

        table = self.pivot(stat)
        sigma = self.nearest(at, stat)
        rest = table.drop(columns=sigma)
        if rest.shape[1] == 0:
            raise GddlabError(f"{stat!r} was measured at sigma {sigma:g} alone: a contrast needs other noise levels")
        others = rest.median(axis=1)
        out = pd.DataFrame({"at": table[sigma], "sem": self.pivot(stat, "sem")[sigma], "others": others})
        out["difference"] = out["at"] - others
        out["ratio"] = out["at"] / others
        out["z"] = out["difference"] / rest.std(axis=1)
        return out

    def merge(self, *others: ProbeResult) -> ProbeResult:
        """Adds results of the same network, layers, statistics and noise levels on other images.

        Raises:
            GddlabError: They measure something else, or some of the same images; or values are no means over images.
        """
        from gddlab.probing.combining import merge

        return merge(self, *others)

    def join(self, *others: ProbeResult) -> ProbeResult:
        """Puts layers, statistics or noise levels of other results of the same network beside these.

        The sums are gone afterwards, so merge first; matrices and channels stay where all results have the same noise levels.

        Raises:
            GddlabError: Another network, or the same layer, statistic and sigma twice.
        """
        from gddlab.probing.combining import join

        return join(self, *others)

    def save(self, folder: str | Path) -> None:
        """Writes `frame.parquet`, `arrays.npz` and `meta.json`: all are written before the first replaces an older one."""
        from gddlab.probing.storage import save

        save(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path) -> ProbeResult:
        """Reads what `save` wrote.

        Raises:
            NotFound: No such folder, or a file is missing in it.
            GddlabError: Not a probe result, or its files do not belong together.
        """
        from gddlab.probing.storage import load

        return load(Path(folder))

    def copy(self, **changes: Any) -> ProbeResult:
        """This result with other fields; meta data are copied."""
        return replace(self, **{"meta": copy.deepcopy(self.meta), **changes})

    def _repr_html_(self) -> str:
        data = self.meta["data"]["name"] if self.meta["data"] else "none"
        rows = {
            "network": f"{self.meta['model']['class']}, {self.meta['model']['fingerprint'][:12]}",
            "states": f"{self.meta['states']}, data {data}, {self.meta['n_images']} images, seed {self.meta['seed']}",
            "sigma": f"{len(self.sigmas)} levels, {self.sigmas[0]:g} to {self.sigmas[-1]:g}",
            "layers": str(len(self.layers)),
        }
        if bad := self.meta["nonfinite"]:
            rows["not finite"] = f"{bad[0]['layer']} at sigma {bad[0]['sigma']:g}, {len(bad)} places in all"
        cells = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows.items())
        top = self.sigmas[0]
        table = self.frame.groupby("stat", sort=False)["value"].agg(["count", "min", "median", "max"])
        table[f"median at {top:g}"] = self.frame[self.frame["sigma"] == top].groupby("stat")["value"].median()
        shown = table.to_html(float_format="{:.3g}".format)
        return f"<table><caption>ProbeResult</caption>{cells}</table>{shown}"
