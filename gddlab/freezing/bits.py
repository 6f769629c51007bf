"""Comparison of tensors bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gddlab.probing.layers import plain_name, unwrap

__all__ = ["same_bits", "tensors_of"]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the bare network by plain name."""
    net = unwrap(model)
    return {plain_name(n): t.detach() for n, t in (*net.named_parameters(), *net.named_buffers())}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal type, shape and bytes: NaN equals itself, 0.0 is not -0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)
