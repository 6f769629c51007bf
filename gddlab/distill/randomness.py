"""Everything random in an iteration, as a function of seed and iteration: drawn for all ranks, divided among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gddlab.distill.config import DTYPES, TrainConfig
from gddlab.distill.distributed import World
from gddlab.distill.instance import InstanceLoss
from gddlab.nets import OneStepPrecond
from gddlab.runtime import generator

SIDE = 2**31
"""Positions of the sequence from which everything but latents is drawn; latents are at 2 * iteration + stream."""


@dataclass(frozen=True)
class Draw:
    """What is random in a pass beside the latents; this rank's part of the global batch.

    Attributes:
        noise: Of a few-step student's later steps, each (B, C, H, W).
        exit: Which of its steps makes the images, from 0.
        u: Uniforms of the augmentation, (B, width).
    """

    noise: tuple[Tensor, ...] = ()
    exit: int = 0
    u: Tensor | None = None

    def part(self, s: slice) -> Draw:
        return Draw(tuple(x[s] for x in self.noise), self.exit, None if self.u is None else self.u[s])


class InstanceBatch(NamedTuple):
    """What the instance loss takes in an iteration, this rank's part: real images, noise, indices of noise levels."""

    images: Tensor
    noise: Tensor
    at: Tensor


class Drawer:
    """Latents and all other random numbers of a rank; neither processes nor micro-batches change them.

    Args:
        config: Batch, seed, steps of the student, precision, memory format.
        net: The student, for the shape of its images.
        world: Where they are used.
        width: Uniforms that the augmentation takes per image.
    """

    def __init__(self, config: TrainConfig, net: OneStepPrecond, world: World, *, width: int = 0):
        self.shape = (net.img_channels, net.img_resolution, net.img_resolution)
        self.dtype, self.world, self.width = DTYPES[config.precision], world, width
        self.batch, self.seed, self.steps = config.batch, config.seed, 1 + len(config.mid_sigmas)
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format

    def place(self, images: Tensor) -> Tensor:
        """Images or noise where and how the networks take them."""
        return self._move(images).contiguous(memory_format=self.layout)

    def _move(self, x: Tensor) -> Tensor:
        if self.world.device.type == "cuda":  # from pinned memory the copy does not wait for the device
            return x.pin_memory().to(self.world.device, self.dtype, non_blocking=True)
        return x.to(self.world.device, self.dtype)

    def _noise(self, g: torch.Generator) -> Tensor:
        return self.place(self.world.shard(torch.randn((self.batch, *self.shape), generator=g)))

    def _uniforms(self, g: torch.Generator) -> Tensor | None:
        if not self.width:
            return None
        return self._move(self.world.shard(torch.rand((self.batch, self.width), generator=g, dtype=torch.float64)))

    def latents(self, iteration: int, stream: int) -> Tensor:
        """Of the generator step (stream 0) or the discriminator step (1), (B, C, H, W)."""
        return self._noise(generator(self.seed, 2 * iteration + stream))

    def draw(self, iteration: int, stream: int) -> Draw:
        """What a pass of the student and the augmentation of its images need beside latents."""
        if self.steps == 1 and not self.width:
            return Draw()
        g = generator(self.seed, SIDE + 4 * iteration + stream)
        exit = int(torch.randint(self.steps, (), generator=g))
        return Draw(tuple(self._noise(g) for _ in range(exit)), exit, self._uniforms(g))

    def real(self, iteration: int) -> Tensor | None:
        """Uniforms of the augmentation of real images."""
        return self._uniforms(generator(self.seed, SIDE + 4 * iteration + 2))

    def instance(self, iteration: int, images: Tensor, loss: InstanceLoss) -> InstanceBatch:
        """Noise and noise levels of the instance loss, with this rank's real images."""
        g = generator(self.seed, SIDE + 4 * iteration + 3)
        noise = self._noise(g)
        return InstanceBatch(images, noise, self.world.shard(loss.draw(self.batch, g).T).T)
