"""The experiments on the embedded digits, in the order that the notebooks need them."""

from __future__ import annotations

from typing import Any

from gddlab.distill.lpips import LPIPS
from gddlab.distill.stylegan2 import StyleGAN2
from gddlab.experiments.experiment import Experiment, ExperimentList
from gddlab.experiments.masks import Rows, free
from gddlab.experiments.studies import STUDIES

SMALL: dict[str, Any] = {"input_size": 32}
"""Large backbones see images at 32 pixels, so that a run takes minutes on two cores; so does their control, lite0."""
UNCACHED: dict[str, Any] = {"cache_real": False}
RANDOM = "random weights, since its ImageNet weights are in no package"
IMAGES = (50, 100, 200, 400, 800)
"""Distinct images trained on; all are 1,797."""


def random_backbone(name: str) -> dict[str, Any]:
    return {"discriminator": {"backbones": (name,), "weights": {name: "random"}, **SMALL}}


row = Rows("digits", seconds=100.0, snapshots=4)
EXPERIMENTS: tuple[Experiment, ...] = (
    *row.masks(seconds=90.0, snapshot_kimg=6),
    row("gdd-i-long", "GDD-I for 40 thousand images", total_kimg=40, snapshot_kimg=4, seconds=240.0),
    row("gdd-long", "GDD for 40 thousand images", mask=free, total_kimg=40, snapshot_kimg=4, seconds=270.0),
    *row.controls(),
    row("fresh-fakes", "GDD-I with fresh images in the discriminator step, as the paper has it", reuse_fakes=False),
    *row.augmented(ada_kimg=10, discriminator=UNCACHED),
    row(
        "stylegan2",
        "GDD-I with StyleGAN2's discriminator from scratch, at most 64 channels wide",
        discriminator=StyleGAN2(channel_max=64),
    ),
    row(
        "lpips-random",
        f"GDD-I with the LPIPS network (SqueezeNet) as discriminator, {RANDOM}",
        discriminator=LPIPS(net="squeeze", weights="random", input_size=64),
    ),
    row("lite0-32", "GDD-I with EfficientNet-lite0 at 32 pixels", discriminator=SMALL),
    row("lite0-32-random", "the same with random weights", **random_backbone("tf_efficientnet_lite0")),
    row("vgg16-random", f"GDD-I with VGG16-BN at 32 pixels, {RANDOM}", **random_backbone("vgg16_bn")),
    row(
        "deit-random",
        f"GDD-I with DeiT-B at 32 pixels, {RANDOM}",
        seconds=240.0,
        **random_backbone("deit_base_distilled_patch16_224"),
    ),
    *row.baselines(distance="lite0", steps=16, seconds={"ctm": 300.0, "gdd-cd": 190.0}, reuse_fakes=False),
    *row.few_images(IMAGES, snapshot_kimg=1.5, seconds=130.0),
)
DIGITS = ExperimentList("digits", "digits", EXPERIMENTS, STUDIES)
