"""The generator's loss at the last checkpoint of a run, to be differentiated outside of the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gddlab.datasets import ImageDataset, order
from gddlab.distill.checkpoints import checkpoints
from gddlab.distill.config import TrainConfig
from gddlab.distill.distributed import World
from gddlab.distill.losses import g_loss
from gddlab.distill.trainer import Trainer
from gddlab.errors import GddlabError, NotFound
from gddlab.nets import OneStepPrecond
from gddlab.probing.gradients import Batch
from gddlab.sampling import latents
from gddlab.sampling.samplers import positive


@dataclass(frozen=True)
class FreshNoise:
    """Batches of a student's inputs, made again by each iteration: unit noise (B, C, H, W), one-hot labels or None.

    Attributes:
        student: Whose inputs; on its device, in its precision.
        data: Where classes come from, in its order under `seed`.
        n, batch_size: Images in all, and images per batch.
        seed: Image i has noise of seed `seed` + i.
    """

    student: OneStepPrecond
    data: ImageDataset
    n: int
    batch_size: int
    seed: int

    def __len__(self) -> int:
        return self.n // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        net, like = self.student, next(self.student.parameters())
        shape = (net.img_channels, net.img_resolution, net.img_resolution)
        for i in range(0, self.n, self.batch_size):
            z = latents(range(self.seed + i, self.seed + i + self.batch_size), shape).to(like)
            index = order(len(self.data), self.seed, i, self.batch_size)
            labels = self.data.labels(index).to(like) if net.label_dim else None
            yield Batch(net.sigma_g, (z, labels), self.batch_size)


class AdversarialProblem(NamedTuple):
    """Arguments of `gddlab.grad_probe`: `grad_probe(*adversarial_problem(run_dir))`.

    Attributes:
        student: The generator as it is trained, not its average.
        loss: (student, (z, labels)) -> (), the generator's loss, mean over images, without `adversarial_weight`.
        batches: Fresh noise at the student's sigma.
    """

    student: OneStepPrecond
    loss: Callable[[nn.Module, Any], Tensor]
    batches: FreshNoise


def adversarial_problem(
    run_dir: str | Path, *, n: int = 256, batch_size: int | None = None, seed: int = 0
) -> AdversarialProblem:
    """The generator's loss with student and discriminator of a run's last checkpoint.

    The discriminator is as in training: BatchNorm sees the fakes of a batch, spectral norm takes its step. But it is
    reset after each batch, so that every batch meets the same one. A bfloat16 run is rebuilt in float32.

    Args:
        run_dir: A run directory; it is only read.
        n: Images, a multiple of `batch_size`.
        batch_size: Images per batch; None is the run's own, over all its processes.
        seed: Of noise and classes.

    Raises:
        GddlabError: No run, no discriminator or no checkpoint; teacher or data are missing; `n` is no multiple.
    """
    config = TrainConfig.load(run_dir)
    size = positive("batch_size", config.batch if batch_size is None else batch_size)
    if positive("n", n) % size:
        raise GddlabError(f"n={n} images in batches of {size}: give a multiple, or another batch_size=")
    if config.discriminator is None:
        raise GddlabError(f"{run_dir} trains without a discriminator: give a run that has one")
    if not checkpoints(Path(run_dir)):
        raise NotFound(f"{run_dir} has no checkpoint: wait for its first one, or stop() the run, which writes one")
    cuda = config.device != "cpu" and torch.cuda.is_available()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # the trainer seeds the global generators
        trainer = Trainer(config, World(0, 1, torch.device("cuda" if cuda else "cpu")))
    trainer.restore()
    student, d, kind = trainer.step.g, trainer.step.d, config.loss
    d.requires_grad_(False)

    def loss(net: nn.Module, inputs: tuple[Tensor, Tensor | None]) -> Tensor:
        assert isinstance(net, OneStepPrecond)
        z, labels = inputs
        buffers = {name: b.clone() for name, b in d.named_buffers()}  # a pass in training mode changes them
        logits = functional_call(d, buffers, (net.generate(z, labels), labels))
        return g_loss(logits, kind)

    return AdversarialProblem(student, loss, FreshNoise(student, trainer.data, n, size, seed))
