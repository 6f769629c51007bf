"""What is scored, as uint8 images with their origin: a model samples, a dataset or tensor is taken as it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gddlab.datasets import ImageDataset
from gddlab.errors import GddlabError
from gddlab.evaluation.features import real_images
from gddlab.files import hash_tensors
from gddlab.nets import Precond
from gddlab.sampling import sample
from gddlab.sampling.grid import to_uint8
from gddlab.sampling.samplers import resolve, sampler_name

__all__ = ["SourceImages", "images_of"]


@dataclass(frozen=True)
class SourceImages:
    """Images, uint8 (N, C, R, R), and where they are from; `whole` is the dataset that they are all of."""

    uint8: Tensor
    sampler: str
    seeds: tuple[int, int] | None = None
    model_sha256: str | None = None
    whole: ImageDataset | None = None


def images_of(
    source: Precond | ImageDataset | Tensor,
    real: ImageDataset,
    *,
    n: int | None,
    seed: int,
    steps: int | None,
    batch_size: int,
    progress: bool,
) -> SourceImages:
    """Images of a source in the format of the real images; arguments as for `evaluate`.

    Raises:
        GddlabError: The source is of another kind or shape than expected, has too few images, or is not finite.
    """
    if n is not None and n < 2:
        raise GddlabError(f"n={n} images: give at least 2")
    if isinstance(source, Precond):
        return _sampled(source, real, n or len(real), seed=seed, steps=steps, batch_size=batch_size, progress=progress)
    if steps is not None:
        raise GddlabError(f"steps={steps} with a {type(source).__name__}: only a teacher takes steps")
    if isinstance(source, ImageDataset):
        _check_shape((source.channels, source.resolution), real, f"dataset {source.name!r}")
        if n is None or n == len(source):
            return SourceImages(real_images(source), "data", whole=source)
        _check_count(n, len(source))
        some = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:n]
        return SourceImages(real_images(source)[some], "data", seeds=(seed, seed))
    if not isinstance(source, Tensor):
        raise GddlabError(f"source is a {type(source).__name__}: give a student, teacher, dataset or tensor of images")
    if source.ndim != 4 or not source.is_floating_point():
        raise GddlabError(f"images are {source.dtype} {tuple(source.shape)}: give float (N, C, R, R) in [-1, 1]")
    _check_shape((source.shape[1], *source.shape[2:]), real, "images")
    _check_count(n or 0, len(source))
    x = source[:n]
    _check_values(x)
    return SourceImages(to_uint8(x), "images")


def _sampled(
    net: Precond, real: ImageDataset, n: int, *, seed: int, steps: int | None, batch_size: int, progress: bool
) -> SourceImages:
    _check_shape((net.img_channels, net.img_resolution), real, "the model's images")
    classes = None
    if net.label_dim and real.class_ids is not None:
        if net.label_dim != real.classes:
            raise GddlabError(
                f"the model has {net.label_dim} classes, {real.name!r} {real.classes}: give its own dataset"
            )
        classes = torch.from_numpy(real.class_ids)[torch.arange(n) % len(real)]
    x = sample(net, n, steps=steps, seed=seed, class_labels=classes, batch_size=batch_size, progress=progress)
    _check_values(x)
    return SourceImages(
        to_uint8(x),
        sampler_name(resolve(net, steps=steps)),
        seeds=(seed, seed + n - 1),
        model_sha256=hash_tensors(net.state_dict()),
    )


def _check_shape(given: tuple[int, ...], real: ImageDataset, what: str) -> None:
    """`given` is (channels, side) or (channels, height, width)."""
    wanted = (real.channels,) + (real.resolution,) * (len(given) - 1)
    if given != wanted:
        sides = "x".join(str(s) for s in (given[1:] if len(given) == 3 else given[1:] * 2))
        expected = f"{real.resolution}x{real.resolution} with {real.channels} channels"
        raise GddlabError(f"{what}: {sides} with {given[0]} channels, but {real.name!r} has {expected}")


def _check_count(n: int, available: int) -> None:
    if n > available:
        raise GddlabError(f"n={n} images: only {available} were given")


def _check_values(x: Tensor) -> None:
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
        raise GddlabError(
            f"{bad} of {len(x)} images are not finite: the model may have diverged, or its weights are damaged"
        )
    low, high = x.min().item(), x.max().item()
    if low < -2 or high > 2:  # a raw network output may overshoot a little; 0..255 does not
        raise GddlabError(f"images span {low:.3g}..{high:.3g}: give values in [-1, 1]")
