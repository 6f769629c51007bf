"""`ProbeResult`: a table of what was measured, matrices between noise levels, channels, and their origin."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from gddlab.errors import GddlabError, NotFound, shown, unknown
from gddlab.files import atomic_path, check_kind, folder_of, hash_tensors, holds_format, path_of, read_json
from gddlab.nets import Precond, architecture
from gddlab.nets.bare import denoiser_of, unwrap, weights_of
from gddlab.probing.crossing import Crossing
from gddlab.probing.layers import Layer, depth_of, inventory, parameter_table, plain_name
from gddlab.probing.null import AgainstNulls
from gddlab.probing.plots.axes import wide
from gddlab.probing.plots.heatmaps import Heatmaps
from gddlab.probing.plots.lines import Lines
from gddlab.probing.plots.readouts import Readouts
from gddlab.probing.plots.similarities import Similarities
from gddlab.probing.sites import COND, Site
from gddlab.probing.statistics import Given, Statistic
from gddlab.provenance import versions
from gddlab.sampling.schedules import nearest_level

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "gddlab-probe-2"

COLUMNS = (
    *("layer", "block", "kind", "stage", "resolution", "depth", "n_params"),
    *("stream", "branch", "call"),
    *("sigma", "stat", "value", "sem", "n_images", "unit"),
)
SITE: Mapping[str, Any] = dict(zip(COLUMNS[7:10], ("", COND, 1), strict=True))
"""Columns of where in a layer a number was read, and what they are of a layer that has one such place."""

Statistics = Mapping[str, Mapping[str, Statistic]]
"""By layer name, or key of a site, and statistic name."""


def sites_meta(sites: Mapping[str, Site]) -> dict[str, Any]:
    """For the meta data of a result: by key, the sites that are not simply a layer."""
    found = {key: site._asdict() for key, site in sites.items() if site != Site(key)}
    return {"sites": found} if found else {}


def network_meta(model: nn.Module, measured: Iterable[Layer] = ()) -> dict[str, Any]:
    """What a result says about its network: class, fingerprint, architecture, parameters, layers."""
    names = {layer.name for layer in measured}
    bare, denoiser = unwrap(model), denoiser_of(model)
    about: dict[str, Any] = {"class": type(bare).__name__}
    about["fingerprint"] = hash_tensors({plain_name(k): v for k, v in weights_of(bare).items()})
    if isinstance(denoiser, Precond):
        about |= architecture(denoiser)
    return {
        "model": about,
        "parameters": [[name, list(shape)] for name, shape in parameter_table(bare)],
        "layers": [layer.to_dict() for layer in inventory(bare).values() if layer.type or layer.name in names],
        **({"depth_of": "blocks"} if depth_of(bare) == "blocks" else {}),
    }


@dataclass(frozen=True, eq=False)
class ProbeResult(Heatmaps, Lines, Similarities, Readouts, Crossing, AgainstNulls):
    """Statistics of layers over noise levels.

    Methods that draw take `ax` and return it; without one they make a figure that fits. `stat` is always the name of a
    statistic in the frame.

    Attributes:
        frame: One row per layer, noise level and statistic, columns `COLUMNS`; layers in the order of the network,
            those with several measured places (see `probe`) as often as they have such: `layer` is the key of the
            place, `stream`, `branch` and `call` what it is, "", "cond" and 1 where there is one, 0 for a mean over
            calls; sigma (data scale) descending; `sem` is the standard error over images, NaN for one image.
        meta: Network, data, seed, noise levels, versions, definitions of the statistics, non-finite activations,
            and the network's parameters, from which masks are made. Where inputs and levels told were crossed, `told`;
            of a part of such a result, `fixed`.
        matrices: By statistic ("correlation", "cosine", "cka") and layer: noise levels against each other, (S, S)
            float64, in the order of `sigmas`, or of sigmas x told.
        channels: By layer: "mean" and "var" of each channel, (S, C) float64, with `per_channel=True`.
        statistics: The sums behind the table, by layer and statistic, by which results merge. Empty where values are
            not means over images.
        blocks: The same sums of each of up to 16 blocks of the images, from which errors of derived numbers follow;
            kept where inputs and levels told were crossed, or null models measured.
        nulls: Results of null models on the same inputs, by kind, one per draw.
    """

    frame: pd.DataFrame
    meta: dict[str, Any]
    matrices: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    channels: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    statistics: Statistics = field(default_factory=dict, repr=False)
    blocks: tuple[Statistics, ...] = field(default=(), repr=False)
    nulls: dict[str, tuple[ProbeResult, ...]] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        f = self.frame
        counts = f"{f['layer'].nunique()} layers and blocks at {f['sigma'].nunique()} noise levels"
        return f"<ProbeResult: {', '.join(f['stat'].unique())} of {counts}>"

    @classmethod
    def of(
        cls,
        layers: Iterable[Layer],
        sigmas: Sequence[float],
        statistics: Statistics,
        meta: Mapping[str, Any],
        blocks: Iterable[Statistics] = (),
    ) -> ProbeResult:
        """The table of statistics that have seen their images.

        Args:
            layers: What was measured, in the order of the network.
            sigmas: Noise levels, descending.
            statistics: By layer name and statistic name.
            meta: Is added to the statistics' definitions and the versions. With `told`, statistics have a row for each
                of sigmas x told.
            blocks: The same of parts of the images.
        """
        import pandas as pd

        rows: list[tuple[Any, ...]] = []
        matrices: dict[str, dict[str, np.ndarray]] = {}
        channels: dict[str, dict[str, np.ndarray]] = {}
        about: dict[str, dict[str, str]] = {}
        told = [[t] for t in meta.get("told", ())] or [[]]
        levels = [(sigma, *t) for sigma in sigmas for t in told]
        at = COLUMNS.index("sigma") + 1
        columns = [*COLUMNS[:at], *(["told"] if "told" in meta else []), *COLUMNS[at:]]
        sites = meta.get("sites", {})
        for layer in layers:
            where = [getattr(layer, c) for c in COLUMNS[1:7]]
            where += [(SITE | sites.get(layer.name, {}))[c] for c in SITE]
            for stat in statistics[layer.name].values():
                about[stat.name] = stat.describe()
                if (matrix := stat.matrix()) is not None:
                    matrices.setdefault(stat.name, {})[layer.name] = matrix.cpu().numpy()
                if found := stat.channels():
                    channels.setdefault(layer.name, {}).update({k: v.cpu().numpy() for k, v in found.items()})
                if not stat.in_frame:
                    continue
                value, sem = (x.reshape(len(levels), -1).tolist() for x in stat.result())
                names = [f"{stat.name}_{p}" for p in stat.parts] or [stat.name]
                for k, name in enumerate(names):
                    rows += [
                        (layer.name, *where, *level, name, v[k], e[k], stat.n_images, stat.unit)
                        for level, v, e in zip(levels, value, sem, strict=True)
                    ]
        frame = pd.DataFrame(rows, columns=columns).astype({"resolution": "Int64"})
        full = {**meta, "sigmas": list(sigmas), "stats": about, "versions": versions()}
        sums: dict[str, dict[str, Statistic]] = {}
        for name, by_stat in statistics.items():
            if kept := {k: s for k, s in by_stat.items() if not isinstance(s, Given)}:
                sums[name] = kept
        return cls(frame, {"nonfinite": [], **full}, matrices, channels, sums, tuple(blocks))

    def copy(self, **changes: Any) -> ProbeResult:
        """This result with other fields; meta data are copied."""
        return replace(self, **{"meta": copy.deepcopy(self.meta), **changes})

    # What is in it.

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
        frame = self.frame
        if all((frame[column] == value).all() for column, value in SITE.items()):
            frame = frame.drop(columns=[*SITE])  # as it was before there were other places
        table = frame.to_csv(index=False, float_format="%.17g")
        return hashlib.sha256((str(self.meta["model"]["fingerprint"]) + table).encode()).hexdigest()

    def to_frame(self) -> pd.DataFrame:
        return self.frame

    def pivot(self, stat: str, values: str = "value") -> pd.DataFrame:
        """One statistic, "value" or "sem": layers in the order of the network down, noise levels across, descending.

        Raises:
            GddlabError: `stat` was not measured.
        """
        if values not in ("value", "sem"):
            raise unknown("column", values, ("value", "sem"))
        return wide(self.frame, stat, values).iloc[:, ::-1]

    def nearest(self, at: float, stat: str | None = None) -> float:
        """The measured noise level nearest to `at` on a log scale; with `stat`, of those at which it was measured.

        Raises:
            GddlabError: `at` is no sigma; `stat` was not measured.
        """
        return nearest_level(self.sigmas if stat is None else [float(s) for s in self.pivot(stat).columns], at)

    def contrast(self, stat: str, at: float = 80.0) -> pd.DataFrame:
        """How much a statistic at one noise level differs from the others; at 80, the default, the student works.

        Args:
            at: A sigma; the nearest one measured is taken.

        Returns:
            One row per layer: `at` (the value there), `sem`, `others` (median over the other noise levels),
            `difference` (at - others), `ratio` (at / others), `z` (difference in standard deviations of the others over
            noise levels).

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
        top = self.sigmas[0]
        table = self.frame.groupby("stat", sort=False)["value"].agg(["count", "min", "median", "max"])
        table[f"median at {top:g}"] = self.frame[self.frame["sigma"] == top].groupby("stat")["value"].median()
        return html_table("ProbeResult", rows) + table.to_html(float_format="{:.3g}".format)

    # Together with other results.

    def merge(self, *others: ProbeResult) -> ProbeResult:
        """Adds results of the same network, layers, statistics and noise levels on other images.

        Raises:
            GddlabError: They measure something else, or some of the same images; or values are no means over images.
        """
        statistics = copy.deepcopy({n: dict(s) for n, s in self.statistics.items()})
        meta = copy.deepcopy(self.meta)
        for other in others:
            _check_same_network(self, other)
        for r in (self, *others):
            if {*r.meta["stats"]} != {name for s in r.statistics.values() for name in s}:
                raise GddlabError(
                    "a result without its sums over images does not merge: measure it with all images at once"
                )
        nulls = _draw_by_draw((self, *others), ProbeResult.merge)
        if any("fixed" in r.meta for r in (self, *others)):
            raise GddlabError(
                "a part of a crossed result does not merge: merge the crossed results, then take the part"
            )
        for other in others:
            _check_same_measurement(self, other)
            _check_other_images(meta, other.meta)
            meta["images"] += other.meta["images"]
            meta["nonfinite"] = _counted(meta["nonfinite"], other.meta["nonfinite"])
            for layer, by_name in statistics.items():
                for name, statistic in by_name.items():
                    statistic.merge(other.statistics[layer][name])
        meta["n_images"] = sum(stop - start for _, start, stop in meta["images"])
        blocks = [b for r in (self, *others) for b in r.blocks]
        return ProbeResult.of(self._measured(), self.sigmas, statistics, meta, blocks).copy(nulls=nulls)

    def _measured(self) -> list[Layer]:
        """The layers behind the sums, with the resolution found when they were measured."""
        import pandas as pd

        known = {d["name"]: d for d in self.meta["layers"]}
        size = dict(zip(self.frame["layer"], self.frame["resolution"], strict=True))
        pixels = {n: None if pd.isna(r) else int(r) for n, r in size.items()}
        out = []
        for key in self.statistics:
            layer = known[self._layer(key)]
            out.append(Layer(**{**layer, "name": key, "resolution": pixels.get(key, layer["resolution"])}))
        return out

    def join(self, *others: ProbeResult) -> ProbeResult:
        """Puts layers, statistics or noise levels of other results of the same network beside these.

        Merge first: a joined result has no sums, since these belong to one grid of noise levels. Matrices and channels
        are kept where all results have the same noise levels; null models where one result has them, or all the same.

        Raises:
            GddlabError: Another network, or the same layer, statistic and sigma twice.
        """
        import pandas as pd

        for other in others:
            _check_same_network(self, other)
        results = (self, *others)
        same_levels = len({tuple(r.sigmas) for r in results}) == 1
        for kind in {k for r in results for k in r.matrices}:
            if not same_levels and sum(kind in r.matrices for r in results) > 1:
                raise GddlabError(
                    f"{kind!r} compares the noise levels of one measurement: join results with equal sigmas"
                )
        if len({(tuple(r.told), *(r.meta.get("fixed") or {}).items()) for r in results}) > 1:
            raise GddlabError("these results are crossed differently: join what fixed() or diagonal() gives of each")
        frame = pd.concat([r.frame for r in results], ignore_index=True)
        twice = frame.duplicated(["layer", "sigma", "stat", *frame.columns.intersection(["told"])])
        if twice.any():
            row = frame[twice].iloc[0]
            raise GddlabError(
                f"{row['stat']!r} of layer {row['layer']!r} at sigma {row['sigma']:g} is in both results: "
                "merge() adds images; join() puts different measurements together"
            )
        meta = copy.deepcopy(self.meta)
        matrices: dict[str, dict[str, np.ndarray]] = {}
        channels: dict[str, dict[str, np.ndarray]] = {}
        for r in results:
            meta["stats"] |= r.meta["stats"]
            if same_levels:
                channels |= r.channels
                for kind, by_layer in r.matrices.items():
                    matrices.setdefault(kind, {}).update(by_layer)
        meta["sigmas"] = sorted({s for r in results for s in r.meta["sigmas"]}, reverse=True)
        meta["nonfinite"] = _counted(*(r.meta["nonfinite"] for r in results))
        keys = ("states", "data", "n_images", "seed", "stats", "settings")
        meta["joined"] = [{k: r.meta[k] for k in keys if k in r.meta} | {"hash": r.hash} for r in results]
        if sites := {key: site for r in results for key, site in r.meta.get("sites", {}).items()}:
            meta["sites"] = sites
        if not_run := {name: why for r in results for name, why in r.meta.get("not_run", {}).items()}:
            meta["not_run"] = not_run
        meta["layers"] = _all_layers([r.meta["layers"] for r in results])
        depth = {layer["name"]: i for i, layer in enumerate(meta["layers"])}
        places = dict.fromkeys(frame["layer"])
        depths = {key: depth.get(sites.get(key, {}).get("layer", key), len(depth)) for key in places}
        place = {key: i for i, key in enumerate(sorted(places, key=depths.__getitem__))}
        frame = frame.assign(_order=frame["layer"].map(place if sites else depths)).sort_values(
            ["_order", "stat", "sigma"], ascending=[True, True, False], kind="stable"
        )
        frame = frame.drop(columns="_order").reset_index(drop=True)
        having = [r for r in results if r.nulls]
        nulls = having[0].nulls if len(having) == 1 else _draw_by_draw(having, ProbeResult.join)
        return ProbeResult(frame, meta, matrices, channels, nulls=nulls)

    # On disk.

    @staticmethod
    def check_place(folder: str | Path) -> Path:
        """The folder for a result.

        Raises:
            GddlabError: It is a file, or holds other files and no result.
        """
        place = folder_of("folder", folder)
        check_kind(place, lambda path: holds_format(path / "meta.json", FORMAT), "probe result")
        return place

    def save(self, folder: str | Path) -> None:
        """Writes `frame.parquet`, `arrays.npz` and `meta.json`; no old file is replaced before all new ones exist.

        Results of null models are in folders inside, "null-KIND-DRAW".

        Raises:
            GddlabError: As for `check_place`: only another result is replaced.
        """
        folder = self.check_place(folder)
        parquet, npz = io.BytesIO(), io.BytesIO()
        self.frame.to_parquet(parquet, index=False)
        np.savez_compressed(npz, **self._arrays())  # type: ignore[arg-type]
        files = {"frame.parquet": parquet.getvalue(), "arrays.npz": npz.getvalue()}
        sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        meta = {"format": FORMAT, "files": sums, **self.meta}
        nulls = self._null_folders()
        if nulls:
            meta["nulls"] = {kind: [draw.hash for draw in draws] for kind, draws in self.nulls.items()}
        for name, null in nulls.items():
            null.save(folder / name)
        files["meta.json"] = (json.dumps(meta, indent=2, allow_nan=False) + "\n").encode()
        with contextlib.ExitStack() as stack:
            for name, content in files.items():
                stack.enter_context(atomic_path(folder / name)).write_bytes(content)
        for old in folder.glob("null-*-*"):
            if old.name not in nulls and holds_format(old / "meta.json", FORMAT):
                shutil.rmtree(old)

    @classmethod
    def _null(cls, folder: Path, expected: str) -> ProbeResult:
        """A null model that belongs to a result."""
        found = cls.load(folder)
        if found.hash != expected:
            raise GddlabError(f"{folder} is not the null model that meta.json names: probe again, or restore it")
        return found

    def _null_folders(self) -> dict[str, ProbeResult]:
        return {f"null-{kind}-{i}": null for kind, draws in self.nulls.items() for i, null in enumerate(draws)}

    def _arrays(self) -> dict[str, np.ndarray]:
        """Every array by "matrix|channel|sum|samples/NAME/.../LAYER": the layer is last, its name may hold a slash.

        Those of a block of images begin with "sum:BLOCK" or "samples:BLOCK".
        """
        out = {f"matrix/{kind}/{layer}": m for kind, by_layer in self.matrices.items() for layer, m in by_layer.items()}
        out |= {f"channel/{k}/{layer}": v for layer, found in self.channels.items() for k, v in found.items()}
        for block, statistics in {"": self.statistics, **{f":{i}": b for i, b in enumerate(self.blocks)}}.items():
            for layer, by_stat in statistics.items():
                for name, stat in by_stat.items():
                    out[f"samples{block}/{name}/{layer}"] = np.array(stat.samples)
                    out |= {f"sum{block}/{name}/{k}/{layer}": v.cpu().numpy() for k, v in stat.sums.items()}
        return out

    @classmethod
    def load(cls, folder: str | Path) -> ProbeResult:
        """Reads what `save` wrote.

        Raises:
            NotFound: No such folder, or a file is missing in it.
            GddlabError: Not a probe result, or its files do not belong together.
        """
        import pandas as pd

        folder = path_of("folder", folder)
        meta = read_json(folder / "meta.json")
        if not isinstance(meta, dict) or meta.pop("format", None) != FORMAT or not isinstance(meta.get("files"), dict):
            raise GddlabError(f"{folder} holds no probe result: give a folder that ProbeResult.save wrote")
        content = {}
        for name, expected in meta.pop("files").items():
            if not (folder / name).is_file():
                raise NotFound(f"no such file: {folder / name}")
            content[name] = (folder / name).read_bytes()
            if hashlib.sha256(content[name]).hexdigest() != expected:
                raise GddlabError(f"{folder / name} is not the file that meta.json names: probe again, or restore it")
        matrices: dict[str, dict[str, np.ndarray]] = {}
        channels: dict[str, dict[str, np.ndarray]] = {}
        found: dict[str, dict[str, dict[str, Statistic]]] = {"": {}}
        with np.load(io.BytesIO(content["arrays.npz"]), allow_pickle=False) as z:
            for key in z.files:
                sort, name, rest = key.split("/", 2)
                sort, _, block = sort.partition(":")
                if sort == "matrix":
                    matrices.setdefault(name, {})[rest] = z[key]
                elif sort == "channel":
                    channels.setdefault(rest, {})[name] = z[key]
                elif kind := _statistic(name, meta["stats"][name]["class"]):
                    # without its class, a user's statistic keeps its rows in the table and cannot merge
                    what, layer = ("", rest) if sort == "samples" else rest.split("/", 1)
                    stat = found.setdefault(block, {}).setdefault(layer, {}).setdefault(name, kind())
                    if sort == "samples":
                        stat.samples = int(z[key])
                    else:
                        stat.sums[what] = torch.from_numpy(z[key])
        nulls = {
            kind: tuple(cls._null(folder / f"null-{kind}-{i}", expected) for i, expected in enumerate(hashes))
            for kind, hashes in meta.pop("nulls", {}).items()
        }
        statistics, *blocks = found.values()
        frame = pd.read_parquet(io.BytesIO(content["frame.parquet"]))
        for column, value in SITE.items():  # older results have none
            if column not in frame:
                frame.insert(COLUMNS.index(column), column, value)
        return cls(frame, meta, matrices, channels, statistics, tuple(blocks), nulls)


