"""Features of image sets, extracted one batch at a time; those of a data set are computed once and cached."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gddlab.datasets import ImageDataset
from gddlab.errors import GddlabError
from gddlab.evaluation.extractors import Extractor
from gddlab.files import atomic_path, cache_dir, hash_json, hash_tensors
from gddlab.nets import Denoiser, Precond, architecture
from gddlab.nets.bare import device_of
from gddlab.progress import progress_bar
from gddlab.ranks import ALONE, Ranks, share
from gddlab.runtime import chosen_device, tf32
from gddlab.sampling.grid import to_uint8
from gddlab.sampling.samplers import (
    Method,
    codec_of,
    denoiser_in,
    draw,
    image_shape,
    one_hot,
    prepared,
    sampler_name,
    weights_hash,
)

T = TypeVar("T")


@dataclass(frozen=True)
class StoredImages:
    """Images of an array, or those that `index` selects; `whole` is the data set when they are all of it."""

    array: np.ndarray | Tensor
    """uint8, (N, R, R, C) as a data set holds them, or (N, C, R, R) as a tensor."""
    sampler: str
    index: Tensor | None = None
    seeds: tuple[int, int] | None = None
    whole: ImageDataset | None = None
    device: torch.device | None = None
    batch_size: int = 256
    model_sha256: None = None

    def __len__(self) -> int:
        return len(self.array) if self.index is None else len(self.index)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, R, R)."""
        return tuple(self.batch(0, 1).shape[1:])

    def batch(self, start: int, stop: int) -> Tensor:
        """uint8, (stop - start, C, R, R)."""
        rows: Any = slice(start, stop) if self.index is None else self.index[start:stop]
        if isinstance(self.array, Tensor):
            return self.array[rows]
        return torch.from_numpy(self.array[rows.numpy() if isinstance(rows, Tensor) else rows]).permute(0, 3, 1, 2)

    @property
    def sha256(self) -> str:
        """Hash of the images, that of `hash_tensors({"images": all of them})`."""
        digest = images_sha256(self)
        for i in range(0, len(self), self.batch_size):
            digest.update(self.batch(i, min(i + self.batch_size, len(self))).contiguous().numpy().reshape(-1))
        return str(digest.hexdigest())


