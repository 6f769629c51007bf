"""Readers of image collections: folders, zips, Hugging Face datasets, the archive of CIFAR-10."""

from __future__ import annotations

import functools
import importlib
import json
import os
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from gddlab.datasets.listing import LABELS, MANIFEST, Listing, Problem, Reader, arrange, image_files
from gddlab.datasets.pixels import BadImage
from gddlab.errors import GddlabError, NotFound
from gddlab.files import cache_dir, hash_json, read_json
from gddlab.pickles import Array, Blob, Budget, PickleReader, Refused, find_plain, printable
from gddlab.pretrained.files import Published, search_folders

_MAX_FILE = 256 << 20  # bytes of one image file
_MAX_TABLE = 1 << 30  # bytes of dataset.json or manifest.json


def stamp(path: Path) -> tuple[int, int]:
    """Size and modification time, which change when a file is replaced."""
    s = path.stat()
    return s.st_size, s.st_mtime_ns


@dataclass(frozen=True)
class FolderReader(Reader):
    """Files below a folder."""

    root: str

    def read(self, name: str) -> bytes:
        with self.open(name) as f:
            return f.read()

    def open(self, name: str) -> BinaryIO:
        path = os.path.join(self.root, name)
        _check_size(os.path.getsize(path))
        return open(path, "rb")


def of_folder(root: Path) -> Listing:
    names: list[str] = []
    stamps: list[tuple[int, int]] = []
    folders: list[str] = []
    seen: set[tuple[int, int]] = set()
    for where, below, files in os.walk(root, followlinks=True):
        s = os.stat(where)
        if (s.st_dev, s.st_ino) in seen:  # a link to a folder above
            below.clear()
            continue
        seen.add((s.st_dev, s.st_ino))
        below[:] = sorted(b for b in below if not b.startswith("."))
        inside = Path(where).relative_to(root).as_posix()
        if inside == ".":
            folders = list(below)
        names += files if inside == "." else [f"{inside}/{f}" for f in files]
    found, problems, ignored = image_files(names)
    images: list[str] = []
    for name in found:
        try:
            stamps.append(stamp(root / name))
            images.append(name)
        except OSError as e:
            problems.append(Problem(name, "cannot be read", e.strerror or str(e)))
    used = {n.split("/", 1)[0] for n in images if "/" in n}
    about = _manifest(root / MANIFEST)
    labels_file = (root / LABELS).read_bytes() if (root / LABELS).is_file() else None
    # Sub-folders without images matter only where sub-folders are classes.
    empty = [f for f in folders if f not in used] if used and labels_file is None else []
    return _listing(
        root.absolute().name,
        str(root),
        images,
        FolderReader(str(root.absolute())),
        labels_file,
        about,
        problems,
        ignored,
        fingerprint=hash_json([images, stamps]),
        empty=empty,
    )


def _manifest(path: Path) -> dict[str, Any]:
    return _about(read_json(path), str(path)) if path.is_file() else {}


def _about(value: Any, where: str) -> dict[str, Any]:
    """The manifest beside images; {} if the file of that name is something else."""
    if not isinstance(value, dict) or not {"crop", "filter", "codec", "sha256", "classes"} <= value.keys():
        return {}
    extra = value.get("extra")
    if type(value["classes"]) is not int or not isinstance(extra, dict | None):
        raise GddlabError(f"{where} is damaged: classes={value['classes']!r}; remove it, or prepare the data again")
    return {**value, "extra": extra or {}}


