"""Small images of every kind, and sets made of them."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def picture(height: int = 8, width: int = 8, *, seed: int = 0, channels: int = 3) -> Image.Image:
    a = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(a[..., 0] if channels == 1 else a)


def file_of(im: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    im.save(out, kind, **options)
    return out.getvalue()


def raw_png(width: int, height: int, bits: int, colour: int, data: bytes) -> bytes:
    """A PNG file by hand, for what Pillow does not write; `data` is what its IDAT inflates to."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def bad_images() -> dict[str, tuple[bytes, str]]:
    """Files that no set may hold, and the kind of problem that each is; good images beside them are 8x8."""
    rgb, second = picture(), picture(seed=1)
    png, jpg = file_of(rgb), file_of(picture(64, 64), "JPEG")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 255
    grey16 = Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16))
    real = Image.fromarray(np.ones((8, 8), dtype=np.float32))
    half = rgb.copy()
    half.putalpha(128)
    return {
        "alpha.png": (file_of(rgb.convert("RGBA")), "alpha channel"),
        "grey-alpha.png": (file_of(rgb.convert("LA")), "alpha channel"),
        "palette-alpha.png": (file_of(rgb.convert("P"), transparency=3), "alpha channel"),
        "one-colour.png": (file_of(rgb, transparency=(1, 2, 3)), "alpha channel"),
        "alpha.webp": (file_of(half, "WEBP"), "alpha channel"),
        "grey16.png": (file_of(grey16), "more than 8 bits a channel"),
        "grey16.tif": (file_of(grey16, "TIFF"), "more than 8 bits a channel"),
        "rgb16.png": (raw_png(8, 8, 16, 2, (b"\0" + b"\x12\x34" * 24) * 8), "more than 8 bits a channel"),
        "real.tif": (file_of(real, "TIFF"), "more than 8 bits a channel"),
        "cmyk.jpg": (file_of(rgb.convert("CMYK"), "JPEG"), "CMYK colours"),
        "cmyk.tif": (file_of(rgb.convert("CMYK"), "TIFF"), "CMYK colours"),
        "lab.tif": (file_of(rgb.convert("LAB"), "TIFF"), "colour space"),
        "half.png": (png[: len(png) // 2], "damaged"),
        "half.jpg": (jpg[: len(jpg) // 2], "damaged"),
        "start.png": (png[:12], "damaged"),
        "flipped.png": (bytes(flipped), "damaged"),
        "zero.png": (b"", "empty file"),
        "page.png": (b"<!DOCTYPE html><html>", "no image"),
        "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "no image"),
        "text.png": (b"these are words", "no image"),
        "moving.gif": (file_of(rgb, "GIF", save_all=True, append_images=[second]), "animated"),
        "moving.png": (file_of(rgb, save_all=True, append_images=[second]), "animated"),
        "moving.webp": (file_of(rgb, "WEBP", save_all=True, append_images=[second]), "animated"),
        "pages.tif": (file_of(rgb, "TIFF", save_all=True, append_images=[second]), "animated"),
        "bomb.png": (raw_png(60000, 60000, 8, 2, bytes(1000)), "too many pixels"),
        "phone.heic": (b"ftypheic", "format not read"),
        "wide.png": (file_of(picture(6, 10)), "not square"),
        "large.png": (file_of(picture(10, 10)), "size differs"),
    }


@pytest.fixture
def make_zip(tmp_path: Path) -> Callable[..., Path]:
    """make_zip(files, labels=..., groups=..., manifest=..., name=...): a zip as EDM's tool writes, or a bad one."""

    def make(files: dict[str, bytes], *, name: str = "set.zip", **tables: Any) -> Path:
        path = tmp_path / name
        with zipfile.ZipFile(path, "w") as z:
            for member, content in files.items():
                z.writestr(member, content)
            if "labels" in tables:
                table = {key: tables[key] for key in ("labels", "groups") if key in tables}
                z.writestr("dataset.json", json.dumps(table))
            if "manifest" in tables:
                z.writestr("manifest.json", json.dumps(tables["manifest"]))
        return path

    return make


@pytest.fixture
def pictures() -> dict[str, bytes]:
    """Twelve PNG files by their names in an EDM zip."""
    return {f"00000/img{i:08d}.png": file_of(picture(seed=i)) for i in range(12)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of the user's cache is read or written."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("GDDLAB_CACHE", str(folder))
    monkeypatch.delenv("GDDLAB_HOME", raising=False)
    return folder
