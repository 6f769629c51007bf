"""Experiments on the embedded digits: initialisation, discriminators, augmentation and R1, students of two steps, instance-based baselines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gddlab.distill import presets
from gddlab.distill.config import TrainConfig
from gddlab.experiments.experiment import Experiment, Measured
from gddlab.freezing import FreezeMask

__all__ = ["TRAINING"]

LITE = "tf_efficientnet_lite0"
SMALL: dict[str, Any] = {"input_size": 32}
"""Large backbones see images at 32 pixels, so that a run stays a matter of minutes on two cores; so does their control, lite0."""
RANDOM = "random weights, since its ImageNet weights are in no package"
BASELINE: dict[str, Any] = {
    "adversarial_weight": 0,
    "reuse_fakes": False,
    "cache_real": False,
    "distance": "lite0",
    "instance_steps": 16,
}


def preset(**fields: Any) -> Callable[[Path, int, FreezeMask | None], TrainConfig]:
    """The digits preset with some fields, scored four times on the way."""

    def configure(run_dir: Path, seed: int, mask: FreezeMask | None) -> TrainConfig:
        return presets.digits(run_dir=run_dir, seed=seed, mask=mask, **({"snapshot_kimg": 3} | fields))

    return configure


def ruled(measured: Measured, seed: int) -> FreezeMask | None:
    return measured.rule


def free(measured: Measured, seed: int) -> FreezeMask | None:
    return None


def row(
    name: str,
    what: str,
    *,
    mask: Callable[[Measured, int], FreezeMask | None] = ruled,
    seconds: float = 250.0,
    **fields: Any,
) -> Experiment:
    return Experiment(name, what, (), mask, preset(**fields), seconds=seconds)


TRAINING: tuple[Experiment, ...] = (
    row("scratch", "GDD from random weights in place of the teacher's", mask=free, student="scratch"),
    row("fresh-fakes", "GDD-I with fresh images in the discriminator step, as the paper has it", reuse_fakes=False),
    row("no-r1", "GDD-I without R1", r1_gamma=0),
    row(
        "augment",
        "GDD-I with differentiable colour, translation, cutout",
        augment=("color", "translation", "cutout"),
        cache_real=False,
    ),
    row(
        "ada",
        "GDD-I with ADA, target 0.6, at most from 0 to 1 in 10 kimg",
        augment=("bgc",),
        ada_target=0.6,
        ada_kimg=10,
        cache_real=False,
    ),
    row("two-step", "GDD-I with a second step at sigma 0.8", mid_sigmas=(0.8,)),
    row(
        "stylegan2",
        "GDD-I with StyleGAN2's discriminator from scratch, at most 64 channels wide",
        discriminator="stylegan2",
        cache_real=False,
    ),
    row(
        "lpips-random",
        f"GDD-I with the LPIPS network (SqueezeNet) as discriminator, {RANDOM}",
        discriminator="lpips",
        lpips_net="squeeze",
        discriminator_weights="random",
        cache_real=False,
    ),
    row("lite0-32", "GDD-I with EfficientNet-lite0 at 32 pixels", **SMALL),
    row("lite0-32-random", "the same with random weights", backbone_weights={LITE: "random"}, **SMALL),
    row(
        "vgg16-random",
        f"GDD-I with VGG16-BN at 32 pixels, {RANDOM}",
        backbones=("vgg16_bn",),
        backbone_weights={"vgg16_bn": "random"},
        **SMALL,
    ),
    row(
        "deit-random",
        f"GDD-I with DeiT-B at 32 pixels, {RANDOM}",
        backbones=("deit_base_distilled_patch16_224",),
        backbone_weights={"deit_base_distilled_patch16_224": "random"},
        **SMALL,
    ),
    row("pd", "progressive distillation alone, by the lite0 distance", mask=free, instance="pd", **BASELINE),
    row("cd", "consistency distillation alone, by the lite0 distance", mask=free, instance="cd", **BASELINE),
    row(
        "ctm", "consistency trajectory distillation alone, by the lite0 distance", mask=free, instance="ctm", **BASELINE
    ),
    row(
        "rcd",
        "distillation from pure noise to a random level alone, by the lite0 distance",
        mask=free,
        instance="rcd",
        **BASELINE,
    ),
    row("gdd-cd", "GDD with consistency distillation added", mask=free, instance="cd", distance="lite0"),
)
