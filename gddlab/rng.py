"""Random numbers that are functions of a seed and a position, so that the position is their whole state."""

from __future__ import annotations

import torch

__all__ = ["generator"]


def generator(seed: int, position: int) -> torch.Generator:
    """A CPU generator for one position of the sequence of `seed`.

    PyTorch's CPU generator takes 32 bits of its seed; seeds are spread over them by the golden ratio (Knuth's multiplicative hash), so that sequences of
    nearby seeds do not overlap for millions of positions.
    """
    return torch.Generator().manual_seed((seed * 0x9E3779B1 + position) % 2**32)
