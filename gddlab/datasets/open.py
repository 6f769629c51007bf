"""Datasets by name or path: `open_dataset("digits")`, `open_dataset("ffhq-64x64.zip")`."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from gddlab.datasets.base import ImageDataset, digits
from gddlab.datasets.listing import Listing, choose
from gddlab.datasets.readers import (
    ARCHIVE,
    FOLDER,
    find_cifar10,
    numbers,
    of_folder,
    of_huggingface,
    of_zip,
    read_cifar10,
)
from gddlab.datasets.store import materialise
from gddlab.errors import GddlabError, NotFound, unknown, validated
from gddlab.files import describe_start, path_of

BUILT_IN = ("digits", "cifar10")
"""Names that mean a data set also where a folder is called so."""


def find_source(data: str | Path | ImageDataset, *, download: bool = False) -> ImageDataset | Listing:
    """The images of a source, given as for `open_dataset`; a dataset where they are in memory anyway.

    Raises:
        NotFound: No such path.
        GddlabError: An unknown name, or a file of another kind.
    """
    if isinstance(data, ImageDataset):
        return data
    text = str(data)
    if text == "digits":
        return digits()
    if text.startswith("hf:"):
        return of_huggingface(text)
    path = find_cifar10(download=download) if text == "cifar10" else path_of("data", data)
    if path.is_dir():
        if (path / FOLDER).is_dir():
            path = path / FOLDER
        return read_cifar10(path) if (path / "data_batch_1").is_file() else of_folder(path)
    if path.is_file():
        if zipfile.is_zipfile(path):
            return of_zip(path)
        if path.name.endswith((".tar", ".tar.gz", ".tgz")) and tarfile.is_tarfile(path):
            return read_cifar10(path)
        with path.open("rb") as f:
            what = describe_start(f.read(4096))
        raise GddlabError(f"{path} is {what}; a dataset is an EDM zip, a folder of images, or {ARCHIVE}")
    if len(path.parts) > 1 or path.suffix or text.endswith("/") or isinstance(data, Path):
        raise NotFound(f"no such file or folder: {path}")
    raise unknown("dataset", text, ("digits", "cifar10", "hf:NAME", "a folder", "an EDM zip"))


def data_of(card: Any) -> ImageDataset | None:
    """The data that a network's card names, found again: all images, of the classes that it was trained on.

    Args:
        card: Has `data`, a name, a path or a data set, and may have `manifest`, that of the images trained on.

    Returns:
        The data; None where the card names none.

    Raises:
        NotFound: They are no longer where they were.
        GddlabError: Other images are there now.
    """
    data, manifest = getattr(card, "data", None), getattr(card, "manifest", None)
    if data is None or manifest is None:
        return None if data is None else open_dataset(data)
    options = manifest["extra"].get("options", {})
    try:
        used = open_dataset(data, **options)
    except NotFound:
        raise NotFound(f"{data}, the data of this network, is no longer there: give data= with its new place") from None
    if used.manifest.sha256 != manifest["sha256"]:
        raise GddlabError(
            f"{data} holds other images than this network was trained on ({len(used)}, then {manifest['count']}): "
            "give data="
        )
    return used if options.keys() <= {"classes"} else open_dataset(data, classes=options.get("classes"))


def listed(source: ImageDataset | Listing) -> Listing:
    """The images of a source by name."""
    if isinstance(source, Listing):
        return source
    about = source.manifest.to_dict()
    return Listing(
        name=source.name,
        source=about["source"],
        names=numbers(len(source)),
        open=lambda name: source.uint8[int(name)],
        labels=source.class_ids,
        classes=source.classes,
        fingerprint=about["sha256"],
        about={key: about[key] for key in ("crop", "filter", "codec")},
        extra=about["extra"],
        sha256=about["sha256"],
    )


@validated
def open_dataset(
    data: str | Path | ImageDataset,
    *,
    classes: Sequence[int] | Set[int] | None = None,
    max_images: PositiveInt | None = None,
    seed: int = 0,
    xflip: bool = False,
    memory: Literal["auto", "ram", "mapped"] = "auto",
    download: bool = False,
    progress: bool = True,
) -> ImageDataset:
    """A dataset by name or path.

    Args:
        data: One of
            "digits";
            "cifar10": the training images of cifar-10-python.tar.gz or cifar-10-batches-py in the working folder,
            $GDDLAB_HOME or the cache; or the path of either;
            an EDM zip: images and dataset.json, `{"labels": [[name, class], ...]}` or null;
            a folder: with such a dataset.json; or with a sub-folder per class, in order of name (of number, if all are
            numbers); or without classes if flat, with one sub-folder, or in shards (00000/img00000000.png,
            001000/001234.png);
            "hf:NAME[:CONFIG][:SPLIT]" (see `of_huggingface`);
            an ImageDataset.
            Images are PNG, JPEG, WebP, BMP, GIF or TIFF, 8-bit grey or RGB, square, all of one size; `prepare` turns
            others into such.
        classes: Class ids to keep. Ids and number of classes do not change, so that conditional models fit.
        max_images: Keeps only this many, chosen at random, in order.
        seed: Of that choice.
        xflip: Doubles the set: image N + i is image i mirrored, with its label.
        memory: "ram"; "mapped", decoded once into the cache, with pages shared between processes; or "auto", in memory
            if it fits.
        download: Downloads CIFAR-10 into the cache if it is not found.
        progress: Shows a bar at a terminal.

    Returns:
        The dataset; its manifest's `extra` holds the options that changed it, and class names where known.

    Raises:
        NotFound: No such path.
        GddlabError: Unknown name or option, or images that cannot be used, with their names.
    """
    source = find_source(data, download=download)
    if isinstance(source, ImageDataset) and classes is None and max_images is None and not xflip and memory != "mapped":
        return source
    listing = choose(listed(source), classes, max_images, seed)
    options = listing.options | ({"xflip": True} if xflip else {})
    recorded = None if options else listing.sha256  # which is that of the whole set
    images, labels, sha256 = materialise(listing, recorded=recorded, xflip=xflip, memory=memory, progress=progress)
    return ImageDataset(
        images,
        labels,
        classes=listing.classes,
        name=listing.name,
        source=listing.source,
        extra=listing.extra | ({"options": options} if options else {}),
        sha256=sha256,
        **listing.about,
    )
