"""Datasets by name or path: `open_dataset("digits")`, `open_dataset("ffhq-64x64.zip")`."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Collection, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import PositiveInt, SkipValidation

from gddlab.datasets.base import ImageDataset, digits
from gddlab.datasets.listing import GIVEN, PARTS, Listing, choose, name_and_part, part_of
from gddlab.datasets.readers import (
    ARCHIVE,
    FOLDER,
    find_cifar10,
    numbers,
    of_array,
    of_array_file,
    of_folder,
    of_huggingface,
    of_list,
    of_zip,
    read_cifar10,
)
from gddlab.datasets.store import materialise
from gddlab.errors import GddlabError, NotFound, refusal_of, unknown, validated
from gddlab.files import HUB_NAME, as_text, data_dir, describe_start, path_of
from gddlab.runtime import Seed

Source = SkipValidation[str | Path | ImageDataset | np.ndarray | list[Any]]
"""What `open_dataset` takes; `find_source` refuses the rest."""

BUILT_IN = ("digits", "emoji", "cifar10")
"""Names that mean a data set also where a folder is called so, which is then "./digits"."""


def find_source(data: Source, *, download: bool = False) -> ImageDataset | Listing:
    """The images of a source, given as for `open_dataset`; a dataset where they are in memory anyway.

    Raises:
        NotFound: No such path.
        GddlabError: An unknown name, a file of another kind, or another kind of argument.
    """
    if isinstance(data, ImageDataset):
        return data
    if isinstance(data, np.ndarray):
        return of_array(data, name=GIVEN[0], source=GIVEN[0])
    if isinstance(data, list | tuple):
        return of_list(data)
    if not isinstance(data, str | Path):
        raise refusal_of("data", data, "give a name, a path, a dataset, an array, uint8 (N, H, W, C), or Pillow images")
    text, part = name_and_part(as_text(data))
    if part is not None:
        return part_of(listed(find_source(text, download=download)), part)
    if text == "digits":
        return digits()
    if text == "emoji":
        found = of_zip(emoji_zip())
        return replace(found, source=found.extra["from"], extra={"class_names": found.extra["class_names"]})
    if text.startswith("hf:"):
        return of_huggingface(text)
    path = find_cifar10(download=download) if text == "cifar10" else path_of("data", text)
    if path.is_dir():
        if (path / FOLDER).is_dir():
            path = path / FOLDER
        return read_cifar10(path) if (path / "data_batch_1").is_file() else of_folder(path)
    if path.is_file():
        with path.open("rb") as f:
            head = f.read(4096)
        if head.startswith(b"\x93NUMPY") or (path.suffix.lower() == ".npz" and zipfile.is_zipfile(path)):
            return of_array_file(path)
        if zipfile.is_zipfile(path):
            return of_zip(path)
        if path.name.endswith((".tar", ".tar.gz", ".tgz")) and tarfile.is_tarfile(path):
            return read_cifar10(path)
        accepted = f"an EDM zip, a folder of images, a .npz or .npy of them, or {ARCHIVE}"
        raise GddlabError(f"{path} is {describe_start(head)}; a dataset is {accepted}")
    name, colon, part = text.rpartition(":")
    if colon and (name in BUILT_IN or Path(name).expanduser().exists()):
        raise unknown("part of a data set", part, PARTS)
    if "/" in text or path.suffix:
        hub = f"; of the Hugging Face hub, give 'hf:{text}'" if HUB_NAME.fullmatch(text) else ""
        raise NotFound(f"no such file or folder: {path}{hub}")
    raise unknown("dataset", text, (*BUILT_IN, "hf:NAME", "a folder", "an EDM zip", "a .npz or .npy"))


def emoji_zip() -> Path:
    """The EDM zip of "emoji", which ships with gddlab; the README beside it says where its images are from."""
    return data_dir() / "emoji" / "emoji.zip"


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
            f"{data} holds other images than this network was trained on ({manifest['count']} then, {len(used)} now, "
            f"sha256 {manifest['sha256'][:8]} then, {used.manifest.sha256[:8]} now): give data="
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
    data: Source,
    *,
    classes: Sequence[int] | Set[int] | None = None,
    max_images: PositiveInt | None = None,
    seed: Seed = 0,
    xflip: bool = False,
    memory: Literal["auto", "ram", "mapped"] = "auto",
    download: bool = False,
    progress: bool = True,
) -> ImageDataset:
    """A dataset by name or path.

    Args:
        data: One of the following; "./digits" and Path("digits") are a folder, "digits" alone is not:
            "digits": handwritten digits, 16x16, grey, 10 classes;
            "emoji": 3,457 emoji drawn in two styles, on white, 32x32, RGB, 9 classes;
            "digits:train" or "digits:held-out": two thirds of the images or the third that is held out, of each class;
            so for every name and path here, such as "faces.zip:train", but for hf:, whose splits are its own; of a set
            with groups, such as "emoji", whole groups are held out;
            "cifar10": the training images of cifar-10-python.tar.gz or cifar-10-batches-py in the working folder,
            $GDDLAB_HOME or the cache; or the path of either;
            an EDM zip: images and dataset.json, `{"labels": [[name, class], ...]}` or null; and, if images belong
            together, such as those of one person, `"groups": [[name, group], ...]`;
            a folder: with such a dataset.json; or with a sub-folder per class, in order of name (of number, if all are
            numbers); or without classes if flat, with one sub-folder, or in shards (00000/img00000000.png,
            001000/001234.png);
            "hf:NAME[:CONFIG][:SPLIT]" (see `of_huggingface`);
            a .npz with images as `arr_0` and, if any, class ids as `arr_1`, integers (N,), as ADM's samplers write, or
            with one array; a .npy; or such an array: uint8, (N, H, W, 1 or 3), or (N, H, W) of grey images;
            a list of Pillow images, or of arrays, uint8, (H, W, 1 or 3);
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
    if isinstance(source, ImageDataset) and (chosen := source.manifest.extra.get("options")):
        raise GddlabError(f"{source.name} was chosen by {chosen} already: give all options at once")
    return _opened(listed(source), classes, max_images, seed, xflip, memory, progress)


