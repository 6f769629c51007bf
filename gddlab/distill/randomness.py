"""Everything random in an iteration, as a function of seed and iteration: drawn for all ranks, divided among them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from gddlab.distill.config import DTYPES, TrainConfig
from gddlab.distill.distributed import World
from gddlab.distill.instance import InstanceLoss
from gddlab.nets import OneStepPrecond
from gddlab.runtime import generator

Drawn = TypeVar("Drawn")
"""A tensor, or what holds tensors."""

SIDE = 2**31
"""Positions of the sequence from which everything but latents is drawn; latents are at 2 * iteration + stream."""


class Draw(NamedTuple):
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


class InstanceDraw(NamedTuple):
    """What is random in the instance loss, of this rank: noise, (B, C, H, W), and indices of noise levels, (3, B)."""

    noise: Tensor
    at: Tensor


class Batch(NamedTuple):
    """What an iteration takes, this rank's part.

    Attributes:
        z, draw: Latents of the generator step, (B, C, H, W), and what else is random in it.
        z_d, draw_d: Those of the images that the discriminator learns from; None where it takes the generator step's.
        labels: One-hot, (B, label_dim), or None.
        images: Real, (B, C, H, W) in [-1, 1]; None where the iteration takes none.
        features: Theirs where they are kept, of each level, (B, ...), in place of computed ones.
        u: Uniforms of their augmentation, (B, width), or None.
        instance: What is random in the instance loss, or None.
    """

    z: Tensor
    draw: Draw = Draw()
    z_d: Tensor | None = None
    draw_d: Draw = Draw()
    labels: Tensor | None = None
    images: Tensor | None = None
    features: list[Tensor] | None = None
    u: Tensor | None = None
    instance: InstanceDraw | None = None


class Drawer:
    """Latents and all other random numbers of a rank; neither processes nor micro-batches change them.

    All are drawn on the CPU, since each kind of device has its own sequence.

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

    def pinned(self, drawn: Drawn) -> Drawn:
        """Tensors on the CPU, in memory from which the copy to a CUDA device does not wait for it."""
        return tree_map_only(Tensor, Tensor.pin_memory, drawn) if self.world.device.type == "cuda" else drawn

    def place(self, drawn: Drawn) -> Drawn:
        """Images, noise and labels where and how the networks take them; indices stay on the CPU, where they choose."""
        return tree_map_only(Tensor, self._placed, drawn)

    def _placed(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        x = x.to(self.world.device, self.dtype, non_blocking=True)
        return x.contiguous(memory_format=self.layout) if x.ndim == 4 else x

    def _noise(self, g: torch.Generator) -> Tensor:
        return self.world.shard(torch.randn((self.batch, *self.shape), generator=g))

    def _uniforms(self, g: torch.Generator) -> Tensor | None:
        if not self.width:
            return None
        return self.world.shard(torch.rand((self.batch, self.width), generator=g, dtype=torch.float64))

    def latents(self, iteration: int, stream: int) -> Tensor:
        """Of the generator step (stream 0) or the discriminator step (1), (B, C, H, W), on the CPU."""
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

    def instance(self, iteration: int, loss: InstanceLoss) -> InstanceDraw:
        """Noise and noise levels of the instance loss."""
        g = generator(self.seed, SIDE + 4 * iteration + 3)
        noise = self._noise(g)
        return InstanceDraw(noise, self.world.shard(loss.draw(self.batch, g).T).T)


class Ahead:
    """Makes what the next iteration takes while the present one runs on its device.

    Args:
        make: Takes iteration and position in the data.
        step: Images of an iteration.
        device: Where it runs; on a CPU, whose cores train, each is made when it is asked for.
    """

    def __init__(self, make: Callable[[int, int], Batch], step: int, device: torch.device):
        self.make, self.step = make, step
        self.pool: ThreadPoolExecutor | None = None
        if device.type == "cuda":
            self.pool = ThreadPoolExecutor(1, "ahead", initializer=torch.cuda.set_device, initargs=(device,))
        self.made: tuple[tuple[int, int], Future[Batch]] | None = None

    def __call__(self, iteration: int, position: int) -> Batch:
        key = iteration, position
        batch = self.made[1].result() if self.made is not None and self.made[0] == key else self.make(*key)
        if self.pool is not None:
            following = iteration + 1, position + self.step
            self.made = following, self.pool.submit(self.make, *following)
        return batch
