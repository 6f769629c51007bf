"""Readers of image collections: folders, zips, arrays, Hugging Face datasets, the archive of CIFAR-10."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import io
import json
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from gddlab.datasets.base import ImageDataset, content_hash
from gddlab.datasets.listing import (
    GIVEN,
    LABELS,
    MANIFEST,
    MAX_CLASSES,
    Listing,
    Problem,
    attempt,
    classes_by_folder,
    classes_of_table,
    image_files,
    read_all,
)
from gddlab.datasets.pixels import BadImage
from gddlab.errors import GddlabError, NotFound, warn
from gddlab.files import cache_dir, hash_json
from gddlab.limits import usable_memory
from gddlab.pickles import Array, Blob, Budget, PickleReader, Refused, find_plain, printable
from gddlab.pretrained.published import Published, offline, search_folders
from gddlab.runtime import switched

_MAX_FILE = 256 << 20  # bytes of one image
_MAX_TABLE = 1 << 30  # of dataset.json or manifest.json


def _check_size(name: str, size: int) -> None:
    limit = _MAX_TABLE if name in (LABELS, MANIFEST) else _MAX_FILE
    if size > limit:
        raise BadImage("too large", f"{size:,} bytes, accepted are {limit:,}")


def of_folder(root: Path) -> Listing:
    top = root.absolute()

    def open_file(name: str) -> BinaryIO:
        path = top / name
        _check_size(name, path.stat().st_size)
        return path.open("rb")

    def stamp(name: str) -> tuple[int, int]:
        s = (top / name).stat()
        return s.st_size, s.st_mtime_ns

    names: list[str] = []
    folders: list[str] = []
    seen: set[tuple[int, int]] = set()
    for where, below, files in os.walk(top, followlinks=True):
        s = os.stat(where)
        if (s.st_dev, s.st_ino) in seen:  # a link to a folder above
            below.clear()
            continue
        seen.add((s.st_dev, s.st_ino))
        below[:] = sorted(b for b in below if not b.startswith("."))
        inside = Path(where).relative_to(top).as_posix()
        if inside == ".":
            folders = list(below)
        names += files if inside == "." else [f"{inside}/{f}" for f in files]
    return _of_files(root, names, open_file, stamp, folders=folders)


def of_zip(path: Path) -> Listing:
    absolute = str(path.absolute())

    @functools.cache
    def opened(pid: int) -> zipfile.ZipFile:
        """One handle per process: after a fork two processes would share one file position."""
        return zipfile.ZipFile(absolute)

    def open_member(name: str) -> BinaryIO:
        z = opened(os.getpid())
        _check_size(name, z.getinfo(name).file_size)
        try:
            return cast(BinaryIO, z.open(name))
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as e:
            raise BadImage("damaged", str(e)[:120]) from None

    try:
        infos = [i for i in opened(os.getpid()).infolist() if not i.is_dir()]
    except (zipfile.BadZipFile, NotImplementedError, OSError) as e:
        raise GddlabError(f"{path} is a damaged zip ({e}): download or make it again") from None
    problems: list[Problem] = []
    names: list[str] = []
    seen: set[str] = set()
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
    marks = {i.filename: (i.file_size, i.CRC) for i in infos}
    return _of_files(path, names, open_member, marks.__getitem__, problems=problems)


def _of_files(
    path: Path,
    names: Sequence[str],
    open_file: Callable[[str], BinaryIO],
    mark: Callable[[str], Any],
    *,
    problems: Sequence[Problem] = (),
    folders: Sequence[str] = (),
) -> Listing:
    """The images among the files of a folder or zip, with its dataset.json and manifest.json.

    Args:
        mark: Of a file, JSON that changes when it does.
        folders: Sub-folders of a folder, in order.
    """
    found, unread, ignored = image_files(names)
    marks = dict(zip(found, attempt(mark, found), strict=True))
    lost = [m for m in marks.values() if isinstance(m, Problem)]
    images = [name for name in found if not isinstance(marks[name], Problem)]
    problems = [*problems, *unread, *lost]
    if not images and not problems:
        kinds = ", ".join(f"{n} {suffix}" for suffix, n in ignored.items()) or "nothing"
        raise GddlabError(f"{path} has no images (it has {kinds}): accepted are PNG, JPEG, WebP, BMP, GIF, TIFF")
    tables = {name: _table(path, open_file, name) for name in (LABELS, MANIFEST) if name in names}
    about = _manifest(tables[MANIFEST], path) if MANIFEST in tables else {}
    if LABELS in tables:
        # 0 classes: made without labels; a dataset.json added later counts
        classes = classes_of_table(images, tables[LABELS], about.get("classes") or None)
    else:
        used = {n.split("/", 1)[0] for n in images if "/" in n}
        classes = classes_by_folder(images, [f for f in folders if f not in used] if used else ())
    suffixes = {n.rpartition(".")[2].lower() for n in images}
    known = {"crop": "unknown", "filter": "unknown", "codec": "+".join(sorted(suffixes))}
    extra = dict(about.get("extra") or {}) | ({"from": about["source"]} if "source" in about else {})
    if classes.names and not extra.get("class_names"):
        extra["class_names"] = classes.names
    return Listing(
        name=str(about.get("name", path.absolute().name if path.is_dir() else path.stem)),
        source=str(path),
        names=images,
        open=open_file,
        labels=classes.ids,
        classes=classes.count,
        fingerprint=hash_json([[(i, marks[i]) for i in images], [t.decode("latin-1") for t in tables.values()]]),
        about={key: about.get(key, default) for key, default in known.items()},
        extra=extra,
        sha256=about.get("sha256"),
        groups=classes.groups,
        problems=[*problems, *classes.problems],
        ignored=ignored,
    )


def _table(path: Path, open_file: Callable[[str], BinaryIO], name: str) -> bytes:
    found = next(attempt(lambda n: read_all(open_file(n)), [name]))
    if isinstance(found, Problem):
        raise GddlabError(f"{path}: {found}: download or make the data again")
    return found


def _manifest(content: bytes, path: Path) -> dict[str, Any]:
    """The manifest beside images; {} if the file of that name is something else."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as e:
        raise GddlabError(f"{path}: {MANIFEST} is damaged ({e}): remove it, or prepare the data again") from None
    if not isinstance(value, dict) or not {"crop", "filter", "codec", "sha256", "classes"} <= value.keys():
        return {}
    if type(value["classes"]) is not int or not isinstance(value.get("extra"), dict | None):
        raise GddlabError(f"{path}: {MANIFEST} is damaged (classes={value['classes']!r}): remove it, or prepare again")
    return value


