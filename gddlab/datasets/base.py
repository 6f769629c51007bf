"""Images with labels and a manifest, the embedded digits, and the order in which batches take them."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gddlab.datasets.pixels import LOSSY, SUFFIXES
from gddlab.errors import GddlabError
from gddlab.runtime import generator


@dataclass(frozen=True)
class Manifest:
    """A description of a dataset; equal `sha256` mean the same images and labels in the same order."""

    name: str
    source: str
    resolution: int
    channels: int
    count: int
    classes: int
    crop: str
    filter: str
    codec: str
    sha256: str
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def lossy(self) -> frozenset[str] | None:
        """The lossy formats among those that the images were read from, "JPEG", "WebP"; None where none are known."""
        read = set(re.findall(r"[a-z]+", self.codec.lower().replace("lossless webp", "png")))
        if "unknown" in read or not read & {s[1:] for s in SUFFIXES}:
            return None
        return frozenset(LOSSY[s] for s in read & LOSSY.keys())

    @property
    def what(self) -> str:
        """The name, and what was chosen of the set: "digits, classes 3 and 5"."""
        options = self.extra.get("options", {})
        parts = [self.name]
        if "classes" in options:
            parts.append(f"classes {' and '.join(map(str, options['classes']))}")
        if "max_images" in options:
            parts.append(f"{options['max_images']} at most, seed {options['seed']}")
        if "xflip" in options:
            parts.append("mirrored too")
        return ", ".join(parts)


class ContentHash:
    """The `sha256` of a manifest, fed with the images in order: shape (N, R, R, C), bytes, then labels as int64."""

    def __init__(self, shape: Sequence[int]):
        self._h = hashlib.sha256(str(tuple(shape)).encode())

    def add(self, images: np.ndarray) -> None:
        self._h.update(np.ascontiguousarray(images).data)

    def digest(self, labels: np.ndarray | None) -> str:
        if labels is not None:
            self._h.update(np.ascontiguousarray(labels, dtype=np.int64).data)
        return self._h.hexdigest()


def content_hash(images: np.ndarray, labels: np.ndarray | None) -> str:
    """The `sha256` of a manifest; images are read in parts, since mapped ones need not fit in memory."""
    h = ContentHash(images.shape)
    for i in range(0, len(images), 1024):
        h.add(images[i : i + 1024])
    return h.digest(labels)


class ImageDataset:
    """Square images of one size, held as uint8 NHWC, read as float32 NCHW in [-1, 1].

    Args:
        images: uint8, (N, R, R, C); a memory-mapped array stays one.
        labels: Class of each image, (N,), or None.
        classes: Number of classes; 0 without labels.
        name, source, crop, filter, codec, extra: For the manifest: origin of the images, and how they were processed.
        sha256: The manifest's hash where known; otherwise it is computed when first used.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: Sequence[int] | np.ndarray | None = None,
        *,
        classes: int = 0,
        name: str,
        source: str,
        crop: str = "none",
        filter: str = "none",
        codec: str = "none",
        extra: Mapping[str, Any] | None = None,
        sha256: str | None = None,
    ):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != images.shape[2]:
            raise GddlabError(f"images are {images.dtype} {images.shape}: give uint8 (N, R, R, C)")
        if len(images) == 0:
            raise GddlabError(f"dataset {name!r} is empty: give at least one image")
        self.uint8 = np.ascontiguousarray(images)
        self.class_ids = None if labels is None else np.asarray(labels, dtype=np.int64)
        if self.class_ids is not None and self.class_ids.shape != (len(images),):
            raise GddlabError(f"{self.class_ids.shape} labels for {len(images)} images: give one per image")
        if self.class_ids is not None and not (self.class_ids.min() >= 0 and self.class_ids.max() < classes):
            raise GddlabError(
                f"class ids span {self.class_ids.min()}..{self.class_ids.max()}: accepted are 0..{classes - 1}"
            )
        self.classes = classes if labels is not None else 0
        self._about: dict[str, Any] = {"name": name, "source": source, "crop": crop, "filter": filter, "codec": codec}
        self._about["extra"] = dict(extra or {})
        self._sha256 = sha256

    def __len__(self) -> int:
        return len(self.uint8)

    @property
    def resolution(self) -> int:
        return self.uint8.shape[1]

    @property
    def channels(self) -> int:
        return self.uint8.shape[3]

    @property
    def name(self) -> str:
        return str(self._about["name"])

    @cached_property
    def manifest(self) -> Manifest:
        if self._sha256 is None:
            self._sha256 = content_hash(self.uint8, self.class_ids)
        return Manifest(
            resolution=self.resolution,
            channels=self.channels,
            count=len(self),
            classes=self.classes,
            sha256=self._sha256,
            **self._about,
        )

    def images(self, indices: Tensor | Sequence[int] | slice = slice(None)) -> Tensor:
        """Images as float32 in [-1, 1], (n, C, R, R)."""
        index = indices.numpy() if isinstance(indices, Tensor) else indices
        x = torch.from_numpy(self.uint8[index]).permute(0, 3, 1, 2)
        return x.to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1

    def labels(self, indices: Tensor | Sequence[int] | slice = slice(None)) -> Tensor:
        """Labels as float32 one-hot, (n, classes); no columns without classes."""
        index = indices.numpy() if isinstance(indices, Tensor) else indices
        if self.class_ids is None:
            return torch.zeros(len(self.uint8[index]), 0)
        return torch.nn.functional.one_hot(torch.from_numpy(self.class_ids[index]), self.classes).float()


