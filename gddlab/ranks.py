"""Processes that share a job: which one this is, which part of the work is its own, and what they decide together."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor

from gddlab.errors import GddlabError

PIECE = 1 << 24
"""Bytes sent at once."""
WAIT = datetime.timedelta(days=1)
"""How long a rank waits for the others, which may have far more to do."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a job, seen from one of them; all methods are collective: every process makes the same call.

    Attributes:
        rank: Number of this process, 0 to size - 1.
        size: Number of processes.
        group: Their process group, for tensors on the CPU; None without one, or for the default group.
    """

    rank: int = 0
    size: int = 1
    group: Any = field(default=None, kw_only=True)

    def all(self, flag: bool) -> bool:
        """Whether the flag is set on every rank."""
        return all(self.gather_objects(flag))

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all ranks, in order of rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """An error on one rank is raised on all, so that none waits for ever."""
        refusal: str | None = None
        error: BaseException | None = None
        try:
            yield
        except Exception as e:
            refusal, error = (str(e) if isinstance(e, GddlabError) else f"{type(e).__name__}: {e}"), e
        refusals = [r for r in self.gather_objects(refusal) if r is not None]
        if error is not None:
            raise error
        if refusals:
            raise GddlabError(refusals[0])

    def gather(self, part: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all ranks, in order of rank.  (counts[rank], D) -> (sum(counts), D)"""
        if self.size == 1:
            return part
        out = torch.empty(sum(counts), *part.shape[1:], dtype=part.dtype)
        for rank, rows in enumerate(out.split(list(counts))):
            if rank == self.rank:
                rows.copy_(part)
            dist.broadcast(rows, group_src=rank, group=self.group)
        return out

    def read_in_order(self, kept: IO[bytes], sizes: Sequence[int], read: Callable[[bytes], Any]) -> None:
        """Calls `read` on every rank with the bytes that all ranks kept, in order of rank, one piece at a time.

        `kept` holds this rank's bytes, `sizes` says how many each rank kept.
        """
        kept.seek(0)
        for rank, size in enumerate(sizes):
            for start in range(0, size, PIECE):
                length = min(PIECE, size - start)
                own = kept.read(length) if rank == self.rank else bytes(length)
                if self.size > 1:
                    piece = torch.frombuffer(bytearray(own), dtype=torch.uint8)
                    dist.broadcast(piece, group_src=rank, group=self.group)
                    own = piece.numpy().tobytes()
                read(own)


ALONE = Ranks()


def named_ranks() -> Ranks:
    """As RANK and WORLD_SIZE in the environment say (torchrun, `run_workers`); needs no process group."""
    return Ranks(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def present_ranks() -> Ranks:
    """The default process group, or this process alone where there is none."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return ALONE


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def joined(nproc: int | None) -> Iterator[Ranks]:
    """The processes that share a call.

    Args:
        nproc: None: those of the process group, or else of torchrun, whose group is then joined; a number: only this
            one.

    Raises:
        GddlabError: Several processes are to be started by each process of torchrun.
    """
    if nproc is not None and nproc > 1 and named_ranks().size > 1:
        raise GddlabError(f"nproc={nproc} under torchrun: omit nproc, its processes share the work")
    if nproc is None and named_ranks().size > 1 and not dist.is_initialized():
        # kept for later calls: a group that is opened again finds the addresses of the first in torchrun's store, and
        # hangs
        dist.init_process_group("gloo", timeout=WAIT)
        atexit.register(_leave)
    ranks = ALONE if nproc is not None else present_ranks()
    if ranks.size == 1:
        yield ALONE
        return
    group = dist.new_group(backend="gloo", timeout=WAIT)  # for tensors on the CPU
    try:
        yield Ranks(ranks.rank, ranks.size, group=group)
    finally:
        dist.destroy_process_group(group)


def share(n: int, batch_size: int, rank: int, size: int) -> tuple[int, int]:
    """First and last item (exclusive) of a rank: whole batches, those that a single process would make."""
    batches = -(-n // batch_size)
    first, last = batches * rank // size, batches * (rank + 1) // size
    return min(first * batch_size, n), min(last * batch_size, n)
