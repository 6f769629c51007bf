"""The optimiser of the paper and its step: gradients averaged over ranks, sanitised, counted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gddlab.distill.distributed import World
from gddlab.ema import local


def adam(params: Sequence[nn.Parameter], lr: float, *, interval: int | None = None) -> torch.optim.Adam:
    """Adam with betas (0, 0.99), eps 1e-8; `interval` corrects both for a lazy regulariser (StyleGAN2, appendix B).

    One kernel makes the whole step. The state exists from the start, so that a checkpoint always has the same form.
    """
    c = interval / (interval + 1) if interval else 1.0
    opt = torch.optim.Adam(params, lr=lr * c, betas=(0.0, 0.99**c), eps=1e-8, fused=True)
    for p in params:
        step = torch.zeros((), device=p.device)  # the kernel counts it there
        opt.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return opt


def update(opt: torch.optim.Optimizer, params: Sequence[nn.Parameter], world: World) -> Tensor:
    """Averages gradients over ranks, replaces values that are not finite (nan by 0, +-inf by +-1e5), steps.

    Returns:
        The number of gradient tensors that were not finite, (), without waiting for the device.
    """
    # a sharded network's backward pass averages its gradients itself
    world.average_gradients([p for p in params if not isinstance(p, DTensor)])
    own = [p.grad for p in params if p.grad is not None]
    grads = [local(g) for g in own]
    bad = (~torch.stack(torch._foreach_norm(grads)).isfinite()).sum()
    if any(isinstance(g, DTensor) for g in own):
        bad = world.greatest(bad)  # a shard does not see the others
    for g in grads:
        torch.nan_to_num_(g, nan=0.0, posinf=1e5, neginf=-1e5)
    opt.step()
    return bad
