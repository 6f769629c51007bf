"""What can be scored: networks, runs, files, folders, arrays and data sets; features of generated images."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gddlab.datasets import ImageDataset, name_and_part, open_dataset
from gddlab.errors import GddlabError, warn
from gddlab.evaluation.extractors import Extractor, find_extractor
from gddlab.evaluation.features import (
    Extracted,
    GeneratedImages,
    Images,
    StoredImages,
    cached_rows,
    check_values,
    denoises_by_function,
    extract,
    extract_part,
    images_sha256,
)
from gddlab.evaluation.references import Reference
from gddlab.files import as_text, cache_dir, hash_json, is_run, path_of
from gddlab.nets import Denoiser, Precond, load_network, save_network
from gddlab.progress import progress_bar
from gddlab.provenance import versions
from gddlab.ranks import ALONE, Ranks, named_ranks, share
from gddlab.runtime import chosen_device
from gddlab.sampling import Sampler
from gddlab.sampling.grid import to_uint8
from gddlab.sampling.samplers import Method, codec_of, denoiser_in, image_shape, resolve, seed_list
from gddlab.teachers.catalog import bundled_teachers, load_teacher
from gddlab.teachers.folders import is_diffusers_folder
from gddlab.workers import run_workers

BLOCK = 50_000
"""Number of images scored against statistics that do not say how many they are of: EDM's protocol."""
FORMAT = 1
"""Part of the cache key; to be raised when a change of code changes the image of a seed, or its features."""
DARKEST = -0.5
"""Images whose least value is above are perhaps in [0, 1]: resizing may take these below 0."""
KEEP_GIB = 4.0
"""Size of the cache of generated features; beyond it the files used longest ago are removed."""


def open_source(source: str | Path, *, progress: bool = True) -> Denoiser | ImageDataset:
    """A model or images by name or path.

    Images are "data:NAME", a part such as "digits:held-out", a folder that is neither a run directory nor a teacher,
    and a file that is not .pkl, .safetensors, .pt or .pth. Everything else goes to `load_teacher`: a run directory, a
    bundled teacher's name, also where a folder is called so, a file of weights, a folder of diffusers; the model is
    then on the GPU where there is one.
    """
    text = as_text(source)
    if text.startswith("data:") or name_and_part(text)[1]:
        return open_dataset(text.removeprefix("data:"), progress=progress)
    if text in bundled_teachers():
        return load_teacher(text).to(chosen_device())
    path = path_of("source", source)
    images = path.is_dir() and not (
        is_run(path) or (path / "teacher.safetensors").exists() or is_diffusers_folder(path)
    )
    if images or (path.is_file() and path.suffix.lower() not in (".pkl", ".safetensors", ".pt", ".pth")):
        return open_dataset(path, progress=progress)
    return load_teacher(source).to(chosen_device())


def images_of(
    source: Denoiser | ImageDataset | Tensor,
    real: Reference,
    *,
    n: int | None,
    seed: int,
    batch_size: int,
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    **sampler: Any,
) -> Images:
    """Images of a source in the format of the real images; arguments as for `evaluate`. Nothing is sampled yet.

    Raises:
        GddlabError: The source is of another kind or shape than expected, has too few images, or is not finite.
    """
    if isinstance(source, Denoiser):
        codec_of(source)
        check_shape(image_shape(source), real, "the model's images")
        how = resolve(source, steps=steps, sigmas=sigmas, **sampler)
        count = n or real.n or BLOCK
        seed_list(count, seed, None)
        return GeneratedImages(source, how, count, seed, classes_of(source, real, count, seed), batch_size)
    for name, value in {"steps": steps, "sigmas": sigmas, **sampler}.items():
        if value is not None:
            who = "student" if name == "sigmas" else "teacher"
            raise GddlabError(f"{name}={value} with a {type(source).__name__}: only a {who} takes {name}")
    if n is not None and isinstance(source, ImageDataset | Tensor) and n > len(source):
        raise GddlabError(f"n={n} images: only {len(source)} were given")
    if isinstance(source, ImageDataset):
        check_shape((source.channels, source.resolution), real, f"dataset {source.name!r}")
        if n is None or n == len(source):
            return StoredImages(source.uint8, "data", whole=source)
        return StoredImages(source.uint8, "data", index=drawn(len(source), n, seed), seeds=(seed, seed))
    if not isinstance(source, Tensor):
        raise GddlabError(
            f"source is a {type(source).__name__}: give a student, a teacher, a dataset, or images as an array, uint8 "
            "(N, H, W, C), as a list of Pillow images, or as a tensor in [-1, 1]"
        )
    if source.ndim != 4 or not source.is_floating_point() or not len(source):
        what = f"{source.dtype} {tuple(source.shape)}"
        raise GddlabError(f"images are {what}: give float (N, C, R, R) in [-1, 1], or an array, uint8 (N, R, R, C)")
    check_shape((source.shape[1], *source.shape[2:]), real, "images")
    check_values(source[:n])
    if (least := source[:n].min().item()) >= 0:  # [0, 1] read as [-1, 1] is pale, its distance three times as large
        raise GddlabError(f"images hold no value below 0 (the least is {least:.3g}): give [-1, 1], as 2 * images - 1")
    if least > DARKEST:
        warn(
            f"images span {least:.3g} to {source[:n].max().item():.3g}, they are read as [-1, 1]: if that was [0, 1], "
            "give 2 * images - 1"
        )
    return StoredImages(to_uint8(source[:n]), "images")


