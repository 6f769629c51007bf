"""Results put together: more images of the same, or other measurements of the same network."""

from __future__ import annotations

import copy
from typing import Any

from gddlab.errors import GddlabError
from gddlab.probing.layers import Layer
from gddlab.probing.result import ProbeResult

__all__ = ["join", "merge"]


def _same_network(first: ProbeResult, other: ProbeResult) -> None:
    if not isinstance(other, ProbeResult):
        raise GddlabError(f"{other!r} is no ProbeResult: give what probe, ablate and the like return")
    ours, theirs = (r.meta["model"]["fingerprint"] for r in (first, other))
    if ours != theirs:
        raise GddlabError(
            f"these results are of different networks ({ours[:12]}, {theirs[:12]}): give results of the same one"
        )


def merge(first: ProbeResult, *others: ProbeResult) -> ProbeResult:
    statistics = copy.deepcopy({n: dict(s) for n, s in first.statistics.items()})
    meta = copy.deepcopy(first.meta)
    for other in others:
        _same_network(first, other)
    for r in (first, *others):
        if not r.statistics or {*r.meta["stats"]} != {name for s in r.statistics.values() for name in s}:
            raise GddlabError(
                "a result without its sums over images does not merge: measure it with all images at once"
            )
    for other in others:
        for key in ("states", "sigmas", "labels", "settings"):
            if first.meta.get(key) != other.meta.get(key):
                raise GddlabError(
                    f"{key} is {first.meta.get(key)} here, {other.meta.get(key)} there: merge equal measurements"
                )
        if (first.meta["data"] or {}).get("sha256") != (other.meta["data"] or {}).get("sha256"):
            raise GddlabError("these results are of different data: merge results of the same dataset")
        ours, theirs = ({(n, s) for n, by in r.items() for s in by} for r in (statistics, other.statistics))
        if ours != theirs:
            layer, stat = sorted(ours ^ theirs)[0]
            raise GddlabError(f"{stat!r} of layer {layer!r} is in one result alone: merge results of the same layers")
        for seed, start, stop in other.meta["images"]:
            for s, a, b in meta["images"]:
                # Without a dataset an image is its noise, whose seed is the sum.
                same, shift = (s == seed, 0) if meta["data"] else (True, seed - s)
                low, high = max(start + shift, a), min(stop + shift, b)
                if same and low < high:
                    raise GddlabError(f"both results saw images {low} to {high} of seed {s}: probe others with start=")
        meta["images"] += other.meta["images"]
        for layer, by_name in statistics.items():
            for name, statistic in by_name.items():
                statistic.merge(other.statistics[layer][name])
        meta["nonfinite"] = _added(meta["nonfinite"], other.meta["nonfinite"])
    meta["n_images"] = sum(stop - start for _, start, stop in meta["images"])
    return ProbeResult.of(_layers(first), first.sigmas, statistics, meta)


def join(first: ProbeResult, *others: ProbeResult) -> ProbeResult:
    import pandas as pd

    for other in others:
        _same_network(first, other)
    meta = copy.deepcopy(first.meta)
    frames = [first.frame]
    matrices = {k: dict(v) for k, v in first.matrices.items()}
    grids = {tuple(r.sigmas) for r in (first, *others)}
    for kind in {k for r in (first, *others) for k in r.matrices} if len(grids) > 1 else ():
        if sum(kind in r.matrices for r in (first, *others)) > 1:
            raise GddlabError(f"{kind!r} compares the noise levels of one measurement: join results with equal sigmas")
    channels = dict(first.channels)
    for other in others:
        frames.append(other.frame)
        for kind, by_layer in other.matrices.items():
            matrices.setdefault(kind, {}).update(by_layer)
        channels |= other.channels
        meta["stats"] |= other.meta["stats"]
        meta["sigmas"] = sorted({*meta["sigmas"], *other.meta["sigmas"]}, reverse=True)
        meta["nonfinite"] = _added(meta["nonfinite"], other.meta["nonfinite"])
    frame = pd.concat(frames, ignore_index=True)
    twice = frame.duplicated(["layer", "sigma", "stat"])
    if twice.any():
        row = frame[twice].iloc[0]
        raise GddlabError(
            f"{row['stat']!r} of layer {row['layer']!r} at sigma {row['sigma']:g} is in both results: "
            "merge() adds images; join() puts different measurements together"
        )
    keys = ("states", "data", "n_images", "seed", "stats", "settings")
    meta["joined"] = [{k: r.meta[k] for k in keys if k in r.meta} | {"hash": r.hash} for r in (first, *others)]
    # sums stand for one grid of noise levels, so that a joined result has none: merge first, then join
    depth = {layer["name"]: i for i, layer in enumerate(meta["layers"])}
    order = frame["layer"].map(depth).fillna(len(depth))
    frame = frame.assign(_order=order).sort_values(
        ["_order", "stat", "sigma"], ascending=[True, True, False], kind="stable"
    )
    # likewise matrices and channels, whose rows are the noise levels of one measurement
    whole = (matrices, channels) if len(grids) == 1 else ({}, {})
    return ProbeResult(frame.drop(columns="_order").reset_index(drop=True), meta, *whole)


def _added(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    counts: dict[tuple[str, str, float], int] = {}
    for b in (*ours, *theirs):
        key = (b["layer"], b["side"], b["sigma"])
        counts[key] = counts.get(key, 0) + b["images"]
    return [{"layer": n, "side": side, "sigma": s, "images": c} for (n, side, s), c in counts.items()]


def _layers(result: ProbeResult) -> list[Layer]:
    """The layers of a result, as they were measured."""
    import pandas as pd

    known = {d["name"]: d for d in result.meta["layers"]}
    size = dict(zip(result.frame["layer"], result.frame["resolution"], strict=True))
    pixels = {n: None if pd.isna(r) else int(r) for n, r in size.items()}
    return [Layer(**{**known[n], "resolution": pixels.get(n, known[n]["resolution"])}) for n in result.statistics]
