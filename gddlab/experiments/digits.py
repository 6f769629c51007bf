"""The experiments on the embedded digits, in the order in which they are run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gddlab.distill.augment import Augment
from gddlab.distill.lpips import LPIPS
from gddlab.distill.stylegan2 import StyleGAN2
from gddlab.distill.teacher import TeacherConfig
from gddlab.experiments.experiment import Experiment, ExperimentList, Judge, MaskInputs, TeacherRun
from gddlab.experiments.factorial import FACTORIAL, best_frozen, effects, groups, mask_of, row_mask
from gddlab.experiments.masks import free
from gddlab.experiments.questions import OWN_RATE, PRIMARY, QUESTIONS, RATES
from gddlab.experiments.rows import INSTANCE, Rows
from gddlab.experiments.studies import AT, MIDS, STUDIES
from gddlab.freezing import FreezeMask

TRAIN, HELD_OUT = "digits:train", "digits:held-out"
RANDOM = "random weights, since its ImageNet weights are in no package"
IMAGES = (50, 100, 200, 599)
"""Distinct images trained on; all are 1,198."""
RANDOM_SHARES = (20, 40, 60, 70, 88, 95, 99.6)
"""Shares of the parameters frozen at random, per cent, beside 0, 50 and 80."""
ORDERED_SHARES = (40, 60, 95)
"""The same in the rule's order, beside 0, the rule's 80, options 2 and 3, and norms alone trained."""
EARLY_KIMG = (5, 20, 80)
"""Ages of teachers, thousands of images; the teacher's is 160, and 0 is from random weights."""
STEPS = (2, 4, 8)
"""Heun steps of teachers that are copied, beside 16."""
OTHER_TEACHERS = (1, 2)
"""Seeds of the other teachers."""


def random_backbone(name: str) -> dict[str, Any]:
    return {"discriminator": {"backbones": (name,), "weights": {name: "random"}}}


def teacher(name: str, what: str, **fields: Any) -> TeacherRun:
    def configure(run_dir: Path) -> TeacherConfig:
        return TeacherConfig(run_dir=run_dir, half=True, **fields)

    return TeacherRun(name, what, configure, 7 * fields.get("total_kimg", 160))


TEACHERS = (
    # from there on its learning rate falls
    teacher("early", "the bundled teacher's first half", keep_kimg=EARLY_KIMG, total_kimg=80, lr_rampdown=0),
    teacher("low", "trained at sigma 0.002 to 0.5 alone", uniform_share=1, uniform_sigmas=(0.002, 0.5), total_kimg=80),
    *(teacher(f"seed-{s}", f"as the bundled teacher, seed {s}", seed=s) for s in OTHER_TEACHERS),
)

COMPARED = (*(f"random-{p}" for p in ORDERED_SHARES), *(f"ordered-{p}" for p in ORDERED_SHARES))
FEWER = (*RATES, "option-2", "option-3", "norms-only", *(f"second-step-{mid:g}" for mid in MIDS))
COUNTED = {name: {"seeds": 3} for name in (*FEWER, "rcd-then-gdd", "gdd-then-rcd", "scratch-augment")}
# more for two of these rates
COUNTED |= {name: {"seeds": 10, "longer": 3} for name in ("gdd-i", OWN_RATE, "random-50")}
COUNTED |= {name: {"seeds": 10} for name in ("random-80", "random-50-lr-0.0004")}
COUNTED |= {name: {"seeds": 6, "longer": 2} for name in ("gdd", "scratch")}
COUNTED |= {name: {"seeds": 3, "longer": 2 if name in ("pd", "rcd") else 1} for name in INSTANCE}
COUNTED |= {"gdd-cd": {"seeds": 1}} | {name: {"seeds": 6} for name in COMPARED}  # five beside the one that chose
"""Training seeds of arms where they are not five, and how many of them are followed for longer; rows may say fewer."""
row = Rows("digits", at=(AT,), long=(6, AT, 24, 40), seeds=5, counted=COUNTED, sec_per_kimg=15.0, sec_scores=30.0)
COPYING: dict[str, Any] = {"distance": "lite0", "reuse_fakes": False}
LR = row.base.lr_g
OWN: dict[str, Any] = {"mask": free, "lr_g": LR / 4}
"""GDD at its own learning rate, `OWN_RATE`, wherever one thing is changed in it."""
STILL = 1e-12
"""A learning rate of the student at which it stays the teacher."""


def teachers_rows() -> tuple[Experiment, ...]:
    """Students of other teachers, and from other weights; GDD at its own learning rate."""
    early = (
        row(
            f"age-{k}",
            f"GDD from the teacher after {k} kimg",
            teacher=f"teachers/early/snapshots/{k}.safetensors",
            **OWN,
        )
        for k in EARLY_KIMG
    )
    other = (
        row(f"{name}-teacher-{s}", f"{name.upper()} from a teacher of seed {s}", seeds=3, **how, **_of(f"seed-{s}"))
        for s in OTHER_TEACHERS
        for name, how in (("gdd", OWN), ("gdd-i", {}))
    )
    fixed = Augment(ops=("color", "translation", "cutout"))
    return (
        *early,
        row("shuffled", "GDD from the teacher's weights in random order", student="shuffled", **OWN),
        row("from-high", "GDD from the teacher that has seen sigma 80, digits-high", teacher="digits-high", **OWN),
        row("from-low", "GDD from a network trained at sigma 0.002 to 0.5 alone", **_of("low"), **OWN),
        *(
            row(
                f"scratch-lr-{LR * f:g}",
                f"from random weights, learning rates {LR * f:g}",
                mask=free,
                seeds=2,
                **fields,
            )
            for f in (0.25, 2)
            for fields in (_scratch(LR * f),)
        ),
        row("scratch-augment", "from random weights, with augmentation", mask=free, student="scratch", augment=fixed),
        *other,
    )


