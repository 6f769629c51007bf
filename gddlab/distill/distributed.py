"""The processes of a run: rank, world size, device, gradient averaging, and statistics shared between ranks."""

from __future__ import annotations

import datetime
import functools
import itertools
import math
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from gddlab.errors import GddlabError
from gddlab.nets import OneStepPrecond
from gddlab.nets.blocks import UNetBlock
from gddlab.ranks import Ranks
from gddlab.runtime import chosen_device

ROLL_CALL_S = 10.0
CPU = torch.device("cpu")
BUCKET = 25 << 20
"""Bytes of gradients that are sent at once: latency hardly counts, and what is complete need not wait for the rest."""


def _timed_out(error: BaseException | None) -> bool:
    """Whether a collective's timeout is at the bottom of an error."""
    while error is not None:
        if "timed out" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


@dataclass(frozen=True)
class World(Ranks):
    """One process of a run; `group` is of gloo, so that what the ranks decide never waits for an accelerator.

    Attributes:
        device: Where it computes.
        saving: A group for checkpoints, which are written beside the training.
        store: Where ranks can meet when a group fails; in rank 0 or in torchrun.
    """

    device: torch.device = CPU
    saving: Any = None
    store: Any = None

    @classmethod
    def start(cls, device: str = "auto", *, timeout_s: float = 600) -> World:
        """Joins the processes that torchrun started; a single process has no process group.

        Args:
            device: "auto" (CUDA where there is one, else the CPU), "cpu" or "cuda".
            timeout_s: How long a collective waits before it fails, seconds.
        """
        size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        where = chosen_device(device)
        gpu = where.type == "cuda"
        if gpu:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            if local > torch.cuda.device_count():  # NCCL would refuse them later, with an error number
                raise GddlabError(
                    f"{local} processes on a machine of {torch.cuda.device_count()} GPUs: each needs one of its own"
                )
            torch.cuda.set_device(where)
        if size == 1:
            return cls(0, 1, where)
        timeout = datetime.timedelta(seconds=timeout_s)
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timeout)
        control = dist.new_group(backend="gloo", timeout=timeout) if gpu else dist.group.WORLD
        saving = dist.new_group(backend="gloo", timeout=timeout)
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=ROLL_CALL_S),
        )
        return cls(rank, size, where, saving, store, group=control)

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def silent(self, error: BaseException) -> str | None:
        """Which ranks did not answer, "rank 1 has not answered", if a collective timed out; else None.

        Every rank that saw the error says so in the store; those that do not within some seconds are meant.
        """
        if self.store is None or not _timed_out(error):
            return None
        missing = [0]  # rank 0 may hold the store, and a store that hangs answers nobody
        call = threading.Thread(target=self._roll_call, args=(missing,), daemon=True)
        call.start()
        call.join(2 * ROLL_CALL_S)
        if not missing:
            return None
        names, many = ", ".join(map(str, missing)), len(missing) > 1
        return f"ranks {names} have not answered" if many else f"rank {names} has not answered"

    def _roll_call(self, missing: list[int]) -> None:
        """Puts the ranks that do not answer within some seconds into `missing`."""
        keys = [f"gddlab/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/answers/{r}" for r in range(self.size)]
        self.store.set(keys[self.rank], "yes")
        end = time.monotonic() + ROLL_CALL_S
        while silent := [r for r, key in enumerate(keys) if not self.store.check([key])]:
            if time.monotonic() > end:
                break
            time.sleep(0.1)
        missing[:] = silent

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; the same answer on all."""
        if self.size == 1:
            return flag
        t = torch.tensor(int(flag))
        dist.all_reduce(t, op=dist.ReduceOp.MAX, group=self.group)
        return bool(t)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.group)

    def shard(self, batch: Tensor) -> Tensor:
        """This rank's equal part of a global batch, by the first dimension."""
        n = batch.shape[0] // self.size
        return batch[self.rank * n : (self.rank + 1) * n]

    def mean(self, t: Tensor) -> Tensor:
        """Mean of a tensor over ranks."""
        if self.size == 1:
            return t
        t = t.clone()
        dist.all_reduce(t)
        return t / self.size

    def greatest(self, t: Tensor) -> Tensor:
        """Elementwise maximum over ranks."""
        if self.size > 1:
            dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return t


