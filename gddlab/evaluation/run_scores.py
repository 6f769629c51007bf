"""Scores over a run, each student once: during training, at every snapshot, at the end; scores of a teacher."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gddlab.datasets import Source, data_of, name_and_part, open_dataset
from gddlab.distill.config import TrainConfig
from gddlab.distill.distributed import World
from gddlab.errors import GddlabError
from gddlab.evaluation.evaluate import evaluate, real_split
from gddlab.evaluation.extractors import find_extractor
from gddlab.evaluation.metrics import DISTANCES, names_of
from gddlab.evaluation.records import Record, append_records, label_of, least_name, load_records, scores_of
from gddlab.files import path_of, write_json
from gddlab.runs import Run, load_run
from gddlab.runtime import chosen_device
from gddlab.sampling import sample, save_grid
from gddlab.teachers import load_precond

if TYPE_CHECKING:
    from gddlab.distill.trainer import Score


def evaluate_snapshots(
    run: Run,
    *,
    data: str | None = None,
    extractor: str | Path = "lite2",
    n: int | None = None,
    nproc: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[tuple[float, Record]]:
    """The student's Frechet distance at every snapshot after the start; scores already in evaluation.jsonl are reused.

    Args:
        run: A run directory.
        data, extractor, n, nproc: As for `evaluate`.
        say: Called with one line per new score.

    Returns:
        (thousands of images, record), oldest first.
    """
    metric = find_extractor(extractor).metric_name("fid")
    known = _known(run.run_dir, run.config, metric, n, data=data)
    out: list[tuple[float, Record]] = []
    for path in run.snapshots():
        net = run.student(path)
        kimg = net.card.kimg
        if not kimg:
            continue
        record = known.get(net.card.sha256)
        if record is None:
            how: dict[str, Any] = {"n": n, "extractor": extractor, "nproc": nproc, "progress": False}
            record = evaluate(net.to(chosen_device()), data=data, metrics=("fid",), **how).record(metric)
            append_records(run.run_dir, [record])
            say(f"evaluate  {kimg:6.2f} kimg: {record.metric} {record.value:.1f}")
        out.append((kimg, record))
    return out


def missing_scores(
    run: Run,
    metrics: Sequence[str],
    *,
    kimg: float | None = None,
    data: str | None = None,
    extractor: str | Path = "lite2",
    n: int | None = None,
    blocks: int = 1,
) -> list[str]:
    """The metrics that have no record of a student; of several blocks, a distance needs its least.

    Args:
        run: A run directory.
        metrics, data, extractor, blocks: As for `evaluate`.
        kimg: Thousands of images after which the student was kept; None for the final one.
        n: Number of images; None for any.
    """
    kimg = run.config.end_kimg if kimg is None else kimg
    scored = scores_of(load_records(run.run_dir), run.config, data=data or run.config.data, n=n)
    have = {r.label for r in scored if r.kimg is not None and math.isclose(r.kimg, kimg)}
    part = None if data is None else name_and_part(data)[1]

    def missing(kind: str) -> bool:
        name = find_extractor(extractor).metric_name(kind)
        return label_of(least_name(name, blocks) if blocks > 1 and kind in DISTANCES else name, part) not in have

    return [m for m in metrics if any(map(missing, names_of(m)))]


def score_student(
    run: Run,
    metrics: Sequence[str] = ("fid", "kid", "prc"),
    *,
    kimg: float | None = None,
    data: str | None = None,
    extractor: str | Path = "lite2",
    n: int | None = None,
    blocks: int = 1,
    nproc: int | None = None,
) -> list[Record]:
    """Scores a student by the metrics that `missing_scores` names; records go to the run's evaluation.jsonl.

    Args:
        run: A run; its final student needs that it is finished.
        kimg: Thousands of images after which the student was kept; None for the final one.
        metrics, data, extractor, n, blocks, nproc: As for `evaluate`.

    Returns:
        The new records.
    """
    missing = missing_scores(run, metrics, kimg=kimg, data=data, extractor=extractor, n=n, blocks=blocks)
    if not missing:
        return []
    how: dict[str, Any] = {"n": n, "extractor": extractor, "blocks": blocks, "nproc": nproc, "progress": False}
    net = run.student(kimg).to(chosen_device())
    records = list(evaluate(net, data=data, metrics=missing, **how))
    append_records(run.run_dir, records)
    return records


def _known(
    run_dir: Path, config: TrainConfig, metric: str, n: int | None, *, data: str | None = None
) -> dict[str | None, Record]:
    """The scores of a run against `data`, its own if None, at `n` images, at any number if None, by what was scored."""
    data = config.data if data is None else data
    label = label_of(metric, name_and_part(data)[1])
    return {r.model_sha256: r for r in scores_of(load_records(run_dir), config, data=data, n=n) if r.label == label}


def scorer(config: TrainConfig, world: World) -> Score:
    """A function from the file of a student to its score; all ranks call it and share the images.

    Records go to the run's evaluation.jsonl; a student that was scored before the run was interrupted is not scored
    again. The real images are all of the data set (of the classes trained on), also if the run trains on a part of it.

    Raises:
        GddlabError: The extractor is unknown, or its weights are missing.
    """
    spec = find_extractor(config.metric_extractor)
    spec.check()
    metric = spec.metric_name(config.metric)

    def score(file: Path) -> tuple[str, float, float | None]:
        net = load_run(config.run_dir).student(file).to(world.device)
        record = _known(config.run_dir, config, metric, config.metric_n).get(net.card.sha256)
        if record is None:
            how: dict[str, Any] = {"n": config.metric_n, "extractor": config.metric_extractor, "progress": False}
            try:
                record = evaluate(net, metrics=config.metric, **how).record(metric)
            except GddlabError as e:  # images or score are not finite
                sys.stdout.write(f"no score: {e}\n")
                return metric, math.nan, None
            if world.rank == 0:
                append_records(config.run_dir, [record])
        return record.metric, record.value, record.std

    return score


STEPS = (1, 5, 18)
"""Numbers of Heun steps at which teachers are scored and shown."""


def score_teacher(
    run_dir: str | Path, *, data: Source | None = None, n: int | None = None, progress: bool = True
) -> list[Record]:
    """Frechet and kernel distance at 1, 5 and 18 Heun steps, and of two halves of the real set.

    Writes scores.json, which the teacher's card then shows, and samples-STEPS.png, 64 images of seeds 0 to 63.

    Args:
        run_dir: Run directory of `train_teacher`, or a folder with a teacher.safetensors.
        data: The real images, as for `open_dataset`; None takes the data set on the teacher's card.
        n: Number of images; that of the real ones if None.
        progress: Shows bars at a terminal.

    Returns:
        The records, those of the teacher first.

    Raises:
        NotFound: The folder holds no teacher, as the run directory of a student.
    """
    folder = path_of("run_dir", run_dir)
    teacher = load_precond(folder / "teacher.safetensors")
    real = data_of(teacher.card) if data is None else open_dataset(data, progress=progress)
    if real is None:
        raise GddlabError(f"no dataset to score against: the teacher in {folder} names none, give data=")
    records: list[Record] = []
    for steps in STEPS:
        save_grid(sample(teacher, 64, steps=steps), folder / f"samples-{steps}.png", columns=8, scale=1)
        records += evaluate(teacher, data=real, n=n, steps=steps, progress=progress)
    records += real_split(real, progress=progress)
    write_json(folder / "scores.json", [r.to_dict() for r in records])
    return records
