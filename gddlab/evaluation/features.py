"""Features of image sets; those of a real set are computed once and kept, in memory and on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gddlab.datasets import ImageDataset
from gddlab.errors import GddlabError
from gddlab.evaluation.cache import recall
from gddlab.evaluation.extractors import Extractor
from gddlab.files import hash_json
from gddlab.progress import progress_bar

__all__ = ["image_features", "real_features", "real_images"]

_kept: dict[str, Tensor] = {}
_KEEP = 4


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
    device = torch.device(device)
    batch = 32 if device.type == "cpu" else 256  # 128 on a CPU is 1.6 times slower: activations leave the cache
    net = extractor.build().to(device)
    out = torch.empty(len(images), extractor.dims)
    with (
        torch.inference_mode(),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        progress_bar(total=len(images), desc=f"features {extractor.name}", unit="img", enabled=progress) as bar,
    ):
        for i in range(0, len(images), batch):
            x = images[i : i + batch].to(device).expand(-1, 3, -1, -1)
            out[i : i + batch] = net(x)[0].cpu()
            bar.update(len(x))
    return out


def real_images(data: ImageDataset) -> Tensor:
    """Images of a dataset, uint8, (N, C, R, R)."""
    return torch.from_numpy(data.uint8).permute(0, 3, 1, 2)


def real_features(
    data: ImageDataset, extractor: Extractor, *, device: torch.device | str = "cpu", progress: bool = False
) -> Tensor:
    """Features of a whole dataset, (N, extractor.dims), cached by the hashes of its manifest and the extractor."""
    key = hash_json([data.manifest.sha256, extractor.identity])
    if key not in _kept:

        def read(path: Path) -> Tensor:
            a = np.load(path, allow_pickle=False)
            if a.shape != (len(data), extractor.dims) or a.dtype != np.float32 or not np.isfinite(a).all():
                raise ValueError(path)
            return torch.from_numpy(a)

        def write(path: Path, value: Tensor) -> None:
            with path.open("wb") as f:
                np.save(f, value.numpy())

        features = recall(
            f"features-{extractor.name}-{key[:16]}.npy",
            lambda: image_features(real_images(data), extractor, device=device, progress=progress),
            read=read,
            write=write,
        )
        while len(_kept) >= _KEEP:
            _kept.pop(next(iter(_kept)))
        _kept[key] = features
    return _kept[key]
