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


@torch.no_grad()
def ema_update(ema: nn.Module, net: nn.Module, beta: float) -> None:
    """ema <- beta ema + (1 - beta) net, for trained parameters; frozen ones are equal in both, buffers are copied."""
    e: list[torch.Tensor] = []
    p: list[torch.Tensor] = []
    for pe, pn in zip(ema.parameters(), net.parameters(), strict=True):
        if pn.requires_grad:
            e.append(local_shard(pe))
            p.append(local_shard(pn))
    torch._foreach_lerp_(e, p, 1 - beta)
    for be, bn in zip(ema.buffers(), net.buffers(), strict=True):
        be.copy_(bn)


def local_shard(x: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor, which shares its memory; the tensor itself where it is whole."""
    return x.to_local() if isinstance(x, DTensor) else x
