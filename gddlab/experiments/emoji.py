"""The experiments on the emoji, in colour: a smaller form of those on the digits."""

from __future__ import annotations

from gddlab.experiments.experiment import Experiment, ExperimentList, Judge, Question
from gddlab.experiments.masks import at_share
from gddlab.experiments.questions import BESIDE, OWN_RATE, PRIMARY, versus
from gddlab.experiments.rows import Rows
from gddlab.experiments.studies import STUDIES

AT = 16
"""Thousands of images that every student of the emoji sees."""
OF_TEACHER = ("teacher-steps", "known-cases")
COUNTED = {name: {"longer": 1} for name in ("gdd-i", OWN_RATE)}
row = Rows(
    "emoji",
    at=(AT,),
    long=(8, AT, 32),
    seeds=5,
    counted=COUNTED,
    first_seed=1,  # with 0 R1 and the discriminator's size were chosen
    sec_per_kimg=16.0,
    sec_scores=60.0,
)
EXPERIMENTS: tuple[Experiment, ...] = (
    *row.central(),
    *row.step_sizes((0.25,), ("gdd",)),
    row("random-20", "20 % of the parameters frozen, at random", mask=at_share(0.2)),
    row.copying("rcd", steps=16, distance="lite0", reuse_fakes=False),
)
QUESTIONS = (
    Question(
        "26_emoji",
        "Does what was found on the digits hold for emoji in colour? A GAN loss alone against the teacher in 18 steps, "
        "freezing by the rule against training everything and against random masks of three shares, copying, random "
        "weights.",
        arms=("gdd-i", OWN_RATE, "gdd", "random-20", "random-50", "random-80", "rcd", "scratch"),
        contrasts=(
            *versus(OWN_RATE, "gdd-i", "gdd", "rcd", "scratch"),
            *versus("random-80", "gdd-i", "random-20", "random-50"),
        ),
        primary=PRIMARY,
        also=tuple(metric.replace("digits", "emoji") for metric in BESIDE),
        at=AT,
        since="30 November 2026: pilots, with a seed that is not among these, had shown that students collapse with "
        "the R1 of the digits and not with a hundred times as much, and that 64 pixels suit the discriminator",
        studies=OF_TEACHER,
    ),
    Question(
        "24_editing",
        "What is a one-step student of the emoji good for? Its completions against the teacher's, as on the digits.",
        arms=("gdd-i",),
        studies=("completed",),
    ),
)
EMOJI = ExperimentList(
    "emoji",
    "emoji:train",
    EXPERIMENTS,
    tuple(study for study in STUDIES if study.name in (*OF_TEACHER, "completed")),
    QUESTIONS,
    judge=Judge(own="emoji", held_out="emoji:held-out"),
    threads=1,
)
