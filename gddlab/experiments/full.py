"""The same experiments at full size, for who has the GPUs: CIFAR-10, AFHQv2, FFHQ, ImageNet. None of these has been run here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gddlab.distill import presets
from gddlab.distill.config import TrainConfig
from gddlab.experiments.experiment import Experiment, ExperimentList, Judge, Measured
from gddlab.experiments.feeds import feeds_of
from gddlab.experiments.masks import free, mask_experiments, ruled
from gddlab.experiments.studies import STUDIES
from gddlab.freezing import FreezeMask

__all__ = ["FULL"]

LITE, VGG, DEIT = "tf_efficientnet_lite0", "vgg16_bn", "deit_base_distilled_patch16_224"
JUDGE = Judge("inception", "clip", n=50_000, pairs=5_000)
HOURS_ON_8_A100 = 6.0
"""What the authors need for 5 million images (arXiv:2405.20750); nothing is known of the longer ones, and `gddlab preflight` measures them."""


def configured(preset: str, fields: Mapping[str, Any]) -> Callable[[Path, int, FreezeMask | None], TrainConfig]:
    """A preset with some fields, with ten snapshots on the way; seed s trains with seed 42 + s, and 42 is the authors'."""

    def configure(run_dir: Path, seed: int, mask: FreezeMask | None) -> TrainConfig:
        given = dict(fields)
        total = given.get("total_kimg", presets.preset(preset, run_dir=run_dir).total_kimg)
        return presets.preset(
            preset, run_dir=run_dir, seed=42 + seed, mask=mask, **({"snapshot_kimg": total / 10} | given)
        )

    return configure


def _list(
    preset: str, *, images: tuple[int, ...], instance_steps: int, steps: int, hours: float | None = None
) -> ExperimentList:
    base = presets.preset(preset, run_dir="runs")
    seconds = None if hours is None else hours * 3600
    baseline: dict[str, Any] = {"adversarial_weight": 0, "distance": "lpips", "instance_steps": instance_steps}
    names = {LITE: "lite0", VGG: "vgg16", DEIT: "deit"}

    def row(
        name: str, what: str, *, mask: Callable[[Measured, int], FreezeMask | None] = ruled, **fields: Any
    ) -> Experiment:
        return Experiment(name, what, feeds_of(name), mask, configured(preset, fields), seconds)

    experiments = (
        *mask_experiments(configured(preset, {}), seconds=seconds),
        row("scratch", "GDD from random weights in place of the teacher's", mask=free, student="scratch"),
        row("reuse-fakes", "GDD-I with the images of the generator step in the discriminator step", reuse_fakes=True),
        row("no-r1", "GDD-I without R1", r1_gamma=0),
        row(
            "augment",
            "GDD-I with differentiable colour, translation, cutout",
            augment=("color", "translation", "cutout"),
        ),
        row("ada", "GDD-I with ADA, target 0.6", augment=("bgc",), ada_target=0.6),
        row("two-step", "GDD-I with a second step at sigma 0.8", mid_sigmas=(0.8,)),
        row("stylegan2", "GDD-I with StyleGAN2's discriminator from scratch", discriminator="stylegan2"),
        row("lpips", "GDD-I with the LPIPS network (VGG16) as discriminator", discriminator="lpips"),
        *(
            row(short, f"GDD-I with {name} alone", backbones=(name,))
            for name, short in names.items()
            if name in base.backbones
        ),
        row("pd", "progressive distillation alone, by LPIPS", mask=free, instance="pd", **baseline),
        row("cd", "consistency distillation alone, by LPIPS", mask=free, instance="cd", **baseline),
        row("ctm", "consistency trajectory distillation alone, by LPIPS", mask=free, instance="ctm", **baseline),
        row(
            "rcd",
            "distillation from pure noise to a random level alone, by LPIPS",
            mask=free,
            instance="rcd",
            **baseline,
        ),
        row(
            "gdd-cd",
            "GDD with consistency distillation added",
            mask=free,
            instance="cd",
            distance="lpips",
            instance_steps=instance_steps,
        ),
        *(row(f"images-{n}", f"GDD-I with {n} distinct images", max_images=n) for n in images),
    )
    studies = tuple(replace(s, seconds=None) for s in STUDIES)
    return ExperimentList(base.teacher, base.data, experiments, studies, JUDGE, (1, 2, 4, 6, 8, 10, steps), "8 A100")


FULL: Mapping[str, ExperimentList] = {
    "cifar10": _list(
        "cifar10", images=(1_000, 5_000, 10_000, 25_000), instance_steps=16, steps=18, hours=HOURS_ON_8_A100
    ),
    "afhqv2": _list("afhqv2", images=(1_000, 5_000, 10_000), instance_steps=32, steps=40),
    "ffhq": _list("ffhq", images=(1_000, 5_000, 20_000), instance_steps=32, steps=40),
    "imagenet64": _list("imagenet64", images=(10_000, 100_000, 500_000), instance_steps=32, steps=40),
}
"""By name, as on the command line."""
