"""Exponential moving average of parameters, by half-life in images (Karras et al. 2022, appendix F.1)."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def ema_beta(batch: int, halflife_kimg: float, rampup: float | None, nimg: int) -> float:
    """Decay of one step of `batch` images: 0.5^(batch / h), h = min(half-life, rampup * images seen), in images."""
    h = halflife_kimg * 1000
    if rampup is not None:
        h = min(h, rampup * nimg)
    return 0.5 ** (batch / max(h, 1e-8))


class Average:
    """A network's moving average: trained parameters move, frozen ones are equal in both, buffers are copied.

    Args:
        ema: Network that holds the average.
        net: Network that is trained; which of its parameters are, is looked at once.
    """

    def __init__(self, ema: nn.Module, net: nn.Module):
        trained = [p.requires_grad for p in net.parameters()]
        self.params = [[p for p, use in zip(x.parameters(), trained, strict=True) if use] for x in (ema, net)]
        self.buffers = [list(x.buffers()) for x in (ema, net)]

    @torch.no_grad()
    def update(self, beta: float) -> None:
        """ema <- beta ema + (1 - beta) net"""
        ema, net = ([local_shard(p) for p in params] for params in self.params)
        torch._foreach_lerp_(ema, net, 1 - beta)
        for mine, given in zip(*self.buffers, strict=True):
            mine.copy_(given)


def local_shard(x: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor, which shares its memory; the tensor itself where it is whole."""
    return x.to_local() if isinstance(x, DTensor) else x
