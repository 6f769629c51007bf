"""Features of generated images, kept by what the images depend on, so that a student is sampled once for all its scores."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gddlab.evaluation.extractors import Extractor, find_extractor
from gddlab.evaluation.features import Extracted, extract, extract_part
from gddlab.evaluation.images import images_sha256
from gddlab.evaluation.sharding import ALONE, Group, share
from gddlab.evaluation.sources import GeneratedImages
from gddlab.files import atomic_path, cache_dir, hash_json, hash_tensors
from gddlab.nets import load_network, save_network
from gddlab.progress import progress_bar
from gddlab.provenance import versions
from gddlab.runtime import chosen_device
from gddlab.sampling import Sampler
from gddlab.sampling.samplers import Method, module_of

__all__ = ["KEEP_GIB", "generated_rows", "make_part"]

FORMAT = 1
"""To be raised when code changes what an image of a seed is, or its features."""
KEEP_GIB = 4.0
"""Of the cache of generated features; beyond it the files not used for longest are removed. 50,000 rows of Inception are 0.6 GiB."""


def generated_rows(
    images: GeneratedImages,
    extractor: Extractor,
    *,
    group: Group = ALONE,
    nproc: int = 1,
    progress: bool = False,
) -> Extracted:
    """Features of generated images, from the cache where they are, whole and unharmed.

    Args:
        images: What is generated.
        extractor: From `find_extractor`.
        group, progress: As for `extract`.
        nproc: Fresh processes on this machine that share the work.
    """
    key = hash_json([FORMAT, images.key, extractor.identity, versions()])
    path = cache_dir() / "generated" / f"{extractor.name}-{key[:32]}.safetensors"
    found = _read(path, (len(images), extractor.width))
    if group.all(found is not None):
        assert found is not None
        return found
    if nproc > 1:
        out = _by_processes(images, extractor, nproc, progress)
    else:
        out = extract(images, extractor, group=group, progress=progress)
    if group.rank == 0:
        with contextlib.suppress(OSError):  # a read-only or full home costs time at the next call, nothing else
            _write(path, out)
            _prune(path.parent)
    return out


def _read(path: Path, shape: tuple[int, int]) -> Extracted | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as f:
            about, rows = f.metadata() or {}, f.get_tensor("rows")
        whole = rows.shape == shape and hash_tensors({"rows": rows}) == about.get("rows_sha256")
        if not whole or not torch.isfinite(rows).all():
            return None
        os.utime(path)
        return Extracted(rows, about["images_sha256"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _write(path: Path, value: Extracted) -> None:
    from safetensors.torch import save_file

    rows = value.rows.contiguous()
    about = {"images_sha256": value.images_sha256, "rows_sha256": hash_tensors({"rows": rows})}
    with atomic_path(path) as tmp:
        save_file({"rows": rows}, tmp, metadata=about)


def _prune(folder: Path) -> None:
    """Removes the files not used for longest until the rest fits; the newest stays, whatever its size."""
    files = []
    for path in folder.glob("*.safetensors"):
        with contextlib.suppress(OSError):  # another process removed it
            about = path.stat()
            files.append((about.st_mtime, about.st_size, path))
    room = KEEP_GIB * 2**30
    for k, (_, size, path) in enumerate(sorted(files, reverse=True)):
        room -= size
        if room < 0 and k:
            path.unlink(missing_ok=True)


def _by_processes(images: GeneratedImages, extractor: Extractor, nproc: int, progress: bool) -> Extracted:
    """Fresh processes each write the features of their part, and the images, to a folder of their own."""
    from gddlab.workers import run_workers

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_network(module_of(images.net), folder / "network.safetensors")
        job = {
            "folder": name,
            "how": images.settings,
            "count": images.count,
            "seed": images.seed,
            "labels": None if images.labels is None else images.labels.tolist(),
            "batch_size": images.batch_size,
            "extractor": extractor.label,
            "device": images.device.type,
        }
        bar = progress_bar(total=len(images), desc=f"images, features {extractor.label}", unit="img", enabled=progress)
        with bar:
            run_workers(job, nproc, bar.update, entry="gddlab.evaluation.generated:make_part", hint="")
        digest = images_sha256(images)
        for rank in range(nproc):
            with (folder / f"{rank}.bin").open("rb") as f:
                while piece := f.read(1 << 24):
                    digest.update(piece)
        rows = np.concatenate([np.load(folder / f"{rank}.npy", allow_pickle=False) for rank in range(nproc)])
    return Extracted(torch.from_numpy(rows), digest.hexdigest())


def make_part(
    folder: str,
    how: Any,
    count: int,
    seed: int,
    labels: list[int] | None,
    batch_size: int,
    extractor: str,
    device: str,
    report: Any,
) -> None:
    """What one process does of `_by_processes`: the part of the rank that its environment names."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    net = load_network(Path(folder) / "network.safetensors")[0].requires_grad_(False)
    method: Method = tuple(how) if isinstance(how, list) else Sampler(**_finite(how))
    classes = None if labels is None else torch.tensor(labels)
    images = GeneratedImages(net.to(chosen_device(device)), method, count, seed, classes, batch_size)
    start, stop = share(count, batch_size, rank, world)
    with (Path(folder) / f"{rank}.bin").open("wb") as f:
        rows = extract_part(images, find_extractor(extractor), start, stop, keep=f.write, report=report)
    np.save(Path(folder) / f"{rank}.npy", rows.numpy())


def _finite(how: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `Sampler` from what `to_dict` gave."""
    return how | ({"S_max": float("inf")} if how["S_max"] is None else {})