def _listing(
    name: str,
    source: str,
    images: list[str],
    reader: FolderReader | ZipReader,
    labels_file: bytes | None,
    manifest: dict[str, Any],
    problems: list[Problem],
    ignored: dict[str, int],
    *,
    fingerprint: str,
    empty: Sequence[str] = (),
) -> Listing:
    recorded = manifest.get("classes") or None  # 0: made without labels; a dataset.json added later counts
    labels, class_names, classes, wrong = arrange(images, labels_file, empty=empty, classes=recorded)
    if not images and not problems:
        kinds = ", ".join(f"{n} {suffix}" for suffix, n in ignored.items()) or "nothing"
        raise GddlabError(f"{source} has no images (it has {kinds}): accepted are PNG, JPEG, WebP, BMP, GIF, TIFF")
    suffixes = {n.rpartition(".")[2].lower() for n in images}
    codec = "png" if suffixes == {"png"} else "+".join(sorted(suffixes))
    extra = dict(manifest.get("extra", {}))
    if "source" in manifest:
        extra["from"] = manifest["source"]
    known = {"crop": "unknown", "filter": "unknown", "codec": codec, "sha256": None}
    return Listing(
        name=str(manifest.get("name", name)),
        source=source,
        names=images,
        reader=reader,
        labels=labels,
        classes=classes,
        class_names=extra.get("class_names") or class_names,
        fingerprint=hash_json([fingerprint, (labels_file or b"").decode("latin-1")]),
        about={key: manifest.get(key, default) for key, default in known.items()} | {"extra": extra},
        problems=problems + wrong,
        ignored=ignored,
    )


@dataclass(frozen=True)
class ZipReader(Reader):
    """Members of a zip; each process opens its own handle, and a new one when the file was replaced."""

    path: str
    stamp: tuple[int, int]

    def read(self, name: str) -> bytes:
        try:
            with self.open(name) as f:
                return f.read()
        except (zipfile.BadZipFile, zlib.error, EOFError) as e:
            raise BadImage("damaged", str(e)[:120] or "the zip is cut off") from None

    def open(self, name: str) -> BinaryIO:
        z = _open_zip(self.path, self.stamp, os.getpid())
        info = z.getinfo(name)
        _check_size(info.file_size)
        try:
            return cast(BinaryIO, z.open(info))
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as e:
            raise BadImage("damaged", str(e)[:120]) from None


def _check_size(size: int) -> None:
    if size > _MAX_FILE:
        raise BadImage("too large", f"{size:,} bytes, accepted are {_MAX_FILE:,}")


@functools.lru_cache(maxsize=4)
def _open_zip(path: str, stamp: tuple[int, int], pid: int) -> zipfile.ZipFile:
    """One handle per process: after a fork two processes would share one file position."""
    return zipfile.ZipFile(path)


def of_zip(path: Path) -> Listing:
    size_time = stamp(path)
    try:
        z = _open_zip(str(path.absolute()), size_time, os.getpid())
    except (zipfile.BadZipFile, NotImplementedError, OSError) as e:
        raise GddlabError(f"{path} is a damaged zip ({e}): download or make it again") from None
    infos = [i for i in z.infolist() if not i.is_dir()]
    problems: list[Problem] = []
    seen: set[str] = set()
    names: list[str] = []
    for info in infos:
        name = info.filename
        if name in seen:
            problems.append(Problem(name, "name used twice", "in the zip"))
        elif "\\" in info.orig_filename or name.startswith("/") or ".." in name.split("/") or name[1:2] == ":":
            problems.append(Problem(name, "path not accepted", "absolute, upwards, or with backslashes"))
        elif info.flag_bits & 1:
            problems.append(Problem(name, "encrypted"))
        else:
            names.append(name)
        seen.add(name)
    images, unread, ignored = image_files(names)
    table = {name: _table(z, name, path) for name in (LABELS, MANIFEST) if name in names}
    about: dict[str, Any] = {}
    if MANIFEST in table:
        try:
            about = _about(json.loads(table[MANIFEST]), f"{path}: {MANIFEST}")
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
            raise GddlabError(f"{path}: {MANIFEST} is damaged ({e}): prepare the data again") from None
    return _listing(
        path.stem,
        str(path),
        images,
        ZipReader(str(path.absolute()), size_time),
        table.get(LABELS),
        about,
        problems + unread,
        ignored,
        fingerprint=hash_json([[i.filename, i.file_size, i.CRC] for i in infos]),
    )


def _table(z: zipfile.ZipFile, name: str, path: Path) -> bytes:
    if z.getinfo(name).file_size > _MAX_TABLE:
        raise GddlabError(f"{path}: {name} has {z.getinfo(name).file_size:,} bytes, accepted are {_MAX_TABLE:,}")
    try:
        return z.read(name)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as e:
        raise GddlabError(f"{path}: {name} is damaged ({e}): download or make the zip again") from None


_SPLITS = ("train", "validation", "valid", "val", "dev", "test", "all")
_IMAGES = ("image", "img")
_LABELS = ("label", "labels")


