"""Images that are there, read a batch at a time, and the hash of images that are never held together."""

from __future__ import annotations

import hashlib
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gddlab.datasets import ImageDataset

__all__ = ["Images", "StoredImages", "images_sha256"]


class Images(Sized, Protocol):
    """What features are extracted of."""

    @property
    def batch_size(self) -> int:
        """How many are made or read at once."""

    @property
    def device(self) -> torch.device | None:
        """Where the images are made, and their features extracted; None has no preference."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, R, R)."""

    def batch(self, start: int, stop: int) -> Tensor:
        """uint8, (stop - start, C, R, R)."""


@dataclass(frozen=True)
class StoredImages:
    """Images that are there: an array, or those of it that `index` names; `whole` is the dataset that they are all of."""

    array: np.ndarray | Tensor
    """uint8, (N, R, R, C) as a dataset holds them, or (N, C, R, R) as a tensor."""
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


def images_sha256(images: Images) -> Any:
    """A sha256 to be fed with images in order; its digest is that of `hash_tensors({"images": all of them})`."""
    return hashlib.sha256(f"images:{torch.uint8}:{(len(images), *images.shape)}".encode())
