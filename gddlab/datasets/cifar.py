"""CIFAR-10 (Krizhevsky 2009) as published: a tar of pickles, read without unpickling."""

from __future__ import annotations

import os
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from gddlab.datasets.plain_pickle import Array, parse
from gddlab.errors import GddlabError, NotFound
from gddlab.files import cache_dir

__all__ = ["ARCHIVE", "CLASSES", "FOLDER", "find_cifar10", "read_cifar10"]

ARCHIVE = "cifar-10-python.tar.gz"
FOLDER = "cifar-10-batches-py"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
_SIDE = 32
_ROW = 3 * _SIDE * _SIDE
_MAX_BATCH = 64 << 20  # bytes; the published ones have 31 million
_MAX_MEMBERS = 64


def find_cifar10(*, download: bool = False) -> Path:
    """The archive or its unpacked folder, in $GDDLAB_HOME, the working folder or the cache folder.

    Args:
        download: Fetches the archive (170 MB) into the cache folder if it is in none of them.

    Raises:
        NotFound: Nowhere, and not to be downloaded.
        GddlabError: The download failed.
    """
    home = os.environ.get("GDDLAB_HOME")
    places = [Path(home)] if home else []
    places += [Path.cwd(), cache_dir()]
    for place in places:
        for name in (ARCHIVE, FOLDER):
            if (place / name).exists():
                return place / name
    if not download:
        raise NotFound(
            f"no {ARCHIVE} or {FOLDER} in {', '.join(str(p) for p in places)}: put it there (170 MB, "
            "https://www.cs.toronto.edu/~kriz/cifar.html), set GDDLAB_HOME to its folder, or give download=True"
        )
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_url

    try:
        download_url(CIFAR10.url, str(cache_dir()), CIFAR10.filename, CIFAR10.tgz_md5)
    except (OSError, RuntimeError) as e:
        raise GddlabError(f"{CIFAR10.url} cannot be fetched ({e}): put {ARCHIVE} into {cache_dir()}") from None
    return cache_dir() / ARCHIVE


def read_cifar10(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The training images, in the order of the five batches.

    Args:
        path: cifar-10-python.tar.gz, or the folder cifar-10-batches-py.

    Returns:
        Images, uint8, (N, 32, 32, 3), and class ids, int64, (N,); N is 50,000 in the published archive.

    Raises:
        GddlabError: A batch is missing, too large, or holds anything but images and labels.
    """
    parts = []
    contents = _from_folder(path) if path.is_dir() else _from_tar(path)
    for name in _BATCHES:
        if name not in contents:
            raise GddlabError(
                f"{path} has no {FOLDER}/{name}: give the whole archive (md5 c58f30108f718f92721af3b95e74349a)"
            )
        try:
            parts.append(_batch(contents.pop(name)))
        except (ValueError, KeyError, IndexError, TypeError, OverflowError) as e:
            reason = str(e).splitlines()[0][:120] if str(e) else type(e).__name__
            raise GddlabError(f"{path}: {name} is no batch of CIFAR-10 ({reason}): fetch the archive again") from None
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])


def _from_folder(path: Path) -> dict[str, bytes]:
    out = {}
    for name in _BATCHES:
        file = path / name
        if file.is_file():
            _check_size(path, name, file.stat().st_size)
            out[name] = file.read_bytes()
    return out


def _from_tar(path: Path) -> dict[str, bytes]:
    out = {}
    try:
        with tarfile.open(path, "r:*") as tar:
            for i, member in enumerate(tar):
                if i >= _MAX_MEMBERS:
                    raise GddlabError(f"{path} has more than {_MAX_MEMBERS} files: give {ARCHIVE}")
                _check_size(path, member.name, member.size)
                folder, _, name = member.name.rpartition("/")
                if name in _BATCHES and folder.rpartition("/")[2] == FOLDER and (f := tar.extractfile(member)):
                    out[name] = f.read(_MAX_BATCH)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as e:
        raise GddlabError(f"{path} cannot be read as a tar archive ({e}): fetch it again") from None
    return out


def _check_size(path: Path, name: str, size: int) -> None:
    if size > _MAX_BATCH:
        raise GddlabError(f"{path}: {name} has {size:,} bytes, accepted are {_MAX_BATCH:,}: this is not CIFAR-10")


def _batch(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    batch = {_text(key): value for key, value in parse(content).items()}
    data, labels = batch["data"], batch["labels"]
    if not isinstance(data, Array) or not isinstance(labels, list):
        raise ValueError(f"data is {type(data).__name__}, labels are {type(labels).__name__}")
    images = data.matrix(_ROW)
    n = len(images)
    if len(labels) != n or not all(type(y) is int and 0 <= y < len(CLASSES) for y in labels):
        raise ValueError(f"{len(labels)} labels for {n} images, accepted is one of 0..9 each")
    return images.reshape(n, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1), np.array(labels, dtype=np.int64)


def _text(value: Any) -> Any:
    return value.decode("latin-1") if isinstance(value, bytes) else value