def classes_of(net: Denoiser, real: Reference, n: int, seed: int) -> Tensor | None:
    """Classes of n images of a conditional model: those of real images; without these, classes take turns.

    Image i has the class of real image i mod N; of fewer images than real ones, that of one drawn at random with
    `seed`, since data sets are often in the order of their classes. Recorded prompts take turns.
    """
    if not net.label_dim:
        return None
    if real.class_ids is None or denoiser_in(net).cond is not None:
        return (torch.arange(n) + seed) % net.label_dim
    if net.label_dim != real.classes:
        raise GddlabError(f"the model has {net.label_dim} classes, {real.name!r} {real.classes}: give its own dataset")
    return torch.from_numpy(real.class_ids)[drawn(len(real.class_ids), n, seed)]


def drawn(total: int, n: int, seed: int) -> Tensor:
    """Which n of some images: all in turn, again and again; at random if n are fewer."""
    if n >= total:
        return torch.arange(n) % total
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:n]


def check_shape(given: tuple[int, ...], real: Reference, what: str) -> None:
    """Refuses images that do not fit the real ones; `given` is (channels, side) or (channels, height, width)."""
    if real.channels is None or real.resolution is None:
        return  # statistics alone
    c, h, w = (*given, given[-1])[:3]
    r = real.resolution
    if (c, h, w) != (real.channels, r, r):
        expected = f"{r}x{r} with {real.channels} channels"
        raise GddlabError(f"{what}: {h}x{w} with {c} channels, but {real.name!r} has {expected}")


def generated_rows(
    images: GeneratedImages,
    extractor: Extractor,
    *,
    ranks: Ranks = ALONE,
    nproc: int = 1,
    progress: bool = False,
) -> Extracted:
    """Features of generated images, from the cache if they are there; `nproc` fresh processes share the work."""

    def compute() -> Extracted:
        if nproc > 1:
            return _by_processes(images, extractor, nproc, progress)
        return extract(images, extractor, ranks=ranks, progress=progress)

    if denoises_by_function(images.net):
        return compute()
    key = hash_json([FORMAT, images.key, extractor.identity, versions()])[:32]
    found = cached_rows(f"generated/{extractor.name}-{key}.safetensors", len(images), extractor, compute, ranks)
    _prune(cache_dir() / "generated")
    return found


def _prune(folder: Path) -> None:
    """Removes the files used longest ago until the rest fits; the newest stays, whatever its size."""
    files = []
    for path in folder.glob("*.safetensors"):
        with suppress(OSError):  # another process removed it
            about = path.stat()
            files.append((about.st_mtime, about.st_size, path))
    room = KEEP_GIB * 2**30
    for k, (_, size, path) in enumerate(sorted(files, reverse=True)):
        room -= size
        if room < 0 and k:
            with suppress(OSError):
                path.unlink()


def _by_processes(images: GeneratedImages, extractor: Extractor, nproc: int, progress: bool) -> Extracted:
    """Fresh processes each write the features of their part, and the images, to a temporary folder."""
    net = denoiser_in(images.net)
    if not isinstance(net, Precond) or net.codec is not None:
        raise GddlabError(
            f"nproc={nproc} with what gddlab.wrap made, or with vae=: no file holds it, give nproc=1, or start torchrun"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_network(net, folder / "network.safetensors")
        job = {
            "folder": name,
            "how": images.settings,
            "count": images.count,
            "seed": images.seed,
            "labels": None if images.labels is None else images.labels.tolist(),
            "batch_size": images.batch_size,
            "extractor": extractor.argument,
            "device": images.device.type,
        }
        title = f"images, features {extractor.label}"
        with progress_bar(total=len(images), desc=title, unit="img", enabled=progress) as bar:
            run_workers(job, nproc, bar.update, entry="gddlab.evaluation.images:make_part", hint="")
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
    report: Callable[[int], Any],
) -> None:
    """One process's part of `_by_processes`."""
    ranks = named_ranks()
    net = load_network(Path(folder) / "network.safetensors")[0].requires_grad_(False).to(chosen_device(device))
    method: Method = tuple(how) if isinstance(how, list) else sampler_of(how)
    images = GeneratedImages(net, method, count, seed, None if labels is None else torch.tensor(labels), batch_size)
    start, stop = share(count, batch_size, ranks.rank, ranks.size)
    with (Path(folder) / f"{ranks.rank}.bin").open("wb") as f:
        spec = find_extractor(extractor).fitted(*images.shape[:2])
        rows = extract_part(images, spec, start, stop, keep=f.write, report=report)
    np.save(Path(folder) / f"{ranks.rank}.npy", rows.numpy())


def sampler_of(settings: dict[str, Any]) -> Sampler:
    """The `Sampler` of which `to_dict` gave these settings; JSON has no infinity."""
    return Sampler(**settings | ({"S_max": float("inf")} if settings["S_max"] is None else {}))
