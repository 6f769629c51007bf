"""Presets: functions that return a configuration, one per row of the authors' settings, and one for the digits.

`run_dir` is the folder of the run. Any field of TrainConfig can be given in place of a preset's. A part can be given
whole, `discriminator=StyleGAN2()`, or as a dict of the fields that differ from the preset's own part,
`discriminator={"input_size": 64}`.
Published numbers: FID at 50,000 one-step samples, from arXiv:2405.20750 and its README.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gddlab.distill.config import TrainConfig
from gddlab.distill.parts import Settings
from gddlab.distill.projected import Projected
from gddlab.errors import unknown
from gddlab.files import path_of

PAPER: dict[str, Any] = {
    "seed": 42,
    "loss": "ns",
    "adversarial_weight": 64,
    "r1_gamma": 1e-4,
    "r1_interval": 16,
    "ema_halflife_kimg": 500,
    "ema_rampup": 0.05,
    "batch": 256,
    "precision": "bfloat16",
    "channels_last": True,
}
"""What all of the authors' runs share: no augmentation, no flips, no warm-up of the learning rates.

The memory format is ours: it is exact, and a step on a CPU takes a seventh less time.
"""
CIFAR = PAPER | {
    "data": "cifar10",
    "total_kimg": 5000,
    "lr_g": 1e-4,
    "lr_d": 1e-4,
    "discriminator": Projected(backbones=("vgg16_bn", "tf_efficientnet_lite0"), input_size=224, cout=64),
}
DEIT = PAPER | {
    "total_kimg": 10000,
    "lr_g": 2e-5,
    "lr_d": 4e-5,
    "discriminator": Projected(
        backbones=("deit_base_distilled_patch16_224", "tf_efficientnet_lite0"), input_size=224, cout=64
    ),
}
SMALL: dict[str, Any] = {
    "batch": 16,
    "lr_g": 8e-4,
    "lr_d": 8e-4,
    "adversarial_weight": 64,
    "r1_gamma": 1e-4,
    "ema_halflife_kimg": 2,
    "ema_rampup": 0.2,
    "discriminator": Projected(input_size=32, cout=16, head_width=64, cache_real=True),
    "reuse_fakes": True,
    "tick_kimg": 0.256,
    "checkpoint_kimg": 2,
}
"""What the bundled images share: small enough for a core of a CPU."""
FAST: dict[str, Any] = {"precision": "bfloat16", "precision_d": "bfloat16", "reuse_fakes": True, "channels_last": True}
"""Fast mode: low precision, and generated images computed once instead of twice per step.

