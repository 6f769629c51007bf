"""What a hook keeps of an activation: a few float64 numbers a row, computed at once.

In a forward pass, row i * S + s of a batch is image i at noise level s. When the pass is over, statistics are updated
from these numbers; no activation outlives its hook.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["REDUCTIONS", "Tap"]


class Tap(NamedTuple):
    """Where a number is read: a module's output or first input, and the reduction applied there."""

    module: str
    side: Literal["input", "output"]
    reduction: str


def _double(x: Tensor) -> Tensor:
    return x.cpu().double() if x.device.type == "mps" else x.double()  # MPS has no float64


def _row_means(x: Tensor, n: int, f: Callable[..., Tensor]) -> Tensor:
    """Mean of f over each row, through a small buffer that stays in the CPU's cache; sums of rows are pairwise, so exact enough.

    (n * S, ...) -> (n, S)
    """
    v = x.reshape(x.shape[0], -1)
    chunk = max(1, (1 << (18 if x.device.type == "cpu" else 26)) // v.shape[1])
    buffer = torch.empty_like(v[:chunk])
    sums = torch.cat([f(part, out=buffer[: len(part)]).sum(-1) for part in v.split(chunk)])
    return (_double(sums) / v.shape[1]).reshape(n, -1)


def mean_square(x: Tensor, n: int) -> Tensor:
    """Mean of squares of each row.  (n * S, ...) -> (n, S)"""
    return _row_means(x, n, torch.square)


def mean_magnitude(x: Tensor, n: int) -> Tensor:
    """Mean of absolute values of each row.  (n * S, ...) -> (n, S)"""
    return _row_means(x, n, torch.abs)


def positive_share(x: Tensor, n: int) -> Tensor:
    """Share of values above 0 of each row.  (n * S, ...) -> (n, S)"""
    return _row_means(x, n, functools.partial(torch.gt, other=0))


def gram(x: Tensor, n: int) -> Tensor:
    """Inner products of the rows of each image, over the number of values.  (n * S, ...) -> (n, S, S)"""
    v = x.reshape(n, x.shape[0] // n, -1)
    total: Tensor | int = 0
    for part in v.split(1 << 12, -1):  # partial sums in float32, their sum in float64
        total = total + _double(torch.bmm(part, part.mT))
    assert isinstance(total, Tensor)
    return total / v.shape[-1]


REDUCTIONS: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    f.__name__: f for f in (mean_square, mean_magnitude, positive_share, gram)
}