@dataclass(frozen=True)
class HuggingFaceReader(Reader):
    """Rows of a dataset; each process loads it from the local cache."""

    address: str

    def read(self, name: str) -> bytes:
        table, column = _load(self.address, os.getpid())[:2]
        value = table[int(name)][column]
        content = value.get("bytes") if isinstance(value, dict) else None
        if content is None and isinstance(value, dict) and value.get("path"):
            with open(value["path"], "rb") as f:
                content = f.read()
        if not isinstance(content, bytes):
            raise BadImage("empty file", "no image in this row")
        return content


def of_huggingface(address: str) -> Listing:
    """The images and, where a column holds them, the labels of "hf:NAME[:CONFIG][:SPLIT]".

    NAME is what `datasets.load_dataset` takes, or a folder written by `save_to_disk`. A single addition is a split if
    it has the name of one (train, test, validation, ..., or with + or []), else a configuration; the default split is
    "train". Images are in the column "image" or "img", or in the only one of images; labels are in "label" or "labels",
    or in the first column of class labels.

    Raises:
        GddlabError: `datasets` is missing, the dataset cannot be loaded, or it has no column of images.
    """
    absolute = _absolute(address)
    table, _, label = _load(absolute, os.getpid())
    names = [f"{i:08d}" for i in range(len(table))]
    labels, class_names, classes, problems = None, None, 0, []
    if label is not None:
        values = table.with_format(None)[label][:]
        class_names = getattr(table.features[label], "names", None)
        limit = len(class_names) if class_names else None
        for name, y in zip(names, values, strict=True):
            if type(y) is not int or y < 0 or (limit is not None and y >= limit):
                kind = "no label" if y is None or y == -1 else "class id out of range"
                problems.append(Problem(name, kind, f"{label}={y}"))
        if not problems:
            labels = np.array(values, dtype=np.int64)
            classes = limit or int(labels.max(initial=-1)) + 1
    return Listing(
        name=address.removeprefix("hf:").replace("/", "-"),
        source=address,
        names=names,
        reader=HuggingFaceReader(absolute),
        labels=labels,
        classes=classes,
        class_names=class_names,
        fingerprint=str(table._fingerprint),
        about={"crop": "unknown", "filter": "unknown", "codec": "unknown"},
        problems=problems,
    )


def _parts(address: str) -> tuple[str, str | None, str]:
    name, *rest = address.removeprefix("hf:").split(":")
    if not name or len(rest) > 2 or not all(rest):
        raise GddlabError(f"data={address!r}: give hf:NAME, hf:NAME:SPLIT, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    if len(rest) == 2:
        return name, rest[0], rest[1]
    if rest and (rest[0] in _SPLITS or "[" in rest[0] or "+" in rest[0]):
        return name, None, rest[0]
    return name, rest[0] if rest else None, "train"


def _absolute(address: str) -> str:
    """The address with the absolute path of a local folder, which does not depend on the working folder."""
    name = _parts(address)[0]
    return address.replace(name, os.path.abspath(name), 1) if os.path.isdir(name) else address


@functools.lru_cache(maxsize=2)
def _load(address: str, pid: int) -> tuple[Any, str, str | None]:
    """The rows, the name of the column of images (not decoded), and that of the labels."""
    name, config, split = _parts(address)
    try:
        hf = importlib.import_module("datasets")
    except ImportError:
        raise GddlabError(f"data={address!r} needs the package datasets: run pip install datasets") from None
    try:
        if os.path.isfile(os.path.join(name, "dataset_dict.json")) or os.path.isfile(os.path.join(name, "state.json")):
            table = hf.load_from_disk(name)
            table = table[split] if isinstance(table, dict) else table
        else:
            table = hf.load_dataset(name, config, split=split)
    except Exception as e:  # its own errors, those of its readers, of the network, of the hub
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        raise GddlabError(
            f"data={address!r} cannot be loaded ({reason}): check name, configuration, split, network"
        ) from None
    column = _column(address, table.features, hf)
    numbers = [key for key, f in table.features.items() if isinstance(f, hf.ClassLabel)]
    named = [k for k in _LABELS if k in numbers or str(getattr(table.features.get(k), "dtype", "")).startswith("int")]
    return table.cast_column(column, hf.Image(decode=False)), column, next(iter([*named, *numbers]), None)


def _column(address: str, features: Any, hf: Any) -> str:
    columns = [key for key, f in features.items() if isinstance(f, hf.Image)]
    named = [key for key in _IMAGES if key in columns]
    if named or len(columns) == 1:
        return str((named or columns)[0])
    raise GddlabError(
        f"data={address!r} has {len(columns)} columns of images (columns: {', '.join(features)}): "
        "give a dataset with one, or with one called image"
    )


ARCHIVE = "cifar-10-python.tar.gz"
FOLDER = "cifar-10-batches-py"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
_SIDE = 32
_ROW = 3 * _SIDE * _SIDE
_MAX_BATCH = 64 << 20  # bytes; the published ones have 31 million
_MAX_MEMBERS = 64


_PUBLISHED = Published(
    title="CIFAR-10",
    variable=None,
    url=f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}",
    suffixes=(".tar.gz",),
    folder="datasets",
    known_hash="md5:c58f30108f718f92721af3b95e74349a",
    about="170 MB",
    noun="archive of",
)