def _draw_by_draw(
    results: Sequence[ProbeResult], together: Callable[..., ProbeResult]
) -> dict[str, tuple[ProbeResult, ...]]:
    """Null models of results that become one by `together`."""
    if len({tuple((kind, len(draws)) for kind, draws in sorted(r.nulls.items())) for r in results}) > 1:
        raise GddlabError("these results have different null models: probe with the same nulls= and null_draws=")
    return {
        kind: tuple(together(*draws) for draws in zip(*(r.nulls[kind] for r in results), strict=True))
        for kind in (results[0].nulls if results else ())
    }


def html_table(caption: str, rows: Mapping[str, str]) -> str:
    """Two columns; rows without text are omitted."""
    cells = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows.items() if v)
    return f"<table><caption>{escape(caption)}</caption>{cells}</table>"


def _statistic(name: str, identity: str) -> type[Statistic] | None:
    """The class of saved sums; older files give module and class for gddlab's own, too."""
    return Statistic.registry.get(name if identity.startswith("gddlab.") else identity)


def _check_same_network(first: ProbeResult, other: ProbeResult) -> None:
    if not isinstance(other, ProbeResult):
        raise GddlabError(f"{shown(other)} is no ProbeResult: give what probe, ablate and the like return")
    ours, theirs = (r.meta["model"]["fingerprint"] for r in (first, other))
    if ours != theirs:
        raise GddlabError(
            f"these results are of different networks ({ours[:12]}, {theirs[:12]}): give results of the same one"
        )


