"""From a configuration to what is trained: teacher, data, student, discriminator, losses."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from gddlab.datasets import ImageDataset, open_dataset
from gddlab.distill.config import DTYPES, TrainConfig
from gddlab.distill.distributed import World, shard
from gddlab.distill.step import GanStep
from gddlab.errors import GddlabError
from gddlab.files import hash_tensors, read_object
from gddlab.nets import OneStepPrecond, Precond, without_target
from gddlab.nets.io import INITS, TARGET, make_student
from gddlab.runtime import chosen_device
from gddlab.teachers import load_precond
from gddlab.teachers.catalog import load_student


def open_data(config: TrainConfig) -> ImageDataset:
    """The real images of a run."""
    return open_dataset(
        config.data,
        classes=config.classes,
        max_images=config.max_images,
        seed=config.subset_seed,
        xflip=config.xflip,
        progress=False,
    )


def weights_found(config: TrainConfig) -> str:
    """Says what discriminator and instance loss are made from.

    Raises:
        GddlabError: Weights are not there, or do not fit.
    """
    return ", ".join(part.find() for part in (config.discriminator, config.instance) if part is not None)


def check(config: TrainConfig, *, world_size: int = 1) -> tuple[Precond, ImageDataset]:
    """Refuses what cannot work before anything is written: everything must be there and fit each other.

    Returns:
        Teacher and data.
    """
    teacher, data = load_precond(config.teacher), open_data(config)
    weights_found(config)
    check_fit(config, teacher, data, world_size=world_size)
    check_unchanged(config, teacher, data)
    if config.student not in INITS:
        build_student(config, teacher)
    return teacher, data


def check_unchanged(config: TrainConfig, teacher: Precond, data: ImageDataset) -> None:
    """Refuses to continue a run with another teacher, or other images, than it began with."""
    config.check_images(data.manifest.sha256)
    known = read_object(config.run_dir / "provenance.json")
    if "teacher_sha256" in known and known["teacher_sha256"] != hash_tensors(teacher.state_dict()):
        raise config.other_run("teacher", "weights")


def check_fit(config: TrainConfig, teacher: Precond, data: ImageDataset, *, world_size: int = 1) -> None:
    """Refuses a teacher, data, mask, batch and discriminator that do not fit each other; nothing is built."""
    if teacher.label_dim and not data.classes:
        raise GddlabError(
            f"teacher {config.teacher!r} is conditional with {teacher.label_dim} classes, data {config.data!r} has no "
            "labels: give labelled data (`gddlab prepare` makes it from class folders)"
        )
    for what, a, b in (
        ("resolution", teacher.img_resolution, data.resolution),
        ("channels", teacher.img_channels, data.channels),
        ("classes", teacher.label_dim, data.classes if teacher.label_dim else 0),
    ):
        if a != b:
            raise GddlabError(
                f"teacher {config.teacher!r} has {what} {a}, data {config.data!r} has {b}: give a pair that fits"
            )
    if config.batch % world_size:
        raise GddlabError(f"batch={config.batch} on {world_size} processes: give a multiple of {world_size}")
    if config.cuda_graph and (world_size > 1 or chosen_device(config.device).type == "cpu"):
        here = "the CPU" if world_size == 1 else f"{world_size} processes"
        raise GddlabError(f"cuda_graph=True on {here}: it needs one process on a GPU, give cuda_graph=False")
    part = config.batch // world_size
    held = config.batch_per_device or part
    if part % held:
        raise GddlabError(
            f"batch={config.batch} on {world_size} processes is {part} each, batch_per_device={held}: "
            f"give a divisor of {part}"
        )
    if config.discriminator is not None:
        config.discriminator.check(teacher, batch=config.batch, held=held)
    with torch.device("meta"):
        student = make_student(teacher, mid_sigmas=config.mid_sigmas, init="scratch")
    if config.mask is not None:
        config.mask.apply(student)
        if not any(p.requires_grad for p in student.parameters()):
            raise GddlabError("the mask freezes every parameter: nothing is left to train")


def given_student(path: str) -> OneStepPrecond:
    """A student by the path of its file or run."""
    file = Path(path)
    return load_student(file.parent, file) if file.suffix == ".safetensors" else load_student(file)


def build_student(config: TrainConfig, teacher: Precond) -> OneStepPrecond:
    """The student with its mask applied; layers added for a second time are always trained."""
    second = config.instance is not None and config.instance.target_time
    init = config.student if config.student in INITS else "teacher"
    g = make_student(teacher, target_time=second, mid_sigmas=config.mid_sigmas, init=init).eval()
    if config.student not in INITS:
        given = given_student(config.student)
        given = given if second else without_target(given)
        added = {k: v for k, v in g.state_dict().items() if k.startswith(TARGET)}  # where only this run has a target
        try:
            g.load_state_dict(added | given.state_dict())
        except RuntimeError as e:
            reason = str(e).splitlines()[-1].strip()
            raise GddlabError(f"student={config.student!r} is another network than this run's: {reason}") from None
    if config.mask is None:
        g.requires_grad_(True)
    else:
        config.mask.apply(g)
    return g


def build_step(config: TrainConfig, teacher: Precond, world: World) -> tuple[GanStep, OneStepPrecond]:
    """The step with student, discriminator and losses, and the student's average.

    On their device, seeded, sharded and compiled as the configuration asks.
    """
    dtype = DTYPES[config.precision]
    torch.manual_seed(config.seed)
    d = None
    if config.discriminator is not None:
        d = config.discriminator.build(teacher, exact=config.precision == "float64")
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
    if config.instance is not None:
        instance = config.instance.build(teacher, device=world.device, dtype=dtype)
    augment = None if config.augment is None else config.augment.build(world)
    step = GanStep(config, g, d, world, instance=instance, augment=augment)
    if config.compile:
        g.compile()
    return step, ema