def find_cifar10(*, download: bool = False) -> Path:
    """The archive or its unpacked folder: in the working folder, `$GDDLAB_HOME`, its `datasets` or the cache.

    Args:
        download: Downloads the archive into the cache if it is not found.

    Raises:
        NotFound: It is not found, and not to be downloaded.
        GddlabError: The download failed.
    """
    for folder in (*search_folders(_PUBLISHED.folder), cache_dir()):
        for name in (ARCHIVE, FOLDER):
            if (folder / name).exists():
                return folder / name
    if not download:
        raise NotFound(f"{_PUBLISHED.missing('not on this machine')}, or give download=True")
    path = _PUBLISHED.fetch()
    assert path is not None
    return path


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
        except (Refused, ValueError) as e:
            raise GddlabError(
                printable(f"{path}: {name} is no batch of CIFAR-10 ({e}): fetch the archive again")
            ) from None
    return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])


def _from_folder(path: Path) -> dict[str, bytes]:
    out = {}
    for name in _BATCHES:
        file = path / name
        if file.is_file():
            _check_archive_size(path, name, file.stat().st_size)
            out[name] = file.read_bytes()
    return out


def _from_tar(path: Path) -> dict[str, bytes]:
    out = {}
    try:
        with tarfile.open(path, "r:*") as tar:
            for i, member in enumerate(tar):
                if i >= _MAX_MEMBERS:
                    raise GddlabError(f"{path} has more than {_MAX_MEMBERS} files: give {ARCHIVE}")
                _check_archive_size(path, member.name, member.size)
                folder, _, name = member.name.rpartition("/")
                if name in _BATCHES and folder.rpartition("/")[2] == FOLDER and (f := tar.extractfile(member)):
                    out[name] = f.read(_MAX_BATCH)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as e:
        raise GddlabError(f"{path} cannot be read as a tar archive ({e}): fetch it again") from None
    return out


def _check_archive_size(path: Path, name: str, size: int) -> None:
    if size > _MAX_BATCH:
        raise GddlabError(f"{path}: {name} has {size:,} bytes, accepted are {_MAX_BATCH:,}: this is not CIFAR-10")


def _batch(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images, (n, 32, 32, 3), and labels, (n,), of a batch, a pickle that is read as data."""
    batch = PickleReader(Blob(memoryview(content), 0), find=find_plain, budget=Budget()).read()
    if not isinstance(batch, dict) or not isinstance(batch.get("data"), Array):
        raise ValueError("no dict with an array of data")
    images, labels = batch["data"].value, batch.get("labels")
    if images is None or images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != _ROW or not len(images):
        raise ValueError(f"its data is no uint8 array of shape (n, {_ROW})")
    n = len(images)
    if not isinstance(labels, list) or len(labels) != n:
        raise ValueError(f"it has not one label for each of {n} images")
    if not all(type(y) is int and 0 <= y < len(CLASSES) for y in labels):
        raise ValueError(f"its labels are not all in 0..{len(CLASSES) - 1}")
    return images.reshape(n, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1), np.array(labels, dtype=np.int64)
