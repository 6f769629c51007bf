"""Batches with a position: what a process of a run reads next is a function of seed, position and rank."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gddlab.datasets.base import ImageDataset, order
from gddlab.errors import GddlabError

__all__ = ["BatchReader"]


class BatchReader:
    """Endless shuffled batches of a dataset, each rank its equal part.

    The global sequence depends on the seed alone: not on the number of processes, the batch, or where reading began.

    Args:
        dataset: Images and labels.
        batch: Images a step over all ranks.
        seed: Of the order.
        rank, world_size: Which part of each batch is read here.
    """

    def __init__(self, dataset: ImageDataset, *, batch: int, seed: int, rank: int = 0, world_size: int = 1):
        if not 0 <= rank < world_size:
            raise GddlabError(f"rank={rank} of world_size={world_size}: ranks count from 0")
        if batch < 1 or batch % world_size:
            raise GddlabError(f"batch={batch} over {world_size} processes: give a multiple of {world_size}")
        self.dataset = dataset
        self.batch = batch
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.position = 0
        """Images read so far by all ranks together."""

    def next(self) -> tuple[Tensor, Tensor]:
        """This rank's images, float32 (batch / world_size, C, R, R) in [-1, 1], and one-hot labels; moves on."""
        index = self.indices()
        self.position += self.batch
        return self.dataset.images(index), self.dataset.labels(index)

    def indices(self) -> Tensor:
        """Which images `next` reads here, int64 (batch / world_size,)."""
        n = self.batch // self.world_size
        return order(len(self.dataset), self.seed, self.position, self.batch)[self.rank * n : (self.rank + 1) * n]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "seed": self.seed, "dataset_sha256": self.dataset.manifest.sha256}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken, with any batch and number of processes.

        Raises:
            GddlabError: The state is of another dataset or seed, or has no position.
        """
        for key, ours in self.state_dict().items():
            if key not in state:
                raise GddlabError(f"the data position lacks {key!r}: give what state_dict() returned")
            if key != "position" and state[key] != ours:
                raise GddlabError(f"the data position is of {key}={state[key]!r}, here it is {ours!r}: give the same")
        position = state["position"]
        if type(position) is not int or position < 0:
            raise GddlabError(f"position={position!r}: give the number of images read, from 0 up")
        self.position = position
