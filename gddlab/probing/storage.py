"""Probe results on disk: Parquet for the table, npz for arrays, JSON for the rest."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import torch

from gddlab.errors import GddlabError, NotFound
from gddlab.files import atomic_path, read_json
from gddlab.probing.result import ProbeResult
from gddlab.probing.statistics import Statistic

__all__ = ["FORMAT", "load", "save"]

FORMAT = "gddlab-probe-2"


def _arrays(result: ProbeResult) -> dict[str, np.ndarray]:
    """Every array by "matrix|channel|sum|samples/NAME/.../LAYER": a layer's own name may hold a slash, so it comes last."""
    out = {f"matrix/{kind}/{layer}": m for kind, by_layer in result.matrices.items() for layer, m in by_layer.items()}
    out |= {f"channel/{k}/{layer}": v for layer, found in result.channels.items() for k, v in found.items()}
    for layer, by_stat in result.statistics.items():
        for name, stat in by_stat.items():
            out[f"samples/{name}/{layer}"] = np.array(stat.samples)
            out |= {f"sum/{name}/{k}/{layer}": v.cpu().numpy() for k, v in stat.sums.items()}
    return out


def save(result: ProbeResult, folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise GddlabError(f"{folder} is a file: give a folder")
    parquet, npz = io.BytesIO(), io.BytesIO()
    result.frame.to_parquet(parquet, index=False)
    np.savez_compressed(npz, **_arrays(result))  # type: ignore[arg-type]
    files = {"frame.parquet": parquet.getvalue(), "arrays.npz": npz.getvalue()}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    meta = {"format": FORMAT, "files": sums, **result.meta}
    files["meta.json"] = (json.dumps(meta, indent=2, allow_nan=False) + "\n").encode()
    with contextlib.ExitStack() as stack:
        for name, content in files.items():
            stack.enter_context(atomic_path(folder / name)).write_bytes(content)


def load(folder: Path) -> ProbeResult:
    import pandas as pd

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
    statistics: dict[str, dict[str, Statistic]] = {}
    with np.load(io.BytesIO(content["arrays.npz"]), allow_pickle=False) as z:
        for key in z.files:
            sort, name, rest = key.split("/", 2)
            if sort == "matrix":
                matrices.setdefault(name, {})[rest] = z[key]
            elif sort == "channel":
                channels.setdefault(rest, {})[name] = z[key]
            elif kind := Statistic.kinds.get(meta["stats"][name]["class"]):
                # a statistic of the user's own, not imported here, keeps its rows in the table and cannot merge
                layer = rest if sort == "samples" else rest.split("/", 1)[1]
                stat = statistics.setdefault(layer, {}).setdefault(name, kind())
                if sort == "samples":
                    stat.samples = int(z[key])
                else:
                    stat.sums[rest.split("/", 1)[0]] = torch.from_numpy(z[key])
    return ProbeResult(pd.read_parquet(io.BytesIO(content["frame.parquet"])), meta, matrices, channels, statistics)
