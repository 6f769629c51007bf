"""What can be scored: networks, runs, files, folders, arrays and data sets; features of generated images, cached and shared by processes."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gddlab.datasets import ImageDataset, open_dataset
from gddlab.errors import GddlabError
from gddlab.evaluation.extractors import Extractor, find_extractor
from gddlab.evaluation.features import Extracted, extract, extract_part
from gddlab.evaluation.images import StoredImages, images_sha256
from gddlab.evaluation.references import Reference
from gddlab.evaluation.sharding import ALONE, Group, share
from gddlab.files import atomic_path, cache_dir, hash_json, hash_tensors
from gddlab.nets import Precond, architecture, load_network, save_network
from gddlab.progress import progress_bar
from gddlab.provenance import versions
from gddlab.runtime import chosen_device
from gddlab.sampling import Sampler
from gddlab.sampling.grid import to_uint8
from gddlab.sampling.samplers import (
    Method,
    draw,
    module_of,
    one_hot,
    positive,
    prepared,
    resolve,
    sampler_name,
    seed_list,
)
from gddlab.teachers.catalog import is_run

__all__ = ["KEEP_GIB", "GeneratedImages", "generated_rows", "images_of", "make_part", "open_source"]

BLOCK = 50_000
"""Images scored against statistics that do not say how many they are of: EDM's protocol."""


@dataclass(frozen=True)
class GeneratedImages:
    """Images that a network makes, image i from seed + i; they are never held together."""

    net: Precond
    how: Method
    count: int
    seed: int
    labels: Tensor | None
    """Class of each image, (count,), or None."""
    batch_size: int
    whole: None = None

    def __len__(self) -> int:
        return self.count

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.net.img_channels, self.net.img_resolution, self.net.img_resolution)

    @property
    def sampler(self) -> str:
        return sampler_name(self.how)

    @property
    def seeds(self) -> tuple[int, int]:
        return (self.seed, self.seed + self.count - 1)

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @cached_property
    def model_sha256(self) -> str:
        return hash_tensors(module_of(self.net).state_dict())

    @property
    def settings(self) -> dict[str, Any] | list[float]:
        """The sampler as JSON."""
        return list(self.how) if isinstance(self.how, tuple) else self.how.to_dict()

    @property
    def key(self) -> str:
        """Hash of all that the images depend on, but for rounding."""
        about = [
            self.model_sha256,
            architecture(module_of(self.net)),
            self.settings,
            [self.seed, self.count],
            None if self.labels is None else hash_json(self.labels.tolist()),
            str(next(self.net.parameters()).dtype),
            self.device.type,
        ]
        return hash_json(about)

    def batch(self, start: int, stop: int) -> Tensor:
        """uint8, (stop - start, C, R, R).

        Raises:
            GddlabError: An image is not finite.
        """
        chosen = None if self.labels is None else self.labels[start:stop]
        labels = one_hot(self.net.label_dim, stop - start, self.seed + start, chosen)
        with prepared(self.net):
            x = draw(self.net, self.how, range(self.seed + start, self.seed + stop), labels)
        check_values(x)
        return to_uint8(x)


def open_source(source: str | Path, *, progress: bool = True) -> Precond | ImageDataset:
    """A model or images by name or path.

    "data:NAME" is a dataset, a folder without config.json or teacher.safetensors, or a file of other kind than .pkl or .safetensors is one too; everything else is what
    `open_model` takes: a run directory, a teacher's name, a file of weights.
    """
    from gddlab.teachers.catalog import open_model

    text, path = str(source), Path(source)
    if text.startswith("data:"):
        return open_dataset(text.removeprefix("data:"), progress=progress)
    images = path.is_dir() and not is_run(path) and not (path / "teacher.safetensors").exists()
    if images or (path.is_file() and path.suffix.lower() not in (".pkl", ".safetensors", ".pt", ".pth")):
        return open_dataset(path, progress=progress)
    return open_model(source)


