"""A file that is no pickle says what it is, in one line."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import mmap
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from gddlab.errors import GddlabError, NotFound
from gddlab.nets import save_network
from gddlab.teachers import load_teacher
from gddlab.teachers.edm import read_edm
from gddlab.teachers.torchfiles import format_of, zip_directory
from tests.teachers.attacks import small_net
from tests.teachers.pickles import snapshot

ACCEPTED = "; a teacher is an EDM pickle (.pkl) or a .safetensors file that gddlab wrote"


def zipped(*names: str, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as z:
        for name in names:
            z.writestr(name, b"x" * 100)
    return out.getvalue()


def written(write: Callable[[io.BytesIO], Any]) -> bytes:
    out = io.BytesIO()
    write(out)
    return out.getvalue()


def tar(out: io.BytesIO) -> None:
    with tarfile.open(fileobj=out, mode="w") as t:
        t.addfile(tarfile.TarInfo("x"))


def test_a_zip_of_the_most_entries_that_two_bytes_count_is_read() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for i in range(0xFFFF):
            z.writestr(str(i), b"")
    assert b"PK\x06\x07" not in out.getvalue()[-42:] and len([*zip_directory(memoryview(out.getvalue()))]) == 0xFFFF


def test_a_zip_beyond_4_gib_is_read(tmp_path: Path) -> None:
    """Offsets and sizes that four bytes do not hold, in a file with a hole."""
    path, hole = tmp_path / "big.pt", (1 << 32) + 5
    with path.open("wb") as f:
        f.seek(hole)
        with zipfile.ZipFile(f, "w") as z:
            z.writestr("archive/data.pkl", b"x" * 7)
            z.writestr("archive/data/0", b"y" * 9)
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as whole, memoryview(whole) as view:
        found = [*zip_directory(view)]
        assert [(e.name, e.stored, e.size) for e in found] == [
            ("archive/data.pkl", True, 7),
            ("archive/data/0", True, 9),
        ]
        assert found[0].header == hole and [bytes(view[e.data(view)]) for e in found] == [b"x" * 7, b"y" * 9]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 225766923\n"
MANY = zipped(*(f"{i}.png" for i in range(3)), "dataset.json")
FILES: dict[str, tuple[bytes, str]] = {
    "a pointer": (
        POINTER,
        "a Git LFS pointer for a file of 225,766,923 bytes, not the file itself: "
        "run `git lfs pull` where it was cloned",
    ),
    "half a pointer": (POINTER[:40], "a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned"),
    "HTML": (
        b"\xef\xbb\xbf\n <!DOCTYPE html><html><body>Sign in</body></html>",
        "a web page (HTML), perhaps a sign-in or error page in place of the download: fetch it again",
    ),
    "XML": (
        b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
        "an XML document, perhaps the error message of a server in place of the download: fetch it again",
    ),
    "nothing": (b"", "empty (0 bytes), perhaps an incomplete download: fetch it again"),
    "images": (MANY, "a zip of images (4 files), which is a dataset"),
    "a zip": (zipped("a.txt"), "a zip of 1 files, none of them torch's data.pkl"),
    "half a zip": (MANY[:-40], "a damaged zip (without its directory; an incomplete download?)"),
    "a zip with a broken directory": (MANY.replace(b"PK\1\2", b"PK\1\3"), "a damaged zip (its directory is broken)"),
    "npz": (written(lambda f: np.savez(f, a=np.zeros(1))), "numpy arrays (.npz, 1 files)"),
    "npy": (written(lambda f: np.save(f, np.zeros(1))), "a numpy array"),
    "gzip": (gzip.compress(b"x"), "a gzip archive: unpack it"),
    "xz": (lzma.compress(b"x"), "an xz archive: unpack it"),
    "bzip2": (bz2.compress(b"x"), "a bzip2 archive: unpack it"),
    "zstd": (b"(\xb5/\xfd\x04\0", "a zstd archive: unpack it"),
    "7z": (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it"),
    "tar": (written(tar), "a tar archive: unpack it"),
    "PNG": (written(lambda f: Image.new("L", (1, 1)).save(f, "png")), "a PNG image"),
    "JPEG": (written(lambda f: Image.new("L", (1, 1)).save(f, "jpeg")), "a JPEG image"),
    "JSON": (b'{"a": 1}\n', "JSON text (it starts with b'{\"a\": 1}\\n' at byte 0)"),
    "nested JSON": (b"[" * 9000, "JSON text (it starts with b'[[[[[[[[[[[[[[[[[[[[[[[[' at byte 0)"),
    "text": (b"see the readme\n", "plain text (it starts with b'see the readme\\n' at byte 0)"),
    "a number": (b"1", "plain text (it starts with b'1' at byte 0)"),
    "protocol 0": (
        pickle.dumps({"ema": 1}, 0),
        "a pickle of protocol 0 or 1, which is not read (it starts with b'(dp0\\nVema\\np1' at byte 0)",
    ),
    "protocol 0, a call": (
        b"cos\nsystem\n(S'true'\ntR.",
        "a pickle of protocol 0 or 1, which is not read (it starts with b'cos\\nsystem\\n(' at byte 0)",
    ),
    "protocol 1": (
        pickle.dumps({"ema": 1}, 1),
        "a pickle of protocol 0 or 1, which is not read (it starts with b'}q\\x00X\\x03\\x00\\x00\\x00emaq' at byte 0)",
    ),
    "protocol 6": (b"\x80\x06N.", "of no known kind (it starts with b'\\x80\\x06N.' at byte 0)"),
    "one byte of a pickle": (b"\x80", "of no known kind (it starts with b'\\x80' at byte 0)"),
    "zeros": (bytes(99), "of no known kind (it starts with b'" + r"\x00" * 24 + "' at byte 0)"),
    "half a safetensors file": (
        save({"x": torch.zeros(1)})[:30],
        "an incomplete .safetensors file, 30 bytes with a header of 64: fetch it again",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_other_files_say_what_they_are(name: str, tmp_path: Path) -> None:
    content, what = FILES[name]
    path = tmp_path / "x.pkl"
    path.write_bytes(content)
    with pytest.raises(GddlabError) as e:
        load_teacher(path)
    assert str(e.value) == f"{path} is {what}{ACCEPTED}"
    with pytest.raises(GddlabError):  # also without the look at its first bytes
        read_edm(path)


def test_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for protocol in (2, 3, 4, 5):
        path.write_bytes(pickle.dumps(1, protocol))
        assert format_of(path) == "pickle"
    for new, kind in ((True, "torch"), (False, "pickle")):
        torch.save({"x": torch.zeros(1)}, path, _use_new_zipfile_serialization=new)
        assert format_of(path) == kind
    save_network(small_net(), path)
    assert format_of(path) == "safetensors"
    path.write_bytes(save({"x": torch.zeros(1)}))
    assert format_of(path) == "safetensors"
    with pytest.raises(GddlabError, match="does not say its architecture"):
        load_teacher(path)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such file: "):
        format_of(tmp_path / "none.pkl")
    with pytest.raises(GddlabError, match="is a folder: give a"):
        format_of(tmp_path)
    for special in (tmp_path / "fifo", Path(os.devnull)):
        if special.name == "fifo":
            os.mkfifo(special)
        for read in (format_of, read_edm):  # neither waits for a writer
            with pytest.raises(GddlabError, match="no regular file"):
                read(special)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone").symlink_to(tmp_path / "none")
    for path in (tmp_path / "loop", tmp_path / "gone", tmp_path / ("x" * 300), tmp_path / "a" / "b"):
        with pytest.raises(GddlabError, match=r"no such file|cannot be read: File name too long"):
            format_of(path)


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(snapshot(small_net()))
    (tmp_path / "y.pkl").symlink_to("x.pkl")
    assert format_of(tmp_path / "y.pkl") == "pickle"
    assert read_edm(tmp_path / "y.pkl")[1]["original"]["file"] == "y.pkl"


def test_files_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(snapshot(small_net()))

    def refused(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refused)
    for read in (format_of, read_edm):
        with pytest.raises(GddlabError, match=r"x\.pkl cannot be read: Permission denied$"):
            read(path)


def test_names_of_files_stay_in_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a\nb\x1b[2J.pkl"
    for content in (b"", b"\x80\x04cos\nsystem\n.", b"\x80\x04N."):
        path.write_bytes(content)
        with pytest.raises(GddlabError) as e:
            load_teacher(path)
        assert str(e.value).isprintable() and "a?b?[2J.pkl" in str(e.value)


def test_files_that_say_they_are_larger(tmp_path: Path) -> None:
    """A sparse file of terabytes is refused by its first bytes."""
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x04cos\nsystem\n.")
    os.truncate(path, 2**40)
    with pytest.raises(GddlabError, match=r"names os\.system|cannot be read"):
        load_teacher(path)
    header = json.dumps({"__metadata__": {}}).encode()
    path.write_bytes(struct.pack("<Q", 2**60) + header)
    with pytest.raises(GddlabError, match="of no known kind"):
        load_teacher(path)
