"""FSDP2 for large students: weights, average, gradients and moments lie in shards on the processes; a layer's weights are whole only while it computes."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gddlab.distill.distributed import World
from gddlab.nets import OneStepPrecond
from gddlab.nets.layers import UNetBlock

__all__ = ["fill", "shard"]


def shard(net: OneStepPrecond, world: World) -> None:
    """Spreads the U-Net's parameters over the processes, a block at a time; gradients are then averaged over ranks by the backward pass itself.

    Nothing changes for one process. Names and what is frozen stay.
    """
    if world.size == 1:
        return
    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in net.model.modules():
        if isinstance(module, UNetBlock):
            fully_shard(module, mesh=mesh)
    # also at the root, which FSDP would leave whole for a backward pass that the discriminator's step does not have
    fully_shard(net.model, mesh=mesh, reshard_after_forward=True)


@torch.no_grad()
def fill(whole: nn.Module, net: nn.Module) -> None:
    """Copies a network that may be sharded into one that is not; all processes make this call."""
    mine = net.state_dict()
    for name, x in whole.state_dict().items():
        source = mine[name]
        x.copy_(source.full_tensor() if isinstance(source, DTensor) else source)
