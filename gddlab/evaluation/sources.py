"""What is scored, as uint8 images that are made or read a batch at a time, with their origin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gddlab.datasets import ImageDataset, open_dataset
from gddlab.errors import GddlabError
from gddlab.evaluation.images import StoredImages
from gddlab.evaluation.references import Reference
from gddlab.files import hash_json, hash_tensors
from gddlab.nets import Precond, architecture
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

__all__ = ["GeneratedImages", "images_of", "open_source"]

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