_ABOUT: dict[str, Any] = {"crop": "unknown", "filter": "unknown", "codec": "none"}
_GIVE_ARRAY = "give uint8 (N, H, W, 1 or 3)"


def of_array(images: np.ndarray, labels: np.ndarray | None = None, *, name: str, source: str) -> ImageDataset | Listing:
    """Images as an array, uint8, (N, H, W, 1 or 3), or (N, H, W) of grey ones; `labels`, integers, (N,), or None.

    Raises:
        GddlabError: Another type or shape; labels that are none.
    """
    what = f"{source}: {images.dtype} {images.shape}"
    if images.dtype.kind == "f":
        raise GddlabError(f"{what}: {_GIVE_ARRAY}; of x in [-1, 1]: (127.5 * x + 128).clip(0, 255).astype('uint8')")
    if images.dtype == np.uint8 and images.ndim == 3 and images.shape[2] > 4:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        turned = images.ndim == 4 and images.shape[1] in (1, 3)
        raise GddlabError(f"{what}: {_GIVE_ARRAY}{', as x.transpose(0, 2, 3, 1) is' if turned else ''}")
    if not images.size:
        raise GddlabError(f"{what}: give at least one image")
    if images.max() == 1:
        warn(f"{what}: the highest value is 1, of 255; if 1 is white, multiply by 255")
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != (len(images),) or labels.min() < 0):
        what = f"{labels.dtype} {labels.shape}"
        raise GddlabError(f"{source}: labels are {what}: give integers from 0 up, ({len(images)},)")
    classes = 0 if labels is None else int(labels.max()) + 1
    if classes > MAX_CLASSES:
        raise GddlabError(f"{source}: the largest label is {classes - 1}, accepted are 0..{MAX_CLASSES - 1}")
    if not (images.flags.writeable or isinstance(images, np.memmap)):
        images = images.copy()  # as jax gives them; torch warns of arrays that cannot be written
    if images.shape[1] == images.shape[2]:
        return ImageDataset(images, labels, classes=classes, name=name, source=source, **_ABOUT)
    return Listing(
        name=name,
        source=source,
        names=numbers(len(images)),
        open=lambda name: images[int(name)],
        labels=None if labels is None else labels.astype(np.int64),
        classes=classes,
        fingerprint=content_hash(images, labels),
        about=_ABOUT,
    )