def _of(name: str) -> dict[str, Any]:
    return {"teacher": f"teachers/{name}/teacher.safetensors"}


def _scratch(lr: float) -> dict[str, Any]:
    return {"student": "scratch", "lr_g": lr, "lr_d": lr}


def copying_rows() -> tuple[Experiment, ...]:
    """Losses that copy the teacher, at their best of three learning rates, and with fewer steps of the teacher."""
    slower = {"ctm": 2.6, "pd": 1.4, "cd": 1.5, "gdd-cd": 1.7}
    rates = (
        row.copying(
            name,
            steps=16,
            called=f"{name}-lr-{LR * f:g}",
            what=f", learning rate {LR * f:g}",
            lr_g=LR * f,
            seeds=1,
            **more,
        )
        for name in INSTANCE
        for f in (0.5, 2)
        for more in ({"slower": slower.get(name, 1.0), **COPYING},)
    )
    steps = (
        row.copying("rcd", steps=n, called=f"rcd-{n}", what=f", the teacher in {n} steps", seeds=2, **COPYING)
        for n in STEPS
    )
    return (
        *row.baselines(steps=16, slower=slower, **COPYING),
        *rates,
        *steps,
        row("rcd-then-gdd", f"GDD from RCD's student after {AT} kimg", start=("rcd", AT), **OWN),
        row.copying(
            "rcd",
            steps=16,
            called="gdd-then-rcd",
            what=f", from GDD's after {AT} kimg",
            start=(OWN_RATE, AT),
            **COPYING,
        ),
    )


def factorial_rows() -> tuple[Experiment, ...]:
    """At half of the preset's learning rate, where training all and a fifth are about as near (fd-lite2 78, 72).

    Then the mask that the rows foretell as best at half the share, and the one that freezes the other groups.
    """
    rows = tuple(
        row(
            name,
            f"row {i} of the factorial over groups of layers; learning rate {LR / 2:g}",
            mask=lambda measured, seed: row_mask(measured.result, seed),
            seeds=(i,),
            lr_g=LR / 2,
        )
        for i, name in enumerate(FACTORIAL)
    )

    def best(measured: MaskInputs) -> list[str]:
        return best_frozen(effects(measured.runs, measured.result, PRIMARY, at=AT))

    def chosen(measured: MaskInputs, seed: int) -> FreezeMask:
        return mask_of(measured.result, best(measured))

    def inverse(measured: MaskInputs, seed: int) -> FreezeMask:
        return mask_of(measured.result, {*groups(measured.result)} - {*best(measured)})

    fresh: dict[str, Any] = {"seeds": tuple(range(100, 110)), "lr_g": LR / 2, "after": FACTORIAL}
    return (
        *rows,
        row("chosen", "the half frozen that the factorial predicts as best", mask=chosen, **fresh),
        row("chosen-inverse", "the other half frozen", mask=inverse, **fresh),
    )


def discriminator_rows() -> tuple[Experiment, ...]:
    small = StyleGAN2(channel_max=64)
    lpips = LPIPS(net="squeeze", weights="random", input_size=64)
    deit = random_backbone("deit_base_distilled_patch16_224")
    return (
        row(
            "stylegan2",
            "GDD-I with StyleGAN2's discriminator from scratch, at most 64 channels wide",
            discriminator=small,
        ),
        row(
            "lpips-random",
            f"GDD-I with the LPIPS network (SqueezeNet) as discriminator, {RANDOM}",
            seeds=1,
            discriminator=lpips,
        ),
        row("lite0-64", "GDD-I with EfficientNet-lite0 at 64 pixels", discriminator={"input_size": 64}, slower=1.6),
        row(
            "lite0-random",
            "GDD-I with random weights of EfficientNet-lite0",
            **random_backbone("tf_efficientnet_lite0"),
        ),
        row("vgg16-random", f"GDD-I with VGG16-BN, {RANDOM}", seeds=1, **random_backbone("vgg16_bn")),
        row("deit-random", f"GDD-I with DeiT-B, {RANDOM}", seeds=1, slower=4.0, **deit),
    )


EXPERIMENTS: tuple[Experiment, ...] = (
    *row.central(),
    *row.step_sizes((0.25, 0.5)),
    *row.step_sizes((0.125,), ("gdd",)),  # each at four rates, around its best
    *row.step_sizes((2,), ("gdd-i", "random-50")),
    *copying_rows(),
    *row.dose(RANDOM_SHARES, ORDERED_SHARES),
    row(
        "warm",
        "the discriminator alone is trained, on the teacher's one-step images",
        mask=free,
        seeds=1,
        lr_g=STILL,
        total_kimg=2,
        snapshot_kimg=2,
    ),
    *factorial_rows(),
    *teachers_rows(),
    *row.few_images(IMAGES, gdd=OWN),
    *(
        row(
            f"{name}-other-images",
            f"{name.upper()} on 599 images that the teacher has not seen",
            data=HELD_OUT,
            **how,
        )
        for name, how in (("gdd-i", {}), ("gdd", OWN))
    ),
    *row.controls(MIDS),
    row("fresh-fakes", "GDD-I with fresh images in the discriminator step, as the paper has it", reuse_fakes=False),
    *row.augmented(ada_kimg=10, discriminator={"cache_real": False}),
    *discriminator_rows(),
)
DIGITS = ExperimentList(
    "digits",
    TRAIN,
    EXPERIMENTS,
    STUDIES,
    QUESTIONS,
    TEACHERS,
    Judge(own="digits", held_out=HELD_OUT),
    threads=1,
)
