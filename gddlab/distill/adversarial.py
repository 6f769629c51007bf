"""The generator's loss at the last checkpoint of a run, for `grad_probe`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gddlab.datasets import order
from gddlab.distill.config import TrainConfig
from gddlab.distill.distributed import World
from gddlab.distill.losses import g_loss
from gddlab.distill.status import checkpoints
from gddlab.distill.trainer import Trainer
from gddlab.errors import GddlabError, NotFound, positive
from gddlab.nets import OneStepPrecond
from gddlab.probing.gradients import Batch
from gddlab.sampling import latents
from gddlab.sampling.samplers import seed_list


class AdversarialProblem(NamedTuple):
    """Arguments of `gddlab.grad_probe`: `grad_probe(*adversarial_problem(run_dir))`.

    Attributes:
        student: The generator as it is trained, not its average.
        loss: (student, (z, labels)) -> (), the generator's loss, mean over images, without `adversarial_weight`.
        batches: Unit noise (B, C, H, W) and one-hot labels or None, at the student's sigma.
    """

    student: OneStepPrecond
    loss: Callable[[nn.Module, Any], Tensor]
    batches: list[Batch]


def adversarial_problem(
    run_dir: str | Path, *, n: int = 256, batch_size: int | None = None, seed: int = 0
) -> AdversarialProblem:
    """The generator's loss with student and discriminator of a run's last checkpoint, one that has no other loss.

    The discriminator is as in training: BatchNorm sees the fakes of a batch, spectral norm takes its step. But it is
    reset after each batch, so that every batch meets the same one. A bfloat16 run is rebuilt in float32.

    Args:
        run_dir: A run directory; it is only read.
        n: Images, a multiple of `batch_size`.
        batch_size: Images per batch; None is the run's own, over all its processes.
        seed: Image i has noise of seed `seed` + i; classes come in the order of the data under `seed`.

    Raises:
        GddlabError: No run, no discriminator or no checkpoint; a run with augmentation, several steps or an instance
            loss; teacher or data are missing; `n` is no multiple.
    """
    config = TrainConfig.load(run_dir)
    size = positive("batch_size", config.batch if batch_size is None else batch_size)
    seed_list(n, seed, None)
    if positive("n", n) % size:
        raise GddlabError(f"n={n} images in batches of {size}: give a multiple, or another batch_size=")
    if config.discriminator is None:
        raise GddlabError(f"{run_dir} trains without a discriminator: give a run that has one")
    for name, has in (("augment", config.augment), ("mid_sigmas", config.mid_sigmas), ("instance", config.instance)):
        if has:
            raise GddlabError(f"{run_dir} trains with {name}, which this loss does not have: give a run without")
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

    like, shape = next(student.parameters()), (student.img_channels, student.img_resolution, student.img_resolution)
    batches = []
    for i in range(0, n, size):
        z = latents(range(seed + i, seed + i + size), shape).to(like)
        index = order(len(trainer.data), seed, i, size)
        labels = trainer.data.labels(index).to(like) if student.label_dim else None
        batches.append(Batch(student.sigma_g, (z, labels), size))
    return AdversarialProblem(student, loss, batches)