def order(n: int, seed: int, start: int, count: int) -> Tensor:
    """Indices at positions start..start + count of an endless sequence of shuffled epochs of `n`.

    The order is a function of seed and position alone: it does not depend on the number of processes, and the position
    is the whole state.

    Returns:
        int64, (count,).
    """
    parts: list[Tensor] = []
    while count > 0:
        epoch, offset = divmod(start, n)
        part = _epoch(n, seed, epoch)[offset : offset + count]
        parts.append(part)
        start, count = start + len(part), count - len(part)
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


@functools.lru_cache(maxsize=4)
def _epoch(n: int, seed: int, epoch: int) -> Tensor:
    """The order of one epoch; cached, since shuffling a million indices takes tens of milliseconds."""
    return torch.randperm(n, generator=generator(seed, epoch))


@functools.cache
def digits() -> ImageDataset:
    """scikit-learn's digits, in its order: 8x8 counts 0..16 scaled to 0..255, enlarged bilinearly to 16x16, rounded."""
    from sklearn.datasets import load_digits

    source = load_digits()
    x = torch.from_numpy(source.images)[:, None] * (255 / 16)  # (1797, 1, 8, 8)
    x = torch.nn.functional.interpolate(x, size=16, mode="bilinear", align_corners=False)
    images = x.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return ImageDataset(
        images,
        np.asarray(source.target),
        classes=10,
        name="digits",
        source="scikit-learn load_digits (UCI optical recognition of handwritten digits, test part)",
        filter="bilinear",
    )


class BatchReader:
    """Endless shuffled batches of a dataset; each rank reads an equal part.

    The global sequence depends on the seed alone, not on the number of processes, the batch, or where reading began.

    Args:
        dataset: Images and labels.
        batch: Images per step over all ranks.
        seed: Of the order.
        rank, world_size: The part of each batch to read.
    """

    def __init__(self, dataset: ImageDataset, *, batch: int, seed: int, rank: int = 0, world_size: int = 1):
        if not 0 <= rank < world_size:
            raise GddlabError(f"rank={rank} of world_size={world_size}: ranks count from 0")
        if batch < 1 or batch % world_size:
            raise GddlabError(f"batch={batch} over {world_size} processes: give a multiple of {world_size}")
        self.dataset = dataset
        self.batch = batch
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.position = 0
        """Images read so far by all ranks together."""

    def next(self) -> tuple[Tensor, Tensor]:
        """This rank's next images, float32 (batch / world_size, C, R, R) in [-1, 1], and one-hot labels."""
        index = self.indices()
        self.position += self.batch
        return self.dataset.images(index), self.dataset.labels(index)

    def indices(self, position: int | None = None) -> Tensor:
        """Indices of the images that `next` reads here, or at another position, int64 (batch / world_size,)."""
        n, start = self.batch // self.world_size, self.position if position is None else position
        return order(len(self.dataset), self.seed, start, self.batch)[self.rank * n : (self.rank + 1) * n]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "seed": self.seed, "dataset_sha256": self.dataset.manifest.sha256}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken, with any batch and number of processes.

        Raises:
            GddlabError: The state is of another dataset or seed, or has no position.
        """
        for key, ours in self.state_dict().items():
            if key != "position" and state.get(key) != ours:
                theirs = state.get(key)
                raise GddlabError(f"the data position is of {key}={theirs!r}, here it is {ours!r}: give the same")
        position = state.get("position")
        if type(position) is not int or position < 0:
            raise GddlabError(f"position={position!r}: give the number of images read, from 0 up")
        self.position = position
