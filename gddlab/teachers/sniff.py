"""Says what a file is by its first bytes, so that a wrong file is refused with its right name."""

from __future__ import annotations

import itertools
import mmap
import re
from pathlib import Path

from gddlab.errors import GddlabError, NotFound
from gddlab.teachers.torchfile import zip_directory
from gddlab.teachers.unpickle import printable

__all__ = ["kind_of"]

MAGIC = (
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"BZh", "a bzip2 archive: unpack it"),
    (b"\xfd7zXZ", "an xz archive: unpack it"),
    (b"(\xb5/\xfd", "a zstd archive: unpack it"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it"),
    (b"Rar!", "a rar archive: unpack it"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a numpy array"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"GGUF", "a GGUF file"),
    (b"PAR1", "a Parquet table"),
    (b"%PDF", "a PDF"),
    (b"\x7fELF", "a program"),
)
CUT_OFF = "perhaps a download that was cut off: fetch it again"


def kind_of(path: Path) -> str:
    """ "pickle", "torch" (a zip that torch.save wrote) or "safetensors".

    Raises:
        NotFound: No such file.
        GddlabError: The file is something else, which the message names.
    """
    try:
        if not path.exists():
            raise NotFound(printable(f"no such file: {path}"))
        if not path.is_file():
            what = "a folder" if path.is_dir() else "no regular file"
            raise GddlabError(printable(f"{path} is {what}: give a .pkl or .safetensors file"))
        size = path.stat().st_size
        with path.open("rb") as f:
            head = f.read(4096)
        if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
            return "pickle"
        if head[8:10] in (b'{"', b"{}") and size >= (announced := 8 + int.from_bytes(head[:8], "little")):
            return "safetensors"
        if head.startswith(b"PK\x03\x04"):
            if (what := _zip(path)) == "torch":
                return "torch"
        elif head[8:10] == b'{"' and head[5:8] == b"\0\0\0":
            what = f"a .safetensors file of {size:,} bytes, whose header alone takes {announced:,}: {CUT_OFF}"
        else:
            what = _other(head)
    except OSError as e:
        if isinstance(e, NotFound):
            raise
        raise GddlabError(printable(f"{path} cannot be read: {e.strerror or e}")) from None
    accepted = "a teacher is an EDM pickle (.pkl) or a .safetensors file that gddlab wrote"
    raise GddlabError(printable(f"{path} is {what}; {accepted}"))


def _zip(path: Path) -> str:
    with path.open("rb") as f:
        view = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        names = [entry.name for entry in itertools.islice(zip_directory(view), 1000)]  # data.pkl is torch.save's first
    except ValueError as e:
        return f"a damaged zip ({e})"
    if any(n.endswith("data.pkl") for n in names):
        return "torch"
    many = f"{len(names):,} files" if len(names) < 1000 else "1,000 files and more"
    if any(n.lower().endswith((".png", ".jpg", ".jpeg", "dataset.json")) for n in names):
        return f"a zip of images ({many}), which is a dataset"
    if names and all(n.endswith(".npy") for n in names):
        return f"numpy arrays (.npz, {many})"
    return f"a zip of {many}, none of them torch's data.pkl"


def _other(head: bytes) -> str:
    if not head:
        return f"empty (0 bytes), {CUT_OFF}"
    if head.startswith(b"version https://git-lfs"):
        found = re.search(rb"\nsize (\d{1,18})", head)
        size = f" for a file of {int(found[1]):,} bytes" if found else ""
        return f"a Git LFS pointer{size}, not the file itself: run `git lfs pull` where it was cloned"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return "a web page (HTML), perhaps a sign-in or error page in place of the download: fetch it again"
    if text.startswith(b"<?xml"):
        return "an XML document, perhaps the error message of a server in place of the download: fetch it again"
    for magic, what in MAGIC:
        if head.startswith(magic):
            return what
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it"
    if re.match(rb"\((dp\d*\n|lp\d*\n|[dlitS(])|c[\w.]+\n[\w.]+\n|[\]}]q.", head, re.DOTALL):
        return f"a pickle of protocol 0 or 1, which is not read (it starts with {head[:12]!r} at byte 0)"
    starts = f"it starts with {head[:24]!r} at byte 0"
    if head.isascii() and not re.search(rb"[^\t\n\r\x20-\x7e]", head):
        return f"JSON text ({starts})" if text[:1] in (b"{", b"[") else f"plain text ({starts})"
    return f"no pickle of protocol 2 to 5 ({starts})"
