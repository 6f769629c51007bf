"""From a configuration to what is trained: teacher, data, student, discriminator, losses; refused before anything is written."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch

from gddlab.datasets import ImageDataset, open_dataset
from gddlab.distill.augment import AdaController, Augment
from gddlab.distill.config import TrainConfig
from gddlab.distill.distances import check_distance, perceptual_distance
from gddlab.distill.distributed import World, shard
from gddlab.distill.losses import InstanceLoss, needs_target_time
from gddlab.distill.lpips import LPIPSDiscriminator
from gddlab.distill.projected import ProjectedDiscriminator, check_levels, load_embedding
from gddlab.distill.step import GanStep
from gddlab.distill.stylegan2 import GROUP, StyleGAN2Discriminator, group_size
from gddlab.errors import GddlabError
from gddlab.nets import OneStepPrecond, Precond
from gddlab.nets.io import make_student
from gddlab.pretrained.backbones import backbone_file, check_backbone
from gddlab.pretrained.lpips_trunk import check_trunk
from gddlab.teachers import load_teacher

__all__ = ["DTYPES", "Built", "build_discriminator", "build_step", "build_student", "check", "check_losses"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}
"""Of weights and images by the configuration's precision; bfloat16 is autocast's."""
AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float64": None}


def check(config: TrainConfig, *, world_size: int = 1) -> tuple[Precond, ImageDataset]:
    """Refuses what cannot work before anything is written: teacher, data, mask, weights and batch must be there and fit each other.

    Returns:
        Teacher and data.
    """
    teacher = load_teacher(config.teacher)
    data = open_dataset(
        config.data, classes=config.classes, max_images=config.max_images, xflip=config.xflip, progress=False
    )
    for what, a, b in (
        ("resolution", teacher.img_resolution, data.resolution),
        ("channels", teacher.img_channels, data.channels),
    ):
        if a != b:
            raise GddlabError(
                f"teacher {config.teacher!r} has {what} {a}, data {config.data!r} has {b}: give a pair that fits"
            )
    if teacher.label_dim and not data.classes:
        raise GddlabError(
            f"teacher {config.teacher!r} is conditional with {teacher.label_dim} classes, data {config.data!r} has no labels: "
            "give labelled data (`gddlab prepare` makes it of class folders)"
        )
    if teacher.label_dim not in (0, data.classes):
        raise GddlabError(
            f"teacher {config.teacher!r} has {teacher.label_dim} classes, data {config.data!r} has {data.classes}: give a pair that fits"
        )
    if config.batch % world_size:
        raise GddlabError(f"batch={config.batch} on {world_size} processes: give a multiple of {world_size}")
    part = config.batch // world_size
    if config.batch_per_device is not None and part % config.batch_per_device:
        raise GddlabError(
            f"batch={config.batch} on {world_size} processes is {part} each, batch_per_device={config.batch_per_device}: give a divisor of {part}"
        )
    check_losses(config)
    if config.embedding_file is not None and not teacher.label_dim:
        raise GddlabError(
            f"embedding_file with the unconditional teacher {config.teacher!r}: there are no classes to embed, leave it away"
        )
    if config.embedding_file is not None:
        load_embedding(config.embedding_file, teacher.label_dim)
    if config.adversarial_weight and config.discriminator == "stylegan2":
        _check_groups(config.batch, config.batch_per_device or part)
        with torch.random.fork_rng(devices=[]):
            build_discriminator(config, teacher)  # reads the weights and fits them to the images
    with torch.device("meta"):
        student = make_student(teacher, mid_sigmas=config.mid_sigmas, init="scratch")
    if config.mask is not None:
        config.mask.apply(student)
        if not any(p.requires_grad for p in student.parameters()):
            raise GddlabError("the mask freezes every parameter: nothing is left to train")
    return teacher, data


def _check_groups(batch: int, part: int) -> None:
    """Parts of a batch must hold whole groups of the minibatch standard deviation, or the result would depend on them."""
    size = group_size(batch, GROUP)
    if part % size:
        raise GddlabError(
            f"{part} of {batch} images at once with discriminator='stylegan2', whose minibatch deviation is of {size} images: give a multiple of {size}"
        )


def check_losses(config: TrainConfig) -> str:
    """Refuses a discriminator or distance whose weights are not there or whose input does not fit; says what was found."""
    found = []
    if config.adversarial_weight and config.discriminator == "projected":
        for name in config.backbones:
            weights = config.backbone_weights.get(name, "auto")
            check_levels(name, config.input_size)
            check_backbone(name, input_size=config.input_size, weights=weights)
            found.append(f"{name} ({backbone_file(name).find(weights) or 'random weights'})")
    elif config.adversarial_weight and config.discriminator == "lpips":
        check_trunk(config.lpips_net, config.discriminator_weights, input_size=config.input_size)
        found.append(f"lpips discriminator ({config.lpips_net})")
    elif config.adversarial_weight:
        found.append(f"stylegan2 discriminator ({config.discriminator_weights or 'from scratch'})")
    if config.instance:
        check_distance(config.distance, config.distance_weights)
        found.append(f"{config.instance} by {config.distance}")
    return ", ".join(found)


def build_student(config: TrainConfig, teacher: Precond) -> OneStepPrecond:
    """The student with its mask applied; what is added for a second time is always trained."""
    second = config.instance is not None and needs_target_time(config.instance)
    g = make_student(teacher, target_time=second, mid_sigmas=config.mid_sigmas, init=config.student).eval()
    if config.mask is None:
        g.requires_grad_(True)
    else:
        config.mask.apply(g)
    return g


def build_discriminator(
    config: TrainConfig, teacher: Precond
) -> ProjectedDiscriminator | StyleGAN2Discriminator | LPIPSDiscriminator | None:
    """The discriminator; None for a run on the instance loss alone."""
    if not config.adversarial_weight:
        return None
    if config.discriminator == "stylegan2":
        return StyleGAN2Discriminator(
            teacher.img_resolution,
            teacher.img_channels,
            classes=teacher.label_dim,
            channel_max=config.head_width,
            weights=config.discriminator_weights,
        )
    if config.discriminator == "lpips":
        return LPIPSDiscriminator(
            net=config.lpips_net,
            input_size=config.input_size,
            classes=teacher.label_dim,
            weights=config.discriminator_weights,
        )
    return ProjectedDiscriminator(
        config.backbones,
        input_size=config.input_size,
        cout=config.cout,
        classes=teacher.label_dim,
        max_width=config.head_width,
        sync_batchnorm=config.sync_batchnorm,
        fold=config.precision != "float64",
        weights=config.backbone_weights,
        embedding_file=config.embedding_file,
    )


class Built(NamedTuple):
    """What is trained: the step with student and discriminator; the student's average, a copy of it as yet; ADA's controller, if any."""

    step: GanStep
    ema: OneStepPrecond
    ada: AdaController | None


def build_step(config: TrainConfig, teacher: Precond, world: World) -> Built:
    """Student, discriminator and losses on their device, seeded, sharded and compiled where that is asked."""
    dtype = DTYPES[config.precision]
    torch.manual_seed(config.seed)
    d = build_discriminator(config, teacher)
    g = build_student(config, teacher).to(world.device, dtype)
    if d is not None:
        d = d.to(world.device, dtype).train()
    if config.channels_last:
        for net in filter(None, (g, d)):
            net.to(memory_format=torch.channels_last)
    ema = copy.deepcopy(g).eval()
    if config.shard:
        shard(g, world)
        shard(ema, world)
    instance = None
    if config.instance:
        teacher = teacher.to(device=world.device, dtype=dtype).eval().requires_grad_(False)
        distance = perceptual_distance(config.distance, weights=config.distance_weights)
        instance = InstanceLoss(
            config.instance, teacher, distance.to(device=world.device, dtype=dtype), steps=config.instance_steps
        )
    ada = None
    if config.ada_target is not None:
        ada = AdaController(config.ada_target, speed_kimg=config.ada_kimg, mean=world.mean).to(world.device)
    step = GanStep(
        g,
        d,
        trainable=[p for p in g.parameters() if p.requires_grad],
        lr_g=config.lr_g,
        lr_d=config.lr_d,
        adversarial_weight=config.adversarial_weight,
        r1_gamma=config.r1_gamma,
        r1_interval=config.r1_interval,
        world=world,
        loss=config.loss,
        autocast=AUTOCAST[config.precision],
        autocast_d=AUTOCAST[config.precision_d],
        micro=config.batch_per_device,
        augment=Augment(config.augment) if config.augment else None,
        augment_p=config.augment_p if ada is None else ada.p,
        instance=instance,
        instance_weight=config.instance_weight,
        compiled=config.compile,
    )
    if config.compile:
        g.compile()
    return Built(step, ema, ada)
