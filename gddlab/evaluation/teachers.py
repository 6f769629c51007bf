"""Scores of a teacher by number of steps, kept beside its weights."""

from __future__ import annotations

from pathlib import Path

from gddlab.evaluation.records import Record
from gddlab.evaluation.scoring import evaluate, real_split
from gddlab.files import write_json
from gddlab.sampling import sample, save_grid
from gddlab.teachers import load_teacher

__all__ = ["STEPS", "score_teacher"]

STEPS = (1, 5, 18)
"""Heun steps at which teachers are scored and shown."""


def score_teacher(run_dir: str | Path, *, n: int | None = None, progress: bool = True) -> list[Record]:
    """Frechet and kernel distance at 1, 5 and 18 Heun steps, and of two halves of the real set.

    Writes scores.json (shown on the card from then on) and samples-STEPS.png, 64 images of seeds 0 to 63, into `run_dir`.

    Args:
        run_dir: Run directory of `train_teacher`, or a folder with a teacher.safetensors.
        n: Images; as many as there are real ones if None.
        progress: Shows bars when at a terminal.

    Returns:
        The records, those of the teacher first.
    """
    folder = Path(run_dir)
    teacher = load_teacher(folder)
    records: list[Record] = []
    for steps in STEPS:
        save_grid(sample(teacher, 64, steps=steps), folder / f"samples-{steps}.png", columns=8, scale=1)
        records += evaluate(teacher, n=n, steps=steps, progress=progress)
    records += real_split(teacher.card.data, progress=progress)
    write_json(folder / "scores.json", [r.to_dict() for r in records])
    return records
