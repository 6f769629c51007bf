"""A process of `test_processes`: `python -m tests.gpu.rank KIND BACKEND DEVICE TEACHER OUT`; torchrun's variables."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gddlab.distill.distributed import Gradients, World
from gddlab.distill.step import adam, update
from gddlab.distill.trainer import Trainer
from gddlab.nets.blocks import UNetBlock
from gddlab.nets.io import make_student
from gddlab.sampling import latents
from tests.conftest import tiny_config, tiny_net

FIELDS: dict[str, Any] = {"precision": "float64", "discriminator": {"sync_batchnorm": True}}


def state(t: Trainer) -> dict[str, torch.Tensor]:
    """Parameters of student, average and discriminator; without biases before BatchNorm, whose true gradient is 0."""
    nets = {"g": t.step.g, "ema": t.ema, "d": t.step.d}
    whole = {f"{name}/{k}": v.cpu() for name, net in nets.items() for k, v in net.state_dict().items()}
    return {k: v for k, v in whole.items() if not k.endswith(".main.0.bias")}


def trained(path: Path, teacher: str, world: World) -> dict[str, torch.Tensor]:
    """What three iterations leave."""
    t = Trainer(tiny_config(path, Path(teacher), **FIELDS), world)
    for _ in range(3):
        t.iterate()
    return state(t)


def collectives(device: torch.device) -> dict[str, torch.Tensor]:
    """What collectives of one process give for numbers that they should leave as they are."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(device)
    total, gathered = x.clone(), [torch.empty_like(x)]
    dist.all_reduce(total)
    dist.all_gather(gathered, x)
    dist.broadcast(x, 0)
    dist.barrier()
    return {"given": x.cpu(), "reduced": total.cpu(), "gathered": gathered[0].cpu()}


def sharded(device: torch.device) -> dict[str, torch.Tensor]:
    """Parameters after a step of Adam, of a network as it is and of one that FSDP2 shards over one process."""
    whole = make_student(tiny_net()).to(device).requires_grad_(True)
    parts = copy.deepcopy(whole)
    mesh = init_device_mesh(device.type, (1,))
    for module in parts.model.modules():
        if isinstance(module, UNetBlock):
            fully_shard(module, mesh=mesh)
    fully_shard(parts.model, mesh=mesh)
    z, out = latents(range(4), (1, 16, 16)).to(device), {}
    for name, net in (("whole", whole), ("parts", parts)):
        params = list(net.parameters())
        opt = adam(params, 1e-3)
        net.generate(z).square().mean().backward()
        update(opt, Gradients(params, World(0, 1, device)))
        for k, p in net.named_parameters():
            out[f"{name}/{k}"] = (p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu()
    return out


def main(kind: str, backend: str, device: str, teacher: str, out: str) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    dist.init_process_group(backend)
    try:
        if kind == "collectives":
            found = collectives(where)
        elif kind == "sharded":
            found = sharded(where)
        else:
            found = trained(Path(out).parent / "run", teacher, World(rank, size, where, group=dist.group.WORLD))
        if rank == 0:
            torch.save(found, out)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
