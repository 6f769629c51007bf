"""The same experiments at full size, for those who have GPUs: CIFAR-10, AFHQv2, FFHQ, ImageNet. None has been run."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from gddlab.distill.lpips import LPIPS
from gddlab.distill.stylegan2 import StyleGAN2
from gddlab.experiments.experiment import ExperimentList, Judge, Question
from gddlab.experiments.questions import OWN_RATE, QUESTIONS
from gddlab.experiments.rows import Rows
from gddlab.experiments.studies import STUDIES

BACKBONES = {"tf_efficientnet_lite0": "lite0", "vgg16_bn": "vgg16", "deit_base_distilled_patch16_224": "deit"}
JUDGE = Judge("inception", ("clip",), n=50_000, blocks=3, pairs=5_000)
SCORES = {
    "fd-lite2": "fid-min3",
    "fd-lite0": "clip-fid",
    "kd-lite2": "kid",
    "precision-lite2": "precision",
    "recall-lite2": "recall",
}
"""The scores of the digits' questions -> what they are here; others need images held out, or a judge of the data."""
HOURS_ON_8_A100 = 6.0
"""What the authors need for 5 million images (arXiv:2405.20750); `gddlab preflight` measures the longer ones."""
NUMBER = re.compile(r"[\d.]+(e-?\d+)?$")
"""What may end the name of an arm: a share, a count, a rate."""
DIGITS_ALONE = ("completed", "pulls")
"""Studies that need images held out, and a run of the digits' list."""


def _asked(question: Question, names: Collection[str]) -> Question:
    """A question of the digits, asked of a list at full size: by its scores, of its shares and counts, at the end."""
    primary, also = (tuple(SCORES[m] for m in given if m in SCORES) for given in (question.primary, question.also))
    arms = dict.fromkeys(own for arm in question.arms for own in _at_full_size((arm,), names))
    pairs = dict.fromkeys(own for pair in question.contrasts for own in _at_full_size(pair, names))
    contrasts = tuple((a, b) for a, b in pairs if a != b)
    asked = replace(question, arms=tuple(a for (a,) in arms), contrasts=contrasts, primary=primary, also=also)
    return replace(asked, at=None, since="", chosen_by=())


def _at_full_size(arms: tuple[str, ...], names: Collection[str]) -> list[tuple[str, ...]]:
    """What arms of the digits, compared with each other, are in another list.

    GDD has one learning rate there, the digits' own is of the digits. Where a number that ends a name is the digits'
    alone, such as that of few images, those of the list stand in its place, the same in all arms.
    """
    same = tuple("gdd" if arm == OWN_RATE else arm for arm in arms)
    if all(arm in names for arm in same):
        return [same]
    stems = [None if arm in names else NUMBER.sub("", arm) for arm in same]
    ends = [NUMBER.search(name) for name in names]
    numbers = dict.fromkeys(found[0] for found in ends if found)
    made = [tuple(a if stem is None else f"{stem}{n}" for a, stem in zip(same, stems, strict=True)) for n in numbers]
    return [own for own in made if all(arm in names for arm in own)]


def _list(
    preset: str, *, images: tuple[int, ...], instance_steps: int, steps: int, hours: float | None = None
) -> ExperimentList:
    # 42 is the authors' seed; the loss of each baseline takes longer than the GAN loss by an unknown factor
    seconds = None if hours is None else hours * 3600 / 5000
    row = Rows(preset, snapshots=10, first_seed=42, sec_per_kimg=seconds)
    base = row.base
    experiments = (
        *row.central(),
        *row.dose((10, 20, 40, 60, 95), (40,)),
        *row.step_sizes((0.5, 2)),
        *row.baselines(distance="lpips", steps=instance_steps, slower={}),
        *row.few_images(images),
        *row.controls(),
        row("reuse-fakes", "GDD-I with the images of the generator step in the discriminator step", reuse_fakes=True),
        *row.augmented(ada_kimg=500),
        row("stylegan2", "GDD-I with StyleGAN2's discriminator from scratch", discriminator=StyleGAN2()),
        row("lpips", "GDD-I with the LPIPS network (VGG16) as discriminator", discriminator=LPIPS()),
        *(
            row(BACKBONES[name], f"GDD-I with {name} alone", discriminator={"backbones": (name,)})
            for name in (base.discriminator.networks() if base.discriminator else ())
        ),
    )
    names = [e.name for e in experiments]
    studies = tuple(replace(s, seconds=None, at=None) for s in STUDIES if s.name not in DIGITS_ALONE)
    return ExperimentList(
        base.teacher,
        base.data,
        experiments,
        studies,
        tuple(asked for q in QUESTIONS if (asked := _asked(q, names)).contrasts or not q.contrasts),
        judge=JUDGE,
        steps=(1, 2, 4, 6, 8, 10, steps),
        machine="8 A100",
    )


FULL: Mapping[str, ExperimentList] = {
    "cifar10": _list(
        "cifar10", images=(1_000, 5_000, 10_000, 25_000), instance_steps=16, steps=18, hours=HOURS_ON_8_A100
    ),
    "afhqv2": _list("afhqv2", images=(1_000, 5_000, 10_000), instance_steps=32, steps=40),
    "ffhq": _list("ffhq", images=(1_000, 5_000, 20_000), instance_steps=32, steps=40),
    "imagenet64": _list("imagenet64", images=(10_000, 100_000, 500_000), instance_steps=32, steps=40),
}
"""By name, as on the command line."""