class Gradients:
    """Gradients of the parameters of one optimiser, averaged over ranks in flat buckets during the backward pass.

    A bucket is sent as soon as all of its gradients are complete, in the order of the buckets, so that every rank sends
    the same in the same order even where gradients come in another one. What is not complete at the end is sent then,
    zeros where a gradient is missing. (Not DDP: R1's second derivative reaches only some parameters, a bias behind the
    last activation has no gradient, which DDP's reducer takes for an error.) Which parameters have a gradient is the
    same on all ranks. Where a gradient was, there is then a view of its bucket.

    Args:
        params: The trained parameters. Sharded ones average their gradients themselves.
        world: The processes of the run. A single one sends nothing and has no hooks.
    """

    def __init__(self, params: Sequence[nn.Parameter], world: World):
        from torch.distributed.tensor import DTensor  # takes a second

        self.params, self.world = params, world
        self.buckets: list[list[nn.Parameter]] = []
        room = 0
        for p in reversed(params):  # about the order in which a backward pass completes them
            if world.size == 1 or isinstance(p, DTensor):
                continue
            if p.nbytes > room:
                self.buckets.append([])
                room = BUCKET
            self.buckets[-1].append(p)
            room -= p.nbytes
            p.register_post_accumulate_grad_hook(functools.partial(self._arrived, len(self.buckets) - 1))
        self.expect(math.inf)

    def expect(self, passes: float) -> None:
        """Announces how many backward passes there are before `average`; infinity: all is sent there."""
        self.missing = [passes * len(bucket) for bucket in self.buckets]
        self.sent: list[tuple[dist.Work, Tensor]] = []

    def _arrived(self, bucket: int, _: Tensor) -> None:
        self.missing[bucket] -= 1
        assert self.missing[bucket] >= 0, "more backward passes than announced"
        while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
            self._send()

    def _send(self) -> None:
        """Starts to sum the next bucket over ranks."""
        bucket = self.buckets[len(self.sent)]
        # vectorised kernels need gradients that start at multiples of 16 bytes
        starts = [0, *itertools.accumulate(-(-p.numel() // 4) * 4 for p in bucket)]
        flat = bucket[0].new_zeros(starts[-1])
        views = [flat.as_strided(p.shape, p.stride(), i) for p, i in zip(bucket, starts, strict=False)]
        given = [(p, v, p.grad) for p, v in zip(bucket, views, strict=True) if p.grad is not None]
        if given:
            torch._foreach_copy_([v for _, v, _ in given], [grad for _, _, grad in given])
        for p, v, _ in given:
            p.grad = v
        work = dist.all_reduce(flat, async_op=True)
        assert work is not None
        self.sent.append((work, flat))

    def average(self) -> None:
        """Returns when every gradient is the mean over ranks."""
        while len(self.sent) < len(self.buckets):
            self._send()
        for work, flat in self.sent:
            work.wait()
            flat /= self.world.size
        self.expect(math.inf)


def shard(net: OneStepPrecond, world: World) -> None:
    """Spreads the U-Net's parameters over the processes, a block at a time; names and what is frozen stay.

    The backward pass then averages gradients over ranks itself. Nothing changes for one process.
    """
    if world.size == 1:
        return
    from torch.distributed.fsdp import fully_shard  # takes a second

    mesh = init_device_mesh(world.device.type, (world.size,))
    for module in net.model.modules():
        if isinstance(module, UNetBlock):
            fully_shard(module, mesh=mesh)
    # also at the root, which FSDP would leave whole for a backward pass that the discriminator's step does not have
    fully_shard(net.model, mesh=mesh, reshard_after_forward=True)
