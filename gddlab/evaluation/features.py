"""Features of image sets, a batch at a time; those of a real set are computed once and kept, in memory and on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from gddlab.datasets import ImageDataset
from gddlab.errors import GddlabError
from gddlab.evaluation.extractors import Extractor
from gddlab.evaluation.images import Images, StoredImages, images_sha256
from gddlab.evaluation.sharding import ALONE, Group, share
from gddlab.files import atomic_path, cache_dir, hash_json
from gddlab.progress import progress_bar
from gddlab.runtime import chosen_device

__all__ = [
    "Extracted",
    "extract",
    "extract_part",
    "image_features",
    "real_features",
    "real_images",
    "real_rows",
    "recall",
]

T = TypeVar("T")


def recall(name: str, compute: Callable[[], T], *, read: Callable[[Path], T], write: Callable[[Path, T], None]) -> T:
    """The value in the cache file `name`, or computed and put there.

    A file that `read` refuses (ValueError, OSError, EOFError) is computed again and replaced.
    """
    path = cache_dir() / name
    try:
        return read(path)
    except (ValueError, OSError, EOFError):
        value = compute()
    try:
        with atomic_path(path) as tmp:
            write(tmp, value)
    except OSError:
        pass  # a read-only or full home costs time at the next call, nothing else
    return value


_kept: dict[str, Tensor] = {}
_KEEP = 4
_KEEP_BYTES = 1 << 28


class Extracted(NamedTuple):
    """Rows of numbers, (N, extractor.width), float32 on the CPU, and the hash of the images that they are of."""

    rows: Tensor
    images_sha256: str


def extract(
    images: Images,
    extractor: Extractor,
    *,
    device: torch.device | None = None,
    group: Group = ALONE,
    progress: bool = False,
) -> Extracted:
    """Makes or reads images and extracts their features; only one batch of images is held at a time.

    Args:
        images: What to go through.
        extractor: From `find_extractor`.
        device: Where the extractor runs; the images' own, or CUDA where there is one, if None.
        group: Processes that make this call together, each on a part of the images; all get the same result.
        progress: Shows a bar when at a terminal.
    """
    parts = [share(len(images), images.batch_size, rank, group.size) for rank in range(group.size)]
    start, stop = parts[group.rank]
    digest = images_sha256(images)
    bar = progress_bar(
        total=stop - start, desc=f"images, features {extractor.label}", unit="img", enabled=progress and not group.rank
    )
    with tempfile.TemporaryFile() as kept, bar:
        keep = digest.update if group.size == 1 else kept.write
        with group.together():
            rows = extract_part(images, extractor, start, stop, device=device, keep=keep, report=bar.update)
        if group.size > 1:
            pixels = int(np.prod(images.shape))
            rows = group.gather(rows, [b - a for a, b in parts])
            group.read_in_order(kept, [(b - a) * pixels for a, b in parts], digest.update)
    return Extracted(rows, digest.hexdigest())


def extract_part(
    images: Images,
    extractor: Extractor,
    start: int,
    stop: int,
    *,
    device: torch.device | None = None,
    keep: Callable[[memoryview], Any],
    report: Callable[[int], Any],
) -> Tensor:
    """Features of the images from start to stop, (stop - start, extractor.width).

    Args:
        keep: Gets the bytes of the images, batch by batch.
        report: Gets the number of images of each batch.
    """
    net = extractor.build()  # before the first image
    where = device or images.device or chosen_device()
    net = net.to(where)
    out = torch.empty(stop - start, extractor.width)
    for i in range(start, stop, images.batch_size):
        x = images.batch(i, min(i + images.batch_size, stop)).contiguous()
        keep(x.numpy().reshape(-1).data)
        out[i - start : i - start + len(x)] = _rows(net, x, extractor, where)
        report(len(x))
    return out


@torch.inference_mode()
def _rows(net: Any, images: Tensor, extractor: Extractor, device: torch.device) -> Tensor:
    """(N, C, R, R), uint8 -> (N, extractor.width), float32, without TF32."""
    batch = 32 if device.type == "cpu" else 256  # 128 on a CPU is 1.6 times slower: activations leave the cache
    parts = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for x in images.split(batch):
            parts.append(torch.cat(net(x.to(device).expand(-1, 3, -1, -1)), 1).cpu())
    rows = torch.cat(parts)
    if rows.shape[1] != extractor.width:
        raise GddlabError(
            f"{extractor.weights} gives {rows.shape[1]} features an image: {extractor.name} has {extractor.width}"
        )
    return rows


def image_features(
    images: Tensor, extractor: Extractor, *, device: torch.device | str = "cpu", progress: bool = False
) -> Tensor:
    """Features of images, float32, without TF32.

    Args:
        images: uint8, (N, 1 or 3, H, W); grey is repeated to RGB.
        extractor: From `find_extractor`.
        device: Where the extractor runs.
        progress: Shows a bar when at a terminal.

    Returns:
        (N, extractor.dims), on the CPU.

    Raises:
        GddlabError: Not uint8, or neither grey nor RGB.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise GddlabError(f"images are {images.dtype} {tuple(images.shape)}: give uint8 (N, 1 or 3, H, W)")
    stored = StoredImages(images.cpu(), "images", device=torch.device(device))
    return extract(stored, extractor, progress=progress).rows[:, : extractor.dims]


def real_images(data: ImageDataset) -> Tensor:
    """Images of a dataset, uint8, (N, C, R, R)."""
    return torch.from_numpy(data.uint8).permute(0, 3, 1, 2)


def real_features(
    data: ImageDataset, extractor: Extractor, *, device: torch.device | str | None = None, progress: bool = False
) -> Tensor:
    """Features of a whole dataset, (N, extractor.dims), cached by the hashes of its manifest and the extractor."""
    where = None if device is None else torch.device(device)
    return real_rows(data, extractor, device=where, progress=progress)[:, : extractor.dims]


def real_rows(
    data: ImageDataset,
    extractor: Extractor,
    *,
    device: torch.device | None = None,
    group: Group = ALONE,
    progress: bool = False,
) -> Tensor:
    """Features and logits of a whole dataset, (N, extractor.width); cache as for `real_features`, sharing as for `extract`."""
    key = hash_json([data.manifest.sha256, extractor.identity])
    if not group.all(key in _kept):

        def read(path: Path) -> Tensor:
            try:
                a = np.load(path, allow_pickle=False)
                good = a.shape == (len(data), extractor.width) and a.dtype == np.float32 and np.isfinite(a).all()
            except (ValueError, OSError, EOFError):
                good = False
            if not group.all(bool(good)):
                raise ValueError(path)
            return torch.from_numpy(a)

        def write(path: Path, value: Tensor) -> None:
            with path.open("wb") as f:
                np.save(f, value.numpy())

        rows = recall(
            f"features-{extractor.name}-{key[:16]}.npy",
            lambda: (
                extract(StoredImages(data.uint8, "data"), extractor, device=device, group=group, progress=progress).rows
            ),
            read=read,
            write=write,
        )
        if rows.nbytes > _KEEP_BYTES:
            return rows
        while len(_kept) >= _KEEP:
            _kept.pop(next(iter(_kept)))
        _kept[key] = rows
    return _kept[key]