def of_list(images: Sequence[Any]) -> Listing:
    """Pillow images, and arrays, uint8, (H, W, 1 or 3) or (H, W), in any mixture; without labels.

    Raises:
        GddlabError: The first that is neither.
    """
    from PIL import Image

    found: list[np.ndarray | Image.Image] = []
    digest = hashlib.sha256()
    for i, x in enumerate(images):
        if isinstance(x, np.ndarray) and x.ndim == 2:
            x = x[..., None]
        array = isinstance(x, np.ndarray) and x.dtype == np.uint8 and x.ndim == 3 and x.shape[2] in (1, 3) and x.size
        if not array and not isinstance(x, Image.Image):
            what = f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else f"a {type(x).__name__}"
            raise GddlabError(f"image {i} of the list is {what}: give Pillow images, or arrays, uint8 (H, W, 1 or 3)")
        digest.update(repr(x.shape if isinstance(x, np.ndarray) else (x.mode, x.size)).encode())
        with contextlib.suppress(Exception):  # a damaged one is reported when it is decoded
            digest.update(x.tobytes())
        found.append(x)
    if not found:
        raise GddlabError("an empty list: give at least one image")
    name = GIVEN[1]
    opened = found.__getitem__
    return Listing(
        name=name,
        source=name,
        names=numbers(len(found)),
        open=lambda name: opened(int(name)),
        fingerprint=digest.hexdigest(),
        about=_ABOUT,
    )


def of_array_file(path: Path) -> ImageDataset | Listing:
    """The images of a .npy file; or of a .npz, under `arr_0` with class ids under `arr_1`, as ADM's samplers write.

    A large file is mapped, not read, unless it is compressed. Objects are refused: they would be unpickled.

    Raises:
        GddlabError: No images, statistics in place of images, or a damaged file.
    """
    try:
        if not zipfile.is_zipfile(path):
            images, labels = _array(path, 0), None
        else:
            with zipfile.ZipFile(path) as z:
                members = {i.filename.removesuffix(".npy"): i for i in z.infolist()}
            if "arr_0" not in members and {"mu", "sigma"} <= members.keys():
                raise GddlabError(f"{path} holds statistics, no images: they are given to evaluate as data=")
            key = "arr_0" if "arr_0" in members else next(iter(members), "")
            if key != "arr_0" and len(members) != 1:
                held = ", ".join(list(members)[:8]) or "nothing"
                raise GddlabError(f"{path} holds {held}: give the images as arr_0, and class ids as arr_1")
            images = _array(path, members[key])
            labels = _array(path, members["arr_1"]) if "arr_1" in members else None
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, struct.error) as e:
        if isinstance(e, GddlabError):
            raise
        reason = (str(e).splitlines() or [type(e).__name__])[0][:120]
        raise GddlabError(f"{path} cannot be read as arrays ({reason}): write it again, by numpy.savez") from None
    return of_array(images, labels, name=path.stem, source=str(path))


def _array(path: Path, member: int | zipfile.ZipInfo) -> np.ndarray:
    """An array of a .npy file (0), or of an entry of a .npz; where it is large, mapped copy on write."""
    size = path.stat().st_size if isinstance(member, int) else member.file_size
    stored = isinstance(member, int) or (member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1)
    if stored and size > usable_memory()[1] // 4:
        with path.open("rb") as f:
            if not isinstance(member, int):  # the name and the extra field stand between header and content
                f.seek(member.header_offset + 26)
                f.seek(sum(struct.unpack("<HH", f.read(4))), os.SEEK_CUR)
            if np.lib.format.read_magic(f) == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(f)
                if not dtype.hasobject:
                    return np.memmap(path, dtype, "c", f.tell(), shape, order="F" if fortran else "C")
    if isinstance(member, int):
        return cast(np.ndarray, np.load(path, allow_pickle=False))
    with np.load(path, allow_pickle=False) as arrays:
        return cast(np.ndarray, arrays[member.filename.removesuffix(".npy")])


_SPLITS = ("train", "validation", "valid", "val", "dev", "test", "all")


def of_huggingface(address: str) -> Listing:
    """The images and, where a column holds them, the labels of "hf:NAME[:CONFIG][:SPLIT]".

    NAME is what `datasets.load_dataset` takes, or a folder written by `save_to_disk`. A single addition is a split if
    it has the name of one (train, test, validation, ..., or with + or []), else a configuration; the default split is
    "train". Images are in the column "image" or "img", or in the only one of images; labels are in "label" or "labels",
    or in the first column of class labels.

    Raises:
        GddlabError: `datasets` is missing, the dataset cannot be loaded, or it has no column of images.
    """
    table, column, label = _load(address)

    def open_row(name: str) -> BinaryIO:
        value = table[int(name)][column] or {}
        if value.get("bytes") is None and value.get("path"):
            return open(value["path"], "rb")
        if not isinstance(value.get("bytes"), bytes):
            raise BadImage("empty file", "no image in this row")
        return io.BytesIO(value["bytes"])

    names, problems = numbers(len(table)), []
    labels, class_names = None, None
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
    return Listing(
        name=address.removeprefix("hf:").replace("/", "-"),
        source=address,
        names=names,
        open=open_row,
        labels=labels,
        classes=0 if labels is None else len(class_names or ()) or int(labels.max(initial=-1)) + 1,
        fingerprint=str(table._fingerprint),
        about={"crop": "unknown", "filter": "unknown", "codec": "unknown"},
        extra={"class_names": class_names} if class_names else {},
        problems=problems,
    )


