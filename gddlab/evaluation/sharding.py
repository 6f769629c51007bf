"""Work on images shared by processes: those of a process group, or fresh ones that this call starts."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor

from gddlab.errors import GddlabError

__all__ = ["ALONE", "Group", "joined", "share"]

_PIECE = 1 << 24  # bytes sent at once


@dataclass(frozen=True)
class Group:
    """Processes that make the same call, each a part of the work; all of them get the whole result."""

    rank: int = 0
    size: int = 1
    handle: Any = None

    def all(self, flag: bool) -> bool:
        """Whether the flag is set on every rank."""
        if self.size == 1:
            return flag
        t = torch.tensor(int(flag))
        dist.all_reduce(t, op=dist.ReduceOp.MIN, group=self.handle)
        return bool(t)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A refusal on one rank is raised on all, so that none waits for another for ever."""
        refusal: str | None = None
        error: BaseException | None = None
        try:
            yield
        except Exception as e:
            refusal, error = (str(e) if isinstance(e, GddlabError) else f"{type(e).__name__}: {e}"), e
        if self.size > 1:
            every: list[str | None] = [None] * self.size
            dist.all_gather_object(every, refusal, group=self.handle)
            refusal = next((r for r in every if r is not None), None)
        if error is not None:
            raise error
        if refusal is not None:
            raise GddlabError(refusal)

    def gather(self, part: Tensor, counts: Sequence[int]) -> Tensor:
        """The parts of all ranks, counts[rank] rows each, in order of rank.  (counts[rank], D) -> (sum(counts), D)"""
        if self.size == 1:
            return part
        out = torch.empty(sum(counts), *part.shape[1:], dtype=part.dtype)
        for rank, rows in enumerate(out.split(list(counts))):
            piece = part.contiguous() if rank == self.rank else rows
            dist.broadcast(piece, src=self._global(rank), group=self.handle)
            if rank == self.rank:
                rows.copy_(piece)
        return out

    def read_in_order(self, kept: IO[bytes], sizes: Sequence[int], read: Callable[[bytes], Any]) -> None:
        """Calls `read` on every rank with the bytes that all ranks kept, in order of rank, a piece at a time.

        Args:
            kept: This rank's bytes, from the beginning.
            sizes: How many each rank kept.
            read: Gets each piece.
        """
        kept.seek(0)
        for rank, size in enumerate(sizes):
            for start in range(0, size, _PIECE):
                length = min(_PIECE, size - start)
                if self.size == 1:
                    read(kept.read(length))
                    continue
                own = kept.read(length) if rank == self.rank else bytes(length)
                piece = torch.frombuffer(bytearray(own), dtype=torch.uint8)
                dist.broadcast(piece, src=self._global(rank), group=self.handle)
                read(piece.numpy().tobytes())

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.handle, rank)


ALONE = Group()


@contextlib.contextmanager
def joined(nproc: int | None) -> Iterator[Group]:
    """The processes that share a call.

    Args:
        nproc: None: those of the process group where there is one, or of torchrun, whose group is then joined;
            a number: this process alone.
    """
    started = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if nproc is not None and nproc > 1 and started:
        raise GddlabError(f"nproc={nproc} under torchrun: leave nproc away, its processes share the work")
    if nproc is not None or not (dist.is_initialized() or started):
        yield ALONE
        return
    if not dist.is_initialized():
        from gddlab.distill.distributed import World

        # kept for later calls: a group that is opened again meets the addresses of the first in torchrun's store, and hangs
        atexit.register(World.start().close)
    if dist.get_world_size() == 1:
        yield ALONE
        return
    # features are gathered on CPUs, and one rank may wait long for another
    handle = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
    try:
        yield Group(dist.get_rank(), dist.get_world_size(), handle)
    finally:
        dist.destroy_process_group(handle)


def share(n: int, batch_size: int, rank: int, size: int) -> tuple[int, int]:
    """First and last image (exclusive) of a rank: whole batches, so that each batch is what one process would make."""
    batches = -(-n // batch_size)
    first, last = batches * rank // size, batches * (rank + 1) // size
    return min(first * batch_size, n), min(last * batch_size, n)
