"""The experiments on the embedded digits, in the order that the notebooks need them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gddlab.distill import presets
from gddlab.distill.config import TrainConfig
from gddlab.experiments.experiment import Experiment, ExperimentList, Measured
from gddlab.experiments.feeds import feeds_of
from gddlab.experiments.masks import free, mask_experiments, ruled
from gddlab.experiments.studies import STUDIES
from gddlab.freezing import FreezeMask

__all__ = ["DIGITS"]

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
IMAGES = (50, 100, 200, 400, 800)
"""Distinct images trained on; all are 1,797."""


def configured(**fields: Any) -> Callable[[Path, int, FreezeMask | None], TrainConfig]:
    """The digits preset with some fields, scored four times on the way."""

    def configure(run_dir: Path, seed: int, mask: FreezeMask | None) -> TrainConfig:
        return presets.digits(run_dir=run_dir, seed=seed, mask=mask, **({"snapshot_kimg": 3} | fields))

    return configure


def row(
    name: str,
    what: str,
    *,
    mask: Callable[[Measured, int], FreezeMask | None] = ruled,
    seconds: float = 100.0,
    **fields: Any,
) -> Experiment:
    return Experiment(name, what, feeds_of(name), mask, configured(**fields), seconds)


def random_backbone(name: str) -> dict[str, Any]:
    return {"backbones": (name,), "backbone_weights": {name: "random"}, **SMALL}


EXPERIMENTS: tuple[Experiment, ...] = (
    *mask_experiments(configured(), others=configured(snapshot_kimg=6), seconds=90.0),
    row("gdd-i-long", "GDD-I for 40 thousand images", total_kimg=40, snapshot_kimg=4, seconds=240.0),
    row("gdd-long", "GDD for 40 thousand images", mask=free, total_kimg=40, snapshot_kimg=4, seconds=270.0),
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
    row("vgg16-random", f"GDD-I with VGG16-BN at 32 pixels, {RANDOM}", **random_backbone("vgg16_bn")),
    row(
        "deit-random",
        f"GDD-I with DeiT-B at 32 pixels, {RANDOM}",
        seconds=240.0,
        **random_backbone("deit_base_distilled_patch16_224"),
    ),
    row("pd", "progressive distillation alone, by the lite0 distance", mask=free, instance="pd", **BASELINE),
    row("cd", "consistency distillation alone, by the lite0 distance", mask=free, instance="cd", **BASELINE),
    row(
        "ctm",
        "consistency trajectory distillation alone, by the lite0 distance",
        mask=free,
        instance="ctm",
        seconds=200.0,
        **BASELINE,
    ),
    row(
        "rcd",
        "distillation from pure noise to a random level alone, by the lite0 distance",
        mask=free,
        instance="rcd",
        **BASELINE,
    ),
    row("gdd-cd", "GDD with consistency distillation added", mask=free, instance="cd", distance="lite0", seconds=150.0),
    *(
        row(f"images-{n}", f"GDD-I with {n} distinct images", max_images=n, snapshot_kimg=1.5, seconds=130.0)
        for n in IMAGES
    ),
)
DIGITS = ExperimentList("digits", "digits", EXPERIMENTS, STUDIES)
