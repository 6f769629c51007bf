"""Scores on a page of runs: which can stand beside each other, tables and figures of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gddlab.errors import GddlabError
from gddlab.evaluation import Record, compare
from gddlab.evaluation.metrics import DISTANCES
from gddlab.evaluation.records import COMPARED, kind_of
from gddlab.reporting.courses import draw_courses
from gddlab.reporting.facts import Facts, shown
from gddlab.reporting.networks import look

__all__ = [
    "HEAD",
    "apart",
    "best",
    "comparable",
    "courses",
    "drawable",
    "labels",
    "levels",
    "score_cell",
    "score_rows",
    "teacher_name",
    "value",
]

HEAD = ("what", "score", "value", "±", "n", "seeds", "extractor", "reference")
FAR = 3.0
"""A teacher's score is drawn beside a student's where it is at most so many times as large."""


def comparable(records: Iterable[Record]) -> list[list[Record]]:
    """Scores in groups: within one, all are of the same metric, n, extractor and reference."""
    groups: list[list[Record]] = []
    for record in records:
        for group in groups:
            try:
                compare(record, group[0])
            except GddlabError:
                continue
            group.append(record)
            break
        else:
            groups.append([record])
    return groups


def drawable(records: Iterable[Record]) -> list[list[Record]]:
    """Groups of a distance that was scored at more than one moment of a training."""
    return [
        g
        for g in comparable(records)
        if kind_of(g[0].name) in DISTANCES and len({r.kimg for r in g if r.kimg is not None}) > 1
    ]


def labels(groups: Sequence[Sequence[Record]]) -> list[str]:
    """A name for each group: its metric; with reference and extractor where two would have the same."""
    names = [g[0].metric for g in groups]
    return [
        name
        if names.count(name) == 1
        else f"{name} ({g[0].reference} {g[0].reference_sha256[:6]}, {g[0].extractor_sha256[:6]})"
        for name, g in zip(names, groups, strict=True)
    ]


def apart(groups: Sequence[Sequence[Record]]) -> list[str]:
    """Which scores of one name cannot stand beside each other, and why; a sentence each."""
    firsts: dict[str, Record] = {}
    out = []
    for group in groups:
        other = group[0]
        first = firsts.setdefault(other.name, other)
        differ = [x for x in COMPARED if x != "metric" and getattr(first, x) != getattr(other, x)]
        if differ:
            why = "; ".join(f"{x}, {shown(getattr(first, x))} and {shown(getattr(other, x))}" for x in differ)
            out.append(f"{first.metric} and {other.metric} cannot stand beside each other: they differ in {why}.")
    return out


def levels(f: Facts, group: Sequence[Record]) -> dict[str, float]:
    """The teacher's scores that can be compared with a group, fewest steps first; the best one alone where all are far above it."""
    found = {teacher_name(r): r.value for r in f.teacher if len(comparable([group[0], r])) == 1}
    near = {name: v for name, v in found.items() if v <= FAR * max(r.value for r in group)}
    return near or dict(sorted(found.items(), key=lambda item: item[1])[:1])


def teacher_name(record: Record) -> str:
    """How a score on a teacher's card is called: by its steps, or as two halves of the real images."""
    if record.sampler == "data":
        return "two halves of the real images"
    return look(f"teacher-{record.sampler.rpartition('-')[2]}").label


def score_rows(f: Facts) -> list[list[str]]:
    """A row a score of the student and of its teacher, below `HEAD`."""
    rows = [_row("student" if r.kimg is None else f"student, {r.kimg:g} kimg", r) for r in f.records]
    return rows + [_row(teacher_name(r), r) for r in f.teacher]


def _row(what: str, r: Record) -> list[str]:
    if r.seeds is None:
        seeds = "given"
    else:
        seeds = f"split {r.seeds[0]}" if r.sampler == "data" else f"{r.seeds[0]} to {r.seeds[1]}"
    extractor = f"{r.extractor}, {r.extractor_input_size} px, {r.extractor_sha256[:6]}"
    reference = f"{r.reference}, {r.reference_n}, {r.reference_sha256[:6]}"
    return [what, r.metric, value(r), "" if r.std is None else f"{r.std:.2g}", str(r.n), seeds, extractor, reference]


def score_cell(f: Facts, group: Sequence[Record]) -> str:
    """The newest score of a run in a group, with its moment where that is not the end; empty without one."""
    record = f.last(group)
    if record is None:
        return ""
    at = "" if record.kimg in (None, f.fields["total_kimg"]) else f" at {record.kimg:g} kimg"
    return f"{value(record)}{at}"


def value(record: Record) -> str:
    """Two decimals, or four digits of a small score."""
    return f"{record.value:.2f}" if abs(record.value) >= 10 else f"{record.value:.4g}"


def best(f: Facts) -> str:
    """Which student was best, in a sentence; empty where none can be told."""
    try:
        kept = f.run.best
    except GddlabError:
        kept = None
    if kept:
        return f"The best student scored on the way is kept: {kept['metric']} {kept['value']:.4g} at {kept['kimg']:g} kimg."
    for group in drawable(f.records):
        own = [r for r in group if r.kimg is not None]
        first = min(own, key=lambda r: r.value)
        return f"The nearest to the data of {len(own)} scored: {first.metric} {value(first)} at {first.kimg:g} kimg."
    return ""


def courses(runs: Sequence[Facts], group: Sequence[Record], label: str) -> Any:
    """A figure of several runs' distances: a line an experiment, a dot a score."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for f in runs:
        own = {r.kimg: r.value for r in f.records if r in group and r.kimg is not None}
        about = {"experiment": f.experiment, "metric": label, "state": f.state}
        rows += [about | {"kimg": kimg, "value": v} for kimg, v in own.items()]
    lines = next((found for f in runs if (found := levels(f, group))), {})
    return draw_courses(pd.DataFrame(rows).sort_values("kimg", kind="stable"), levels=lines).figure