def _check_same_measurement(first: ProbeResult, other: ProbeResult) -> None:
    for key in ("states", "sigmas", "t", "told", "labels", "cond", "guidance", "codec", "settings", "sites"):
        if first.meta.get(key) != other.meta.get(key):
            raise GddlabError(
                f"{key} is {first.meta.get(key)} here, {other.meta.get(key)} there: merge equal measurements"
            )
    if (first.meta["data"] or {}).get("sha256") != (other.meta["data"] or {}).get("sha256"):
        raise GddlabError("these results are of different data: merge results of the same dataset")
    ours, theirs = ({(n, s) for n, by in r.statistics.items() for s in by} for r in (first, other))
    if ours != theirs:
        layer, stat = sorted(ours ^ theirs)[0]
        raise GddlabError(f"{stat!r} of layer {layer!r} is in one result alone: merge results of the same layers")


def _check_other_images(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    for seed, start, stop in theirs["images"]:
        for s, a, b in ours["images"]:
            # the seed of an image's noise is the sum of seed and position
            low, high = max(start + seed - s, a), min(stop + seed - s, b)
            if low < high:
                other = "" if s == seed else f", or the same noise with seed {seed}"
                raise GddlabError(
                    f"both results saw images {low} to {high} of seed {s}{other}: probe others with start=, or with a "
                    "seed further away than n"
                )


def _all_layers(lists: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Layers of one network from lists that hold some of them, each in its order."""
    out = {layer["name"]: layer for layer in lists[0]}
    for layers in lists[1:]:
        if new := [i for i, layer in enumerate(layers) if layer["name"] not in out]:
            order = list(out)
            for i in new:
                order.insert(order.index(layers[i - 1]["name"]) + 1 if i else 0, layers[i]["name"])
            out |= {layers[i]["name"]: layers[i] for i in new}
            out = {name: out[name] for name in order}
    return list(out.values())


def _counted(*lists: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of `meta["nonfinite"]`, those of one layer, side and sigma added up."""
    counts: Counter[tuple[str, str, float]] = Counter()
    for b in itertools.chain(*lists):
        counts[b["layer"], b["side"], b["sigma"]] += b["images"]
    return [{"layer": n, "side": side, "sigma": s, "images": c} for (n, side, s), c in counts.items()]