It changes the results, so no preset that reproduces has it.
"""


def _made(settings: dict[str, Any], run_dir: str | Path, fields: dict[str, Any]) -> TrainConfig:
    """The configuration with `fields` in place of a preset's `settings`.

    A dict for a part of the same kind, or of no kind, changes only the fields that it names.
    """
    fields = dict(fields)
    for name, given in fields.items():
        part = settings.get(name)
        if isinstance(part, Settings) and isinstance(given, dict):
            own = part.model_dump()
            if given.get("kind", own.get("kind")) == own.get("kind"):
                fields[name] = own | given
    return TrainConfig(run_dir=path_of("run_dir", run_dir), **(settings | fields))


def digits(*, run_dir: str | Path, **fields: Any) -> TrainConfig:
    """GDD-I (with `mask`) or GDD (without) on the embedded digits, on a CPU.

    Reproduces: nothing published; it is this project's example.
    Tested: ten seeds, about three and a half minutes each on one core.
    Launch: `gddlab train digits --mask mask.json --run-dir runs/digits`.
    Expected: fd-lite2@1198 of 71.1 with the rule's mask; without a mask and with lr_g=2e-4, 67.2; 65.4 for the teacher
    in 18 steps (means; notebook 12_main_results).
    """
    return _made(
        SMALL | {"teacher": "digits", "data": "digits:train", "total_kimg": 12, "snapshot_kimg": 4}, run_dir, fields
    )


def emoji(*, run_dir: str | Path, **fields: Any) -> TrainConfig:
    """GDD-I (with `mask`) or GDD (without) on the bundled emoji, in colour, on a CPU.

    Reproduces: nothing published; it is this project's example in colour.
    Tested: three training seeds of the eight arms of `gddlab reproduce emoji`, about five minutes each on one core.
    Launch: `gddlab train emoji --mask mask.json --run-dir runs/emoji`.
    Expected: fd-lite2@2320 of 567 with the rule's mask (three seeds, 505 to 611), 586 for the teacher in 18 steps.

    In pilots of one seed students collapsed by 24 thousand images with the digits' R1, a hundredth of this one, and
    were a third farther where the discriminator saw images at 32 pixels in place of 64.
    """
    own = {"teacher": "emoji", "data": "emoji:train", "total_kimg": 16, "snapshot_kimg": 4, "r1_gamma": 0.01}
    own["discriminator"] = SMALL["discriminator"].model_copy(update={"input_size": 64})
    return _made(SMALL | own, run_dir, fields)


def cifar10(*, run_dir: str | Path, **fields: Any) -> TrainConfig:
    """GDD-I (with `mask`) or GDD (without) on CIFAR-10, unconditional.

    Reproduces: the settings of the paper's CIFAR-10 row (method of GDD; teacher edm-cifar10-32x32-uncond-ve).
    Tested: some steps at full size on a CPU with random backbones; never to the end.
    Launch: `gddlab train cifar10 --mask mask.json --run-dir runs/cifar10 --nproc 4`.
    Expected, published: FID 1.54 with the rule's mask after 5 million images.
    """
    return _made(CIFAR | {"teacher": "edm-cifar10-32x32-uncond-ve"}, run_dir, fields)


def cifar10_cond(*, run_dir: str | Path, **fields: Any) -> TrainConfig:
    """GDD-I or GDD on CIFAR-10, conditional; heads with a learned class embedding, where the authors took ImageNet's.

    Reproduces: the settings of the paper's conditional CIFAR-10 row (teacher edm-cifar10-32x32-cond-ve).
    Tested: some steps at full size on a CPU with random backbones; never to the end.
    Launch: `gddlab train cifar10_cond --mask mask.json --run-dir runs/cifar10-cond --nproc 4`.
    Expected: no published number of GDD-I was verified for it.
    """
    return _made(CIFAR | {"teacher": "edm-cifar10-32x32-cond-ve"}, run_dir, fields)


def afhqv2(*, run_dir: str | Path, **fields: Any) -> TrainConfig:
    """GDD (without `mask`, the better one here) or GDD-I on AFHQv2 at 64 pixels; `data` is made by `gddlab prepare`.

    Reproduces: the settings of the paper's AFHQv2 row (teacher edm-afhqv2-64x64-uncond-ve).
    Tested: some steps at full size on a CPU with random backbones; never to the end.
    Launch: `gddlab train afhqv2 --run-dir runs/afhqv2 --nproc 4`.
    Expected, published: FID 1.23 (GDD), 1.24 (GDD-I), 10 million images.
    """
    return _made(DEIT | {"teacher": "edm-afhqv2-64x64-uncond-ve", "data": "afhqv2-64x64.zip"}, run_dir, fields)


def ffhq(*, run_dir: str | Path, **fields: Any) -> TrainConfig:
    """GDD-I (with `mask`) or GDD (without) on FFHQ at 64 pixels; `data` is made by `gddlab prepare`.

    Reproduces: the settings of the paper's FFHQ row (teacher edm-ffhq-64x64-uncond-ve).
    Tested: some steps at full size on a CPU with random backbones; never to the end.
    Launch: `gddlab train ffhq --mask mask.json --run-dir runs/ffhq --nproc 4`.
    Expected, published: FID 0.85 with the rule's mask, 10 million images.
    """
    return _made(DEIT | {"teacher": "edm-ffhq-64x64-uncond-ve", "data": "ffhq-64x64.zip"}, run_dir, fields)


def imagenet64(*, run_dir: str | Path, **fields: Any) -> TrainConfig:
    """GDD-I (with `mask`) or GDD (without) on ImageNet at 64 pixels, conditional; `data` is an EDM zip with labels.

    Reproduces: the settings of the paper's ImageNet row (teacher edm-imagenet-64x64-cond-adm). The authors initialise
    the heads' class embedding from a file (`discriminator.embedding_file`); without one it is random.
    Tested: some steps at full size on a CPU with random backbones; never to the end.
    Launch: `gddlab train imagenet64 --mask mask.json --run-dir runs/imagenet64 --nproc 4`.
    Expected, published: FID 1.16 with the rule's mask, 10 million images.
    """
    settings = DEIT | {
        "teacher": "edm-imagenet-64x64-cond-adm",
        "data": "imagenet-64x64.zip",
        "batch": 512,
        "lr_g": 8e-6,
        "ema_halflife_kimg": 50000,
        "adversarial_weight": 128,
    }
    return _made(settings, run_dir, fields)


PRESETS = {f.__name__: f for f in (digits, emoji, cifar10, cifar10_cond, afhqv2, ffhq, imagenet64)}
"""By name, as on the command line."""


def preset(name: str, *, run_dir: str | Path, **fields: Any) -> TrainConfig:
    """The preset of a name.

    Raises:
        GddlabError: Unknown name or field, or fields that contradict each other.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name](run_dir=run_dir, **fields)