def _opened(
    listing: Listing,
    classes: Collection[int] | None = None,
    max_images: int | None = None,
    seed: int = 0,
    xflip: bool = False,
    memory: str = "auto",
    progress: bool = True,
) -> ImageDataset:
    """The images of a listing, chosen as for `open_dataset`."""
    listing = choose(listing, classes, max_images, seed)
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


def parts_of(data: Source, *, progress: bool = True) -> tuple[ImageDataset, ImageDataset]:
    """What is trained on of a data set, and what is held out.

    Args:
        data: As for `open_dataset`: the whole set, or one of its parts, whose other part is then found by name. A part
            with options, such as `max_images`, is that part as it is; the other one then has its classes.
        progress: Shows a bar at a terminal.

    Raises:
        GddlabError: The set that a part is of is not found, or holds other images now.
    """
    if not isinstance(data, ImageDataset):
        source: Source = name_and_part(as_text(data))[0] if isinstance(data, str | Path) else data
        listing = listed(find_source(source))
        first, second = (_opened(part_of(listing, part), progress=progress) for part in PARTS)
        return first, second
    options = data.manifest.extra.get("options", {})
    named = [] if options and name_and_part(data.name)[1] is None else [data.name, data.manifest.source]
    for name, part in map(name_and_part, named):
        if name not in BUILT_IN and not Path(name).exists():
            continue
        whole = listed(find_source(name))
        own = whole if part is None else part_of(whole, part)
        if _opened(own, **options, progress=progress).manifest.sha256 == data.manifest.sha256:
            classes = options.get("classes")
            both = [data if p == part else _opened(part_of(whole, p), classes, progress=progress) for p in PARTS]
            return both[0], both[1]
    if name_and_part(data.name)[1] is not None:
        raise GddlabError(f"{data.name!r} is a part of a data set that is not found again: give the data set by name")
    first, second = (_opened(part_of(listed(data), part), progress=progress) for part in PARTS)
    return first, second