def numbers(n: int) -> list[str]:
    """Names of images that have none."""
    return [f"{i:08d}" for i in range(n)]


def _load(address: str) -> tuple[Any, str, str | None]:
    """The rows, the name of the column of images (not decoded), and that of the labels."""
    name, *rest = address.removeprefix("hf:").split(":")
    if not name or len(rest) > 2 or not all(rest):
        raise GddlabError(f"data={address!r}: give hf:NAME, hf:NAME:SPLIT, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    if len(rest) == 1:
        named = rest[0] in _SPLITS or re.search(r"[\[+]", rest[0])
        rest = ["", rest[0]] if named else [rest[0], "train"]
    config, split = rest or ("", "train")
    try:
        hf = importlib.import_module("datasets")
    except ImportError:
        raise GddlabError(f"data={address!r} needs the package datasets: run pip install datasets") from None
    try:
        if os.path.isfile(os.path.join(name, "dataset_dict.json")) or os.path.isfile(os.path.join(name, "state.json")):
            table = hf.load_from_disk(name)
            table = table[split] if isinstance(table, dict) else table
        else:
            with _hub():
                table = hf.load_dataset(name, config or None, split=split)
    except Exception as e:  # its own errors, those of its readers, of the network, of the hub
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        if offline():
            raise GddlabError(
                f"data={address!r} is not on this machine, and GDDLAB_OFFLINE is set ({reason}): unset it to fetch it"
            ) from None
        raise GddlabError(
            f"data={address!r} cannot be loaded ({reason}): check name, configuration, split, network"
        ) from None
    features = table.features
    images = [key for key, f in features.items() if isinstance(f, hf.Image)]
    chosen = [key for key in ("image", "img") if key in images] or images
    if not chosen or (len(images) > 1 and chosen is images):
        raise GddlabError(
            f"data={address!r} has {len(images)} columns of images (columns: {', '.join(features)}): "
            "give a dataset with one, or with one called image"
        )
    ids = [key for key, f in features.items() if isinstance(f, hf.ClassLabel)]
    labels = [
        k for k in ("label", "labels") if k in ids or str(getattr(features.get(k), "dtype", "")).startswith("int")
    ]
    return table.cast_column(chosen[0], hf.Image(decode=False)), chosen[0], next(iter([*labels, *ids]), None)


@contextlib.contextmanager
def _hub() -> Iterator[None]:
    """Where GDDLAB_OFFLINE is set, the hub's client uses what is on this machine, and refuses the rest at once."""
    if not offline():
        yield
        return
    clients = [importlib.import_module(name) for name in ("huggingface_hub.constants", "datasets.config")]
    with switched("HF_HUB_OFFLINE", True, *clients):
        yield


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
    """The archive or its unpacked folder, in the working folder, `$GDDLAB_HOME`, the cache; or a download.

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
    return cast(Path, _PUBLISHED.fetch())


def read_cifar10(path: Path) -> ImageDataset:
    """The training images, in the order of the five batches, from cifar-10-python.tar.gz or cifar-10-batches-py.

    Raises:
        GddlabError: A batch is missing, too large, or holds anything but images and labels.
    """
    contents = _from_folder(path) if path.is_dir() else _from_tar(path)
    parts = []
    for name in _BATCHES:
        if name not in contents:
            raise GddlabError(f"{path} has no {FOLDER}/{name}: give the whole archive ({_PUBLISHED.known_hash})")
        try:
            parts.append(_batch(contents.pop(name)))
        except (Refused, ValueError) as e:
            raise GddlabError(
                printable(f"{path}: {name} is no batch of CIFAR-10 ({e}): fetch the archive again")
            ) from None
    return ImageDataset(
        np.concatenate([x for x, _ in parts]),
        np.concatenate([y for _, y in parts]),
        classes=len(CLASSES),
        name="cifar10",
        source=f"CIFAR-10 training images ({path.name})",
        extra={"class_names": CLASSES},
    )


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
