"""Where images come from: a name, a path, a dataset; each becomes a Listing."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gddlab.datasets import cifar, huggingface
from gddlab.datasets.base import ImageDataset
from gddlab.datasets.digits import digits
from gddlab.datasets.listing import Listing
from gddlab.datasets.trees import of_folder, of_zip, stamp
from gddlab.errors import GddlabError, NotFound, unknown
from gddlab.files import hash_json

__all__ = ["ArrayReader", "find_source"]


def find_source(data: str | Path | ImageDataset, *, download: bool = False) -> Listing:
    """What `open_dataset` and `prepare` may be given, as a list of images.

    Raises:
        NotFound: No such path.
        GddlabError: An unknown name, or a file of another kind.
    """
    if isinstance(data, ImageDataset):
        return _of_dataset(data)
    text = str(data)
    if text == "digits":
        return _of_dataset(digits())
    if text == "cifar10":
        return _of_cifar10(cifar.find_cifar10(download=download))
    if text.startswith("hf:"):
        return huggingface.of_huggingface(text)
    path = Path(data).expanduser()
    if path.is_dir():
        if (path / cifar.FOLDER).is_dir():
            path = path / cifar.FOLDER
        return _of_cifar10(path) if (path / "data_batch_1").is_file() else of_folder(path)
    if path.is_file():
        return _of_file(path)
    if len(path.parts) > 1 or path.suffix or isinstance(data, Path):
        raise NotFound(f"no such file or folder: {path}")
    raise unknown("dataset", text, ("digits", "cifar10", "hf:NAME", "a folder", "an EDM zip"))


def _of_file(path: Path) -> Listing:
    if zipfile.is_zipfile(path):
        return of_zip(path)
    if path.name.endswith((".tar", ".tar.gz", ".tgz")) and tarfile.is_tarfile(path):
        return _of_cifar10(path)
    size = path.stat().st_size
    with path.open("rb") as f:
        start = f.read(40)
    if start.startswith(b"version https://git-lfs"):
        what = "a Git LFS pointer: run git lfs pull"
    elif start.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        what = "an HTML page: download it again"
    elif size == 0:
        what = "empty: download it again"
    elif start.startswith(b"PK\3\4"):
        what = "a zip whose end is missing: download or make it again"
    else:
        what = f"neither a zip nor {cifar.ARCHIVE} (it starts with {start[:8]!r}): give an EDM zip or a folder"
    raise GddlabError(f"{path} ({size:,} bytes) is {what}")


@dataclass(frozen=True)
class ArrayReader:
    """Images in memory; names are numbers, and `first` is the number of the first."""

    images: np.ndarray
    first: int = 0

    def read(self, name: str) -> np.ndarray:
        image: np.ndarray = self.images[int(name) - self.first]
        return image

    def open(self, name: str) -> np.ndarray:
        return self.read(name)

    def part(self, names: Sequence[str]) -> ArrayReader:
        low, high = int(names[0]) - self.first, int(names[-1]) - self.first
        return ArrayReader(np.ascontiguousarray(self.images[low : high + 1]), self.first + low)


def _numbers(n: int) -> list[str]:
    return [f"{i:08d}" for i in range(n)]


def _of_dataset(data: ImageDataset) -> Listing:
    about = data.manifest.to_dict()
    return Listing(
        name=data.name,
        source=about["source"],
        names=_numbers(len(data)),
        reader=ArrayReader(data.uint8),
        labels=data.class_ids,
        classes=data.classes,
        class_names=about["extra"].get("class_names"),
        fingerprint=about["sha256"],
        about={key: about[key] for key in ("crop", "filter", "codec", "sha256", "extra")},
    )


def _of_cifar10(path: Path) -> Listing:
    images, labels = cifar.read_cifar10(path)
    file = path if path.is_file() else path / "data_batch_1"
    return Listing(
        name="cifar10",
        source=f"CIFAR-10 training images ({path.name})",
        names=_numbers(len(images)),
        reader=ArrayReader(images),
        labels=labels,
        classes=len(cifar.CLASSES),
        class_names=cifar.CLASSES,
        fingerprint=hash_json([str(path.absolute()), *stamp(file)]),
        about={"crop": "none", "filter": "none", "codec": "none"},
    )