def images_of(
    source: Precond | ImageDataset | Tensor,
    real: Reference,
    *,
    n: int | None,
    seed: int,
    batch_size: int,
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    **sampler: Any,
) -> StoredImages | GeneratedImages:
    """Images of a source in the format of the real images; arguments as for `evaluate`. Nothing is sampled yet.

    Raises:
        GddlabError: The source is of another kind or shape than expected, has too few images, or is not finite.
    """
    if n is not None and n < 2:
        raise GddlabError(f"n={n} images: give at least 2")
    if isinstance(source, Precond):
        _check_shape((source.img_channels, source.img_resolution), real, "the model's images")
        how = resolve(source, steps=steps, sigmas=sigmas, **sampler)
        count = n or real.n or BLOCK
        seed_list(count, seed, None)
        return GeneratedImages(
            source, how, count, seed, _classes(source, real, count, seed), positive("batch_size", batch_size)
        )
    for name, value in {"steps": steps, "sigmas": sigmas, **sampler}.items():
        if value is not None:
            raise GddlabError(f"{name}={value} with a {type(source).__name__}: only a teacher takes {name}")
    if isinstance(source, ImageDataset):
        _check_shape((source.channels, source.resolution), real, f"dataset {source.name!r}")
        if n is None or n == len(source):
            return StoredImages(source.uint8, "data", whole=source)
        _check_count(n, len(source))
        some = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:n]
        return StoredImages(source.uint8, "data", index=some, seeds=(seed, seed))
    if not isinstance(source, Tensor):
        raise GddlabError(f"source is a {type(source).__name__}: give a student, teacher, dataset or tensor of images")
    if source.ndim != 4 or not source.is_floating_point():
        raise GddlabError(f"images are {source.dtype} {tuple(source.shape)}: give float (N, C, R, R) in [-1, 1]")
    _check_shape((source.shape[1], *source.shape[2:]), real, "images")
    _check_count(n or 0, len(source))
    x = source[:n]
    check_values(x)
    return StoredImages(to_uint8(x), "images")


def _classes(net: Precond, real: Reference, n: int, seed: int) -> Tensor | None:
    if not net.label_dim:
        return None
    if real.class_ids is None:
        return (torch.arange(n) + seed) % net.label_dim
    if net.label_dim != real.classes:
        raise GddlabError(f"the model has {net.label_dim} classes, {real.name!r} {real.classes}: give its own dataset")
    return torch.from_numpy(real.class_ids)[torch.arange(n) % len(real.class_ids)]


def _check_shape(given: tuple[int, ...], real: Reference, what: str) -> None:
    """`given` is (channels, side) or (channels, height, width)."""
    if real.channels is None or real.resolution is None:
        return  # statistics alone
    wanted = (real.channels,) + (real.resolution,) * (len(given) - 1)
    if given != wanted:
        sides = "x".join(str(s) for s in (given[1:] if len(given) == 3 else given[1:] * 2))
        expected = f"{real.resolution}x{real.resolution} with {real.channels} channels"
        raise GddlabError(f"{what}: {sides} with {given[0]} channels, but {real.name!r} has {expected}")


def _check_count(n: int, available: int) -> None:
    if n > available:
        raise GddlabError(f"n={n} images: only {available} were given")


def check_values(x: Tensor) -> None:
    """Raises: GddlabError: Images that are not finite, or not in [-1, 1]."""
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
        raise GddlabError(
            f"{bad} of {len(x)} images are not finite: the model may have diverged, or its weights are damaged"
        )
    low, high = x.min().item(), x.max().item()
    if low < -2 or high > 2:  # a raw network output may overshoot a little; 0..255 does not
        raise GddlabError(f"images span {low:.3g}..{high:.3g}: give values in [-1, 1]")


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
            run_workers(job, nproc, bar.update, entry="gddlab.evaluation.sources:make_part", hint="")
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
