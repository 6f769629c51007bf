"""Trees of image files: folders and zips, with dataset.json, class folders or neither."""

from __future__ import annotations

import functools
import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from gddlab.datasets.listing import LABELS, MANIFEST, Listing, Problem, arrange, image_files
from gddlab.datasets.pixels import BadImage
from gddlab.errors import GddlabError
from gddlab.files import hash_json, read_json

__all__ = ["FolderReader", "ZipReader", "of_folder", "of_zip", "stamp"]

_MAX_FILE = 256 << 20  # bytes of one image file
_MAX_TABLE = 1 << 30  # bytes of dataset.json or manifest.json


def stamp(path: Path) -> tuple[int, int]:
    """Size and time of change: a file replaced has another."""
    s = path.stat()
    return s.st_size, s.st_mtime_ns


@dataclass(frozen=True)
class FolderReader:
    """Files below a folder."""

    root: str

    def read(self, name: str) -> bytes:
        with self.open(name) as f:
            return f.read()

    def open(self, name: str) -> BinaryIO:
        path = os.path.join(self.root, name)
        _check_size(os.path.getsize(path))
        return open(path, "rb")

    def part(self, names: Sequence[str]) -> FolderReader:
        return self


def of_folder(root: Path) -> Listing:
    names: list[str] = []
    stamps: list[tuple[int, int]] = []
    folders: list[str] = []
    seen: set[tuple[int, int]] = set()
    for where, below, files in os.walk(root, followlinks=True):
        s = os.stat(where)
        if (s.st_dev, s.st_ino) in seen:  # a link to a folder above would go on for ever
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
    """The manifest beside images; another file of that name is not one."""
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
    recorded = manifest.get("classes") or None  # 0: made without labels; a dataset.json put there later counts
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
class ZipReader:
    """Members of a zip; each process opens it for itself, and again when the file was replaced."""

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

    def part(self, names: Sequence[str]) -> ZipReader:
        return self


def _check_size(size: int) -> None:
    if size > _MAX_FILE:
        raise BadImage("too large", f"{size:,} bytes, accepted are {_MAX_FILE:,}")


@functools.lru_cache(maxsize=4)
def _open_zip(path: str, stamp: tuple[int, int], pid: int) -> zipfile.ZipFile:
    """A process of its own handle: after a fork two processes would move one file position."""
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
