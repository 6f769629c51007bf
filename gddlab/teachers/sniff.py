"""Says what a file is by its first bytes, so that a wrong file is refused with its right name."""

from __future__ import annotations

import json
import re
from pathlib import Path

from gddlab.errors import GddlabError, NotFound

__all__ = ["kind_of"]

MAGIC = (
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"BZh", "a bzip2 archive: unpack it"),
    (b"\xfd7zXZ", "an xz archive: unpack it"),
    (b"(\xb5/\xfd", "a zstd archive: unpack it"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a numpy array, no network"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GGUF", "a GGUF file"),
    (b"PAR1", "a Parquet table"),
    (b"%PDF", "a PDF"),
    (b"\x7fELF", "a program"),
)


def kind_of(path: Path) -> str:
    """ "pickle", "torch" (a zip that torch.save wrote) or "safetensors".

    Raises:
        NotFound: No such file.
        GddlabError: The file is something else, which the message names.
    """
    if not path.exists():
        raise NotFound(f"no such file: {path}")
    if not path.is_file():
        raise GddlabError(f"{path} is no file: give a .pkl or .safetensors file")
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(4096)
    if head[:1] == b"\x80" and 2 <= head[1:2][0] <= 5 if len(head) > 1 else False:
        return "pickle"
    if head.startswith(b"PK\x03\x04"):
        what = _zip(path)
        if what == "torch":
            return "torch"
    elif size > 9 and int.from_bytes(head[:8], "little") < size and head[8:9] == b"{":
        return "safetensors"
    else:
        what = _other(head)
    raise GddlabError(f"{path} is {what}; a teacher is an EDM pickle (.pkl) or a .safetensors file that gddlab wrote")


def _zip(path: Path) -> str:
    import zipfile

    try:
        with zipfile.ZipFile(path) as z:
            names = z.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError):
        return "a damaged zip, perhaps a download that was cut off"
    if any(n.endswith("data.pkl") for n in names):
        return "torch"
    if any(n.endswith((".png", "dataset.json")) for n in names):
        return f"a zip of images ({len(names):,} files), which is a dataset and no teacher"
    return f"a zip of {len(names):,} files"


def _other(head: bytes) -> str:
    if not head:
        return "empty (0 bytes), perhaps a download that was cut off"
    if head.startswith(b"version https://git-lfs"):
        found = re.search(rb"size (\d+)", head)
        size = f" for a file of {int(found[1]):,} bytes" if found else ""
        return f"a Git LFS pointer{size}: run `git lfs pull` where it was cloned"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head")):
        return "a web page, perhaps a sign-in or error page that was downloaded in its place"
    for magic, what in MAGIC:
        if head.startswith(magic):
            return what
    if text[:1] in (b"{", b"["):
        try:
            json.loads(head)
            return "JSON text"
        except ValueError:
            pass
    if head[:1] in (b"(", b"c", b"]", b"}", b"l", b"d", b"i") and b"\n" in head[:200] and not text[:20].isalpha():
        return f"no pickle of protocol 2 or newer (it starts with {head[:12]!r} at byte 0)"
    return f"no pickle (it starts with {head[:12]!r} at byte 0)"