@dataclass(frozen=True)
class GeneratedImages:
    """Images that a network makes, image i from seed + i; they are never held together."""

    net: Denoiser
    how: Method
    count: int
    seed: int
    labels: Tensor | None
    """Class of each image, (count,), or None."""
    batch_size: int
    whole: None = None

    def __len__(self) -> int:
        return self.count

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, R, R)."""
        return image_shape(self.net)

    @property
    def sampler(self) -> str:
        return sampler_name(self.how)

    @property
    def seeds(self) -> tuple[int, int]:
        return (self.seed, self.seed + self.count - 1)

    @property
    def device(self) -> torch.device:
        return device_of(self.net)

    @cached_property
    def model_sha256(self) -> str:
        return weights_hash(self.net)

    @property
    def settings(self) -> dict[str, Any] | list[float]:
        """The sampler as JSON."""
        return list(self.how) if isinstance(self.how, tuple) else self.how.to_dict()

    @property
    def key(self) -> str:
        """Hash of everything that the images depend on, up to rounding."""
        net = denoiser_in(self.net)
        about = [
            self.model_sha256,
            (architecture(net) if isinstance(net, Precond) else {}) | net.settings(),
            self.settings,
            [self.seed, self.count],
            None if self.labels is None else hash_json(self.labels.tolist()),
            str(next(self.net.parameters()).dtype),
            self.device.type,
        ]
        return hash_json(about)

    def batch(self, start: int, stop: int) -> Tensor:
        """uint8, (stop - start, C, R, R).

        Raises:
            GddlabError: An image is not finite.
        """
        chosen = None if self.labels is None else self.labels[start:stop]
        labels = one_hot(self.net.label_dim, range(self.seed + start, self.seed + stop), chosen)
        with prepared(self.net):
            x = draw(self.net, self.how, range(self.seed + start, self.seed + stop), labels, codec=codec_of(self.net))
        check_values(x)
        return to_uint8(x)


Images = StoredImages | GeneratedImages


def check_values(x: Tensor) -> None:
    """Raises: GddlabError: Images that are not finite, or not in [-1, 1]."""
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
        raise GddlabError(
            f"{bad} of {len(x)} images are not finite: the model may have diverged, or its weights are damaged"
        )
    low, high = x.min().item(), x.max().item()
    if low < -2 or high > 2:  # a raw network output may overshoot a little; 0..255 does not
        raise GddlabError(f"images span {low:.3g}..{high:.3g}: give values in [-1, 1]")


def images_sha256(images: Images) -> Any:
    """A sha256 to be updated with images in order; its digest is that of `hash_tensors({"images": all of them})`."""
    return hashlib.sha256(f"images:{torch.uint8}:{(len(images), *images.shape)}".encode())


class Extracted(NamedTuple):
    """Rows, (N, extractor.width), float32 on the CPU, and the hash of the images that they belong to."""

    rows: Tensor
    images_sha256: str


def extract(images: Images, extractor: Extractor, *, ranks: Ranks = ALONE, progress: bool = False) -> Extracted:
    """Reads or makes images and extracts their features; only one batch of images is held at a time.

    The extractor runs where the images are, or else on CUDA where there is one. `ranks` make this call together, each
    for a part of the images; all get the whole result.
    """
    parts = [share(len(images), images.batch_size, rank, ranks.size) for rank in range(ranks.size)]
    start, stop = parts[ranks.rank]
    digest = images_sha256(images)
    title = f"images, features {extractor.label}"
    bar = progress_bar(total=stop - start, desc=title, unit="img", enabled=progress and not ranks.rank)
    with tempfile.TemporaryFile() as kept, bar:
        keep = digest.update if ranks.size == 1 else kept.write
        with ranks.together():
            rows = extract_part(images, extractor, start, stop, keep=keep, report=bar.update)
        if ranks.size > 1:
            pixels = int(np.prod(images.shape))
            rows = ranks.gather(rows, [b - a for a, b in parts])
            ranks.read_in_order(kept, [(b - a) * pixels for a, b in parts], digest.update)
    return Extracted(rows, digest.hexdigest())


def extract_part(
    images: Images,
    extractor: Extractor,
    start: int,
    stop: int,
    *,
    keep: Callable[[memoryview], Any],
    report: Callable[[int], Any],
) -> Float[Tensor, "n width"]:
    """Features of the images from `start` to `stop`, exclusive.

    `keep` gets the bytes of each batch of images, `report` their number.
    """
    net = extractor.build()  # before the first image
    where = images.device or chosen_device()
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
    """(N, C, R, R), uint8 -> (N, extractor.width), float32, without TF32 and autocast."""
    batch = 32 if device.type == "cpu" else 256  # 128 on a CPU is 1.6 times slower: activations leave the cache
    with tf32(False), torch.autocast(device.type, enabled=False):
        parts = (part.to(device).expand(-1, extractor.channels, -1, -1) for part in images.split(batch))
        rows = torch.cat([torch.cat(net(x), 1).cpu() for x in parts])
    if rows.shape[1] != extractor.width:
        raise GddlabError(
            f"{extractor.weights} gives {rows.shape[1]} features per image: {extractor.name} has {extractor.width}"
        )
    return rows


def image_features(
    images: UInt8[Tensor, "n c h w"],
    extractor: Extractor,
    *,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Float[Tensor, "n d"]:
    """Features of images, uint8, (N, 1 or 3, H, W), -> (N, extractor.dims), float32 on the CPU."""
    stored = StoredImages(images.cpu(), "images", device=torch.device(device))
    return extract(stored, extractor, progress=progress).rows[:, : extractor.dims]


def cached(
    name: str,
    compute: Callable[[], T],
    *,
    read: Callable[[Path], T],
    write: Callable[[Path, T], None],
    ranks: Ranks = ALONE,
) -> T:
    """The value in the cache file `name`, or computed and written there.

    A file that `read` refuses is computed again and replaced. Where one of the ranks lacks the file, all compute. A
    cache that cannot be written costs time at the next call, nothing else.
    """
    path = cache_dir() / name
    found: list[T] = []
    with suppress(ValueError, OSError, EOFError, KeyError, TypeError, SafetensorError):
        found.append(read(path))
    if not ranks.all(bool(found)):
        found = [compute()]
        if _first_here(ranks):
            with suppress(OSError), atomic_path(path) as tmp:
                write(tmp, found[0])
    return found[0]


def _first_here(ranks: Ranks) -> bool:
    """Whether this is the first rank of its machine."""
    return ranks.size == 1 or int(os.environ.get("LOCAL_RANK", 0)) == 0


def cached_rows(
    name: str, count: int, extractor: Extractor, compute: Callable[[], Extracted], ranks: Ranks = ALONE
) -> Extracted:
    """The features of `count` images, as `cached`; one rank per machine compares them with the hash in the file."""

    def read(path: Path) -> Extracted:
        with safe_open(path, framework="pt") as f:
            about, rows = f.metadata() or {}, f.get_tensor("rows")
        intact = rows.shape == (count, extractor.width) and bool(torch.isfinite(rows).all())
        if not intact or (_first_here(ranks) and hash_tensors({"rows": rows}) != about["rows_sha256"]):
            raise ValueError(path)
        with suppress(OSError):  # a cache that this user may only read
            os.utime(path)
        return Extracted(rows, about["images_sha256"])

    def write(path: Path, value: Extracted) -> None:
        rows = value.rows.contiguous()
        about = {"images_sha256": value.images_sha256, "rows_sha256": hash_tensors({"rows": rows})}
        save_file({"rows": rows}, path, metadata=about)

    return cached(name, compute, read=read, write=write, ranks=ranks)


_kept: dict[str, Extracted] = {}
KEEP, KEEP_BYTES = 4, 1 << 28
"""How many sets of real features, of which size at most, stay in memory."""


def real_features(
    data: ImageDataset, extractor: Extractor, *, device: torch.device | str | None = None, progress: bool = False
) -> Float[Tensor, "n d"]:
    """Features of a whole data set, (N, extractor.dims), cached by the hashes of its manifest and the extractor."""
    where = None if device is None else torch.device(device)
    return real_rows(data, extractor, device=where, progress=progress).rows[:, : extractor.dims]


def real_rows(
    data: ImageDataset,
    extractor: Extractor,
    *,
    device: torch.device | None = None,
    ranks: Ranks = ALONE,
    progress: bool = False,
) -> Extracted:
    """Features and logits of a whole data set; arguments as for `extract`, cache as above."""
    key = hash_json([data.manifest.sha256, extractor.identity])
    if ranks.all(key in _kept):
        return _kept[key]
    images = StoredImages(data.uint8, "data", device=device)
    found = cached_rows(
        f"features-{extractor.name}-{key[:16]}.safetensors",
        len(data),
        extractor,
        lambda: extract(images, extractor, ranks=ranks, progress=progress),
        ranks,
    )
    if found.rows.nbytes <= KEEP_BYTES:
        while len(_kept) >= KEEP:
            _kept.pop(next(iter(_kept)))
        _kept[key] = found
    return found
