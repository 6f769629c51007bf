"""`ship`: copies what is light of finished runs and studies, for notebooks that are read without them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gddlab.errors import GddlabError
from gddlab.experiments.experiment import Study
from gddlab.experiments.runner import plan
from gddlab.files import read_json, write_bytes, write_json
from gddlab.probing import ProbeResult
from gddlab.runs import load_run

__all__ = ["RUN_FILES", "STUDY_FILES", "ship"]

RUN_FILES = (
    "config.json",
    "mask.json",
    "provenance.json",
    "teacher.json",
    "metrics.jsonl",
    "evaluation.jsonl",
    "alarms.jsonl",
    "status.json",
)
"""What ships of a run, with the last sample grid."""
STUDY_FILES = ("frame.parquet", "evaluation.jsonl", "meta.json")


def ship(name: str, out: str | Path, to: str | Path, *, only: Sequence[str] = (), seeds: int = 3) -> list[Path]:
    """Copies what is light of a list's finished runs (configuration, mask, provenance, metrics, scores, alarms, last grid), its studies, and the measurement.

    Args:
        name, out, only, seeds: As for `reproduce`.
        to: Folder; they come to lie in `to/LIST/...`, as in `out`.

    Returns:
        The folders written.

    Raises:
        GddlabError: No run and no study of these is done.
    """
    done = [p for p in plan(name, out=out, only=only, seeds=seeds) if p.state == "done"]
    if not done:
        raise GddlabError(f"no run of {name!r} below {out} is done: run gddlab reproduce {name} first")
    written: list[Path] = []
    for item in done:
        source, target = item.folder, Path(to) / item.folder.relative_to(out)
        study = isinstance(item.item, Study)
        for file in (source / n for n in (STUDY_FILES if study else RUN_FILES)):
            if file.exists():
                write_bytes(target / file.name, file.read_bytes())
        if not study:
            card = read_json(source / "teacher.json")
            if "source" in card:  # where the teacher lay on this machine is nobody's business
                write_json(target / "teacher.json", {**card, "source": Path(card["source"]).name})
            for grid in load_run(source).grids()[-1:]:
                write_bytes(target / "samples" / grid.name, grid.read_bytes())
        written.append(target)
    measured = Path(out) / name / "measured"
    if measured.is_dir():
        ProbeResult.load(measured).save(Path(to) / name / "measured")
        written.append(Path(to) / name / "measured")
    return written
