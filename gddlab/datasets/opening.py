"""Datasets by name or path: `open_dataset("digits")`, `open_dataset("ffhq-64x64.zip")`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gddlab.datasets.base import ImageDataset
from gddlab.datasets.digits import digits
from gddlab.datasets.listing import choose
from gddlab.datasets.sources import find_source
from gddlab.datasets.store import MEMORY, materialise
from gddlab.errors import unknown

__all__ = ["open_dataset"]


def open_dataset(
    data: str | Path | ImageDataset,
    *,
    classes: Sequence[int] | None = None,
    max_images: int | None = None,
    seed: int = 0,
    xflip: bool = False,
    memory: str = "auto",
    download: bool = False,
    progress: bool = True,
) -> ImageDataset:
    """A dataset by name or path.

    Args:
        data: One of
            "digits"; "cifar10" (cifar-10-python.tar.gz or cifar-10-batches-py in $GDDLAB_HOME, the working folder or the
            cache folder; training images), or the path of either;
            an EDM zip: images and dataset.json, `{"labels": [[name, class], ...]}` or null;
            a folder: with such a dataset.json, or a sub-folder a class in order of name (of number, if all are numbers),
            or without classes if flat, with one sub-folder, or in shards (00000/img00000000.png, 001000/001234.png);
            "hf:NAME[:CONFIG][:SPLIT]" (see `huggingface.of_huggingface`);
            an ImageDataset.
            Images are PNG, JPEG, WebP, BMP, GIF or TIFF, 8-bit grey or RGB, square, all of one size; `prepare` makes such
            sets of others.
        classes: Class ids to keep; they keep their ids, and the number of classes stays, so that conditional models fit.
        max_images: Keeps so many at random; they stay in order.
        seed: Of that draw.
        xflip: Doubles the set: image N + i is image i mirrored, with its label.
        memory: "ram", "mapped" (decoded once into the cache folder, pages shared between processes) or "auto": in memory
            when it fits.
        download: Fetches CIFAR-10 into the cache folder when it is not found.
        progress: Shows a bar when at a terminal.

    Returns:
        The dataset; its manifest's `extra` holds the options that changed it, and class names where known.

    Raises:
        NotFound: No such path.
        GddlabError: Unknown name or option, or images that cannot be used, with their names.
    """
    if memory not in MEMORY:
        raise unknown("memory", memory, MEMORY)
    if classes is None and max_images is None and not xflip and memory != "mapped":
        if isinstance(data, ImageDataset):
            return data
        if data == "digits":
            return digits()
    listing = choose(find_source(data, download=download), classes=classes, max_images=max_images, seed=seed)
    options: dict[str, Any] = {}
    if classes is not None:
        options["classes"] = sorted(set(classes))
    if max_images is not None:
        options |= {"max_images": max_images, "seed": seed}
    if xflip:
        options["xflip"] = True
    about = dict(listing.about)
    recorded = about.pop("sha256", None)
    extra = dict(about.pop("extra", None) or {})
    if listing.class_names:
        extra["class_names"] = list(listing.class_names)
    if options:
        extra["options"] = options
    if options:
        recorded = None  # the hash of the whole
    images, labels, sha256 = materialise(listing, recorded=recorded, xflip=xflip, memory=memory, progress=progress)
    return ImageDataset(
        images,
        labels,
        classes=listing.classes,
        name=listing.name,
        source=listing.source,
        extra=extra,
        sha256=sha256,
        **about,
    )
