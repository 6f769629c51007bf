"""What a probe found: a tidy table, Gram matrices, and where they come from."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gddlab.errors import GddlabError, NotFound, unknown
from gddlab.files import atomic_path, read_json
from gddlab.probing.hooks import Probe
from gddlab.probing.statistics import Cosine

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["COLUMNS", "FORMAT", "ProbeResult"]

FORMAT = "gddlab-probe-1"
COLUMNS = (
    *("layer", "block", "kind", "stage", "resolution", "depth", "n_params"),
    *("sigma", "stat", "value", "sem", "n_images", "unit"),
)


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """Statistics of layers over noise levels.

    Attributes:
        frame: A row a layer, noise level and statistic, columns `COLUMNS`; layers in the order of the network, sigma
            (data scale) descending; `sem` is the standard error over images, NaN for one image.
        gram: Cosines between noise levels by layer, (S, S) float64, same order of sigma; where "cosine" was measured.
        meta: Network, data, seed, noise levels, versions, definitions of the statistics, non-finite activations,
            and the network's parameters, from which masks are made.
    """

    frame: pd.DataFrame
    gram: dict[str, np.ndarray]
    meta: dict[str, Any]

    @classmethod
    def of(cls, probe: Probe, meta: dict[str, Any]) -> ProbeResult:
        """The result of a finished `Probe`."""
        import pandas as pd

        rows: list[tuple[Any, ...]] = []
        matrices: dict[str, np.ndarray] = {}
        for layer in probe.layers:
            about = (*(getattr(layer, c) for c in COLUMNS[1:7]),)
            for name, stat in probe.statistics[layer.name].items():
                value, sem = (x.tolist() for x in stat.result())
                for sigma, v, e in zip(probe.sigmas, value, sem, strict=True):
                    rows.append((layer.name, *about, sigma, name, v, e, stat.n_images, stat.unit))
                if isinstance(stat, Cosine):
                    matrices[layer.name] = stat.matrix().cpu().numpy()
        frame = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"resolution": "Int64"})
        return cls(frame, matrices, meta)

    @property
    def sigmas(self) -> list[float]:
        """Noise levels, descending."""
        return [float(s) for s in self.meta["sigmas"]]

    @property
    def stats(self) -> list[str]:
        """Statistics in the frame."""
        return list(dict.fromkeys(self.frame["stat"]))

    @property
    def hash(self) -> str:
        """sha256 of the frame and of the network's fingerprint."""
        table = self.frame.to_csv(index=False, float_format="%.17g")
        return hashlib.sha256((str(self.meta["model"]["fingerprint"]) + table).encode()).hexdigest()

    def to_frame(self) -> pd.DataFrame:
        return self.frame

    def pivot(self, stat: str) -> pd.DataFrame:
        """Values of one statistic: layers in the order of the network down, noise levels across, descending.

        Raises:
            GddlabError: `stat` was not measured.
        """
        if stat not in self.stats:
            raise unknown("statistic", stat, self.stats)
        part = self.frame[self.frame["stat"] == stat]
        wide = part.pivot(index="layer", columns="sigma", values="value")
        return wide.loc[list(dict.fromkeys(part["layer"])), sorted(wide.columns, reverse=True)]

    def heatmap(self, stat: str, ax: Axes | None = None) -> Axes:
        """Draws one statistic, layers down, noise levels across (log scale); a colour scale that colour-blind people can read.

        Args:
            stat: A statistic of the frame.
            ax: Where to draw; None makes a figure that fits the number of layers.

        Raises:
            GddlabError: `stat` was not measured.
        """
        from gddlab.probing.plots import draw_heatmap

        return draw_heatmap(self, stat, ax)

    def similarity(self, layer: str, ax: Axes | None = None) -> Axes:
        """Draws the cosines of one layer's outputs between all pairs of noise levels.

        Raises:
            GddlabError: No Gram matrix of `layer`.
        """
        from gddlab.probing.plots import draw_similarity

        return draw_similarity(self, layer, ax)

    def save(self, folder: str | Path) -> None:
        """Writes `frame.parquet`, `gram.npz` and `meta.json`: all are written before the first replaces an older one."""
        folder = Path(folder)
        parquet, npz = io.BytesIO(), io.BytesIO()
        self.frame.to_parquet(parquet, index=False)
        np.savez_compressed(npz, **self.gram)  # type: ignore[arg-type]
        files = {"frame.parquet": parquet.getvalue(), "gram.npz": npz.getvalue()}
        sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        meta = {"format": FORMAT, "files": sums, **self.meta}
        files["meta.json"] = (json.dumps(meta, indent=2, allow_nan=False) + "\n").encode()
        with contextlib.ExitStack() as stack:
            for name, content in files.items():
                stack.enter_context(atomic_path(folder / name)).write_bytes(content)

    @classmethod
    def load(cls, folder: str | Path) -> ProbeResult:
        """Reads what `save` wrote.

        Raises:
            NotFound: No such folder, or a file is missing in it.
            GddlabError: Not a probe result, or its files do not belong together.
        """
        import pandas as pd

        folder = Path(folder)
        meta = read_json(folder / "meta.json")
        if not isinstance(meta, dict) or meta.pop("format", None) != FORMAT:
            raise GddlabError(f"{folder} holds no probe result: give a folder that ProbeResult.save wrote")
        content = {}
        for name, expected in meta.pop("files").items():
            if not (folder / name).is_file():
                raise NotFound(f"no such file: {folder / name}")
            content[name] = (folder / name).read_bytes()
            if hashlib.sha256(content[name]).hexdigest() != expected:
                raise GddlabError(f"{folder / name} is not the file that meta.json names: probe again, or restore it")
        with np.load(io.BytesIO(content["gram.npz"]), allow_pickle=False) as z:
            matrices = {k: z[k] for k in z.files}
        return cls(pd.read_parquet(io.BytesIO(content["frame.parquet"])), matrices, meta)

    def _repr_html_(self) -> str:
        data = self.meta["data"]["name"] if self.meta["data"] else "none"
        rows = {
            "network": f"{self.meta['model']['class']}, {self.meta['model']['fingerprint'][:12]}",
            "states": f"{self.meta['states']}, data {data}, {self.meta['n_images']} images, seed {self.meta['seed']}",
            "sigma": f"{len(self.sigmas)} levels, {self.sigmas[0]:g} to {self.sigmas[-1]:g}",
            "layers": str(self.frame["layer"].nunique()),
            "statistics": ", ".join(self.stats),
        }
        if bad := self.meta["nonfinite"]:
            rows["not finite"] = f"{bad[0]['layer']} at sigma {bad[0]['sigma']:g}, {len(bad)} places in all"
        cells = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows.items())
        return f"<table><caption>ProbeResult</caption>{cells}</table>"
