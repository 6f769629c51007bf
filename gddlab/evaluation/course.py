"""Scores over a run: every snapshot of the student, once."""

from __future__ import annotations

from collections.abc import Callable

from gddlab.evaluation.extractors import find_extractor
from gddlab.evaluation.records import Record, append_records, load_records
from gddlab.evaluation.scoring import evaluate
from gddlab.runs import Run

__all__ = ["evaluate_snapshots"]


def evaluate_snapshots(
    run: Run, *, extractor: str = "lite2", say: Callable[[str], None] = lambda text: None
) -> list[tuple[float, Record]]:
    """The student's Frechet distance at every snapshot after the start; records stay in the run's evaluation.jsonl and are not made again.

    Args:
        run: A run directory.
        extractor: As for `evaluate`.
        say: Told each new score, in a line.

    Returns:
        (thousands of images, record), oldest first.
    """
    metric = find_extractor(extractor).metric_name("fid")
    known = {r.model_sha256: r for r in load_records(run.run_dir) if r.name == metric}
    out: list[tuple[float, Record]] = []
    for path in run.snapshots():
        net = run.student(path)
        kimg = net.card.kimg
        if not kimg:
            continue
        record = known.get(net.card.sha256)
        if record is None:
            record = evaluate(net, metrics=("fid",), extractor=extractor, progress=False).record(metric)
            append_records(run.run_dir, [record])
            say(f"evaluate  {kimg:6.2f} kimg: {record.metric} {record.value:.1f}")
        out.append((kimg, record))
    return out
