"""The central experiments again on pictures in colour, the emoji that come with gddlab."""

from __future__ import annotations

from typing import Any

from gddlab.experiments.experiment import ExperimentList, Judge
from gddlab.experiments.masks import at_share
from gddlab.experiments.questions import QUESTIONS
from gddlab.experiments.rows import Rows
from gddlab.experiments.studies import STUDIES

TRAIN, HELD_OUT = "emoji:train", "emoji:held-out"
COPYING: dict[str, Any] = {"distance": "lite0", "reuse_fakes": False}
SEEDS = 5

row = Rows("emoji", at=(6, 12), seeds=SEEDS, sec_per_kimg=40.0, sec_scores=60.0)
EMOJI = ExperimentList(
    "emoji",
    TRAIN,
    (
        *row.central(),
        row("random-95", "95 % of the parameters frozen, at random", mask=at_share(0.95)),
        row.copying("rcd", steps=16, **COPYING),
    ),
    tuple(study for study in STUDIES if study.name in ("teacher-steps",)),
    QUESTIONS,
    judge=Judge(own="emoji", held_out=HELD_OUT),
    threads=1,
)
