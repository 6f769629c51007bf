"""Where sampled images go: a folder of PNG files, or an EDM zip made in parts."""

from __future__ import annotations

import io
import json
import shutil
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gddlab.datasets.base import ContentHash
from gddlab.datasets.packing import Entry, assemble, image_name, missing_parts, open_parts, write_part
from gddlab.errors import GddlabError
from gddlab.files import read_json, write_bytes, write_json
from gddlab.sampling.grid import to_uint8

__all__ = ["FolderTarget", "ZipTarget", "encode", "open_target"]

_MANIFEST = "manifest.json"


class FolderTarget:
    """SEED.png, dataset.json with classes, manifest.json; a part is there when all its files are whole."""

    def __init__(
        self, out: Path, about: dict[str, Any], manifest: dict[str, Any], pairs: Sequence[tuple[int, int | None]]
    ):
        self.out, self.pairs, self.size, self.count = out, pairs, about["batch_size"], _parts(about, pairs)
        self.side = manifest["resolution"]
        if out.is_file():
            raise GddlabError(f"{out} is a file: give a folder, or a name that ends in .zip")
        # Listed before the manifest is looked for: another process may be writing it.
        others = [p.name for p in out.iterdir() if not p.name.startswith(".")] if out.exists() else []
        if (out / _MANIFEST).exists():
            _same(read_json(out / _MANIFEST), about, out)
        elif others:
            raise GddlabError(
                f"{out} holds {others[0]!r} and no samples: give an empty or new folder, or a name that ends in .zip"
            )
        else:
            write_json(out / _MANIFEST, manifest)
        if pairs[0][1] is not None and not (out / "dataset.json").exists():
            write_json(out / "dataset.json", {"labels": [(self.name(seed), c) for seed, c in pairs]})

    @staticmethod
    def name(seed: int) -> str:
        return f"{seed:06d}.png"

    def has(self, k: int) -> bool:
        part = self.pairs[k * self.size : (k + 1) * self.size]
        return all(_is_png(self.out / self.name(seed), self.side) for seed, _ in part)

    def write(self, k: int, entries: Sequence[Entry]) -> None:
        for e in entries:
            if not _is_png(self.out / e.name, self.side):
                write_bytes(self.out / e.name, e.png)

    def finish(self, timeout_s: float, world: int) -> None:
        """Nothing is left to do: every file is in its place."""


class ZipTarget:
    """An EDM zip beside which the parts lie until it is whole."""

    def __init__(
        self, out: Path, about: dict[str, Any], manifest: dict[str, Any], pairs: Sequence[tuple[int, int | None]]
    ):
        self.out, self.manifest, self.pairs, self.count = out, manifest, pairs, _parts(about, pairs)
        self.missing: set[int] = set()
        self.folder: Path | None = None
        if out.exists():
            _same(_zip_manifest(out), about, out)
            return
        try:
            self.folder = open_parts(out, about)
            self.missing = set(missing_parts(self.folder, self.count))
        except (OSError, GddlabError):
            if not out.exists():  # else the first process has put the zip there and is removing the parts
                raise
        if out.exists():
            if self.folder is not None:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.folder, self.missing = None, set()

    name = staticmethod(image_name)

    def has(self, k: int) -> bool:
        return k not in self.missing

    def write(self, k: int, entries: Sequence[Entry]) -> None:
        assert self.folder is not None
        write_part(self.folder, k, entries)

    def finish(self, timeout_s: float, world: int) -> None:
        """Waits for the parts of other processes, then puts the zip in its place."""
        if self.folder is None:
            return
        since, left = time.monotonic(), self.count
        while missing := missing_parts(self.folder, self.count):
            if len(missing) < left:
                since, left = time.monotonic(), len(missing)
            if time.monotonic() - since > timeout_s:
                raise GddlabError(
                    f"{self.out}: {left} of {self.count} parts have not come for {timeout_s:.0f} s, the next from process "
                    f"{missing[0] % world} of {world}: see its log; the same call continues with what is there"
                )
            time.sleep(0.2)
        assemble(self.folder, self.count, self.out, self._manifest)

    def _manifest(self, made: Path) -> dict[str, Any]:
        """The manifest with the hash of all images, in the order in which datasets list them."""
        side, channels = self.manifest["resolution"], self.manifest["channels"]
        classes = {self.name(seed): c for seed, c in self.pairs}
        h = ContentHash((len(classes), side, side, channels))
        with zipfile.ZipFile(made) as z:
            for name in sorted(classes):
                h.add(_pixels(z.read(name)).reshape(1, side, side, channels))
        ids = [classes[name] for name in sorted(classes)]
        return self.manifest | {"sha256": h.digest(None if ids[0] is None else np.array(ids))}


def open_target(
    out: Path, about: dict[str, Any], manifest: dict[str, Any], pairs: Sequence[tuple[int, int | None]]
) -> FolderTarget | ZipTarget:
    """The place of the images.

    Args:
        out: Folder, or file that ends in .zip.
        about: What decides the images; a place that holds images of other settings is refused.
        manifest: What is recorded beside them; holds `about`.
        pairs: Seed and class of each image.
    """
    return (ZipTarget if out.suffix == ".zip" else FolderTarget)(out, about, manifest, pairs)


def encode(images: Tensor, pairs: Sequence[tuple[int, int | None]], name: Callable[[int], str]) -> list[Entry]:
    """PNG files of a batch.

    Raises:
        GddlabError: An image is not finite.
    """
    from PIL import Image

    finite = torch.isfinite(images).flatten(1).all(1)
    if not finite.all():
        seed = pairs[int((~finite).nonzero()[0])][0]
        raise GddlabError(
            f"the image of seed {seed} is not finite: the model may have diverged, or its numbers overflow; try dtype=None"
        )
    entries = []
    for pixels, (seed, label) in zip(to_uint8(images).permute(0, 2, 3, 1).numpy(), pairs, strict=True):
        f = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(f, format="PNG")
        entries.append(Entry(name(seed), f.getvalue(), label))
    return entries


def _parts(about: dict[str, Any], pairs: Sequence[Any]) -> int:
    return -(-len(pairs) // int(about["batch_size"]))


def _is_png(path: Path, side: int) -> bool:
    """Whether the file is a whole image of that size; a crash may have left half of one."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            return image.size == (side, side)
    except (OSError, ValueError, SyntaxError):
        return False


def _pixels(png: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image)


def _zip_manifest(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as z:
            return json.loads(z.read(_MANIFEST))
    except (OSError, zipfile.BadZipFile, KeyError, ValueError):
        return None


def _same(manifest: Any, about: dict[str, Any], out: Path) -> None:
    old = manifest.get("extra") if isinstance(manifest, dict) else None
    if not isinstance(old, dict) or old.get("format") != about["format"]:
        raise GddlabError(f"{out} exists and holds no samples of gddlab: give another name")
    for key, value in json.loads(json.dumps(about)).items():
        if old.get(key) != value:
            raise GddlabError(
                f"{out} was made with {key}={old.get(key)!r}, asked is {value!r}: give another name, or delete it to begin again"
            )
