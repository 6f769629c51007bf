"""The class embedding of a conditional discriminator, from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gddlab.errors import GddlabError, NotFound

__all__ = ["EMBEDDING", "load_embedding"]

EMBEDDING = 320
"""Width of the class embedding."""


def load_embedding(path: str | Path, rows: int) -> Tensor:
    """A class embedding from a file that holds one two-dimensional array, (rows or more, 320).

    Args:
        path: A .npy, .npz, .safetensors, .pt or .pth file; nothing in it is run.
        rows: Rows wanted, the first of the file.

    Returns:
        (rows, 320).

    Raises:
        GddlabError: Another kind of file, another shape, or values that are not finite.
    """
    path, accepted = Path(path), (".npy", ".npz", ".safetensors", ".pt", ".pth")
    if path.suffix not in accepted:
        raise GddlabError(f"class embedding {path}: give one of {', '.join(accepted)}")
    if not path.is_file():
        raise NotFound(f"class embedding {path}: no such file")
    try:
        if path.suffix in (".npy", ".npz"):
            loaded = np.load(path, allow_pickle=False)
        elif path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        found = list(loaded.values()) if hasattr(loaded, "values") and not torch.is_tensor(loaded) else [loaded]
        tensors = [torch.as_tensor(a) for a in found]
    except Exception as e:  # readers of four formats each have their own
        raise GddlabError(
            f"class embedding {path} cannot be read ({type(e).__name__}): give an array of ({rows}, {EMBEDDING})"
        ) from None
    if len(tensors) != 1:
        raise GddlabError(f"class embedding {path} holds {len(tensors)} arrays: give one of ({rows}, {EMBEDDING})")
    (table,) = tensors
    if table.ndim != 2 or table.shape[1] != EMBEDDING or table.shape[0] < rows:
        raise GddlabError(
            f"class embedding {path} is {tuple(table.shape)}: give ({rows}, {EMBEDDING}), or more rows than {rows}"
        )
    if not table.is_floating_point() or not table[:rows].isfinite().all():
        raise GddlabError(f"class embedding {path} holds something else than finite floating point numbers")
    return table[:rows]
