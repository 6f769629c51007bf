"""The page of one run, and of several beside each other, as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from gddlab.errors import GddlabError
from gddlab.evaluation import Record, compare
from gddlab.evaluation.metrics import DISTANCES
from gddlab.evaluation.records import COMPARED, kind_of
from gddlab.reporting.pages import Picture, of_figure, of_file, render
from gddlab.reporting.run_summary import Summary, differing, in_words, provenance_rows, python_of, trained_rows
from gddlab.reporting.style import look
from gddlab.reporting.training_curves import draw_curves, draw_metrics

HEAD = ("what", "score", "value", "±", "n", "seeds", "extractor", "reference")
FAR = 3.0
"""A teacher's score is drawn beside a student's where it is at most this many times as large."""
GRID, SMALL_GRID = "320px", "min(240px,45%)"
"""Width of a grid of samples in the page of one run, of several."""
CURVES = (
    ("loss", {"loss/g": "generator", "loss/d": "discriminator", "loss/instance": "instance"}),
    ("mean logit", {"logits/fake": "on generated images", "logits/real": "on real images"}),
    ("R1: squared gradient norm", {"r1": "on real images"}),
    ("learning rate", {"lr/g": "student", "lr/d": "discriminator"}),
    ("probability of augmentation", {"ada/p": "ADA"}),
)


def run_page(f: Summary, template: str = "run.html.j2", **more: Any) -> str:
    """The page of one run; `more` is what another template needs, or shows in place of what is here."""
    curves, grids = [], f.run.grids()
    for ylabel, names in CURVES if "kimg" in f.metrics else ():
        if drawn := {k: v for k, v in names.items() if k in f.metrics and f.metrics[k].notna().any()}:
            curves.append(of_figure(draw_metrics(f.metrics, drawn, ylabel=ylabel), ylabel))
    three = dict.fromkeys([grids[0], grids[(len(grids) - 1) // 2], grids[-1]] if grids else [])
    context = {
        "title": f"Run {f.name}",
        "run": _told(f),
        "headline": _headline(f),
        "charts": [picture for _, picture, _ in _charts([f])],
        "scores": _score_rows(f),
        "head": HEAD,
        "notes": [*_apart(_comparable([*f.records, *f.teacher])), *_partial_judges(f)],
        "curves": curves,
        "grids": [_grid(path, "", GRID) for path in three],
        "code": python_of(f),
    }
    return render(template, **context | more)


def runs_page(runs: Sequence[Summary]) -> str:
    groups = _comparable(r for f in runs for r in f.scores)
    names, fields = _labels(groups), differing(runs)
    rows = []
    for i, f in enumerate(runs):
        values = [column[i] for column in fields.values()]
        rows.append([f.name, f.short_state, f"{f.kimg:g}", *values, *(_score_cell(f, group) for group in groups)])
    return render(
        "runs.html.j2",
        title=f"{len(runs)} runs",
        rows=rows,
        head=["run", "state", "kimg", *fields, *names],
        notes=_apart(groups),
        charts=_charts(runs),
        grids=[_grid(path, f"{f.name}, ", SMALL_GRID) for f in runs for path in f.run.grids()[-1:]],
        without_grids=[f.name for f in runs if not f.run.grids()],
        runs=[_told(f) for f in runs],
    )


def _told(f: Summary) -> dict[str, Any]:
    """What both kinds of pages say of a run."""
    return {
        "summary": f,
        "alarms": [[f"{a['kimg']:g}", a["kind"], a["message"]] for _, a in f.alarms.iterrows()],
        "trained": trained_rows(f),
        "costs": _costs(f),
        "provenance": provenance_rows(f),
        "best": _best(f),
    }


def _grid(path: Path, name: str, width: str) -> Picture:
    return of_file(path, f"{name}{float(path.stem):g} thousand images", width=width)


def _headline(f: Summary) -> dict[str, str]:
    out = {"state": f.short_state, f"of {f.fields['total_kimg']:g} thousand images": f"{f.kimg:g}"}
    for group in _drawable(f.scores)[:1]:
        out[f"{group[0].metric}, student"] = _score_cell(f, group)
        best = dict(sorted(_levels(f, group).items(), key=lambda level: level[1])[:1])
        out |= {f"{group[0].metric}, {name}": f"{level:.4g}" for name, level in best.items()}
    if f.mask is not None:
        out["of the parameters frozen"] = f"{f.mask.fraction:.1%}"
    return out


def _partial_judges(f: Summary) -> list[str]:
    """Scores by a network that the discriminator looked through, a sentence each."""
    if f.config is None or f.config.discriminator is None:
        return []
    seen = f.config.discriminator.networks()
    own = {r.extractor for r in f.records if any(name.endswith(r.extractor) for name in seen)}
    return [f"{name} is a backbone of the discriminator, and no neutral judge of its student." for name in sorted(own)]


def _costs(f: Summary) -> list[list[str]]:
    m = f.metrics
    rows = []
    if {"sec_per_kimg", "seconds"} <= set(m):
        each, whole = m["sec_per_kimg"].median(), m["seconds"].iloc[-1]
        rows.append(["time", f"{each:.1f} s per thousand images (median of {len(m)} ticks), {whole:.0f} s in all"])
    if "peak_mem_mib" in m:
        rows.append(["memory", f"at most {m['peak_mem_mib'].max():.0f} MiB in a process"])
    return rows


def _comparable(records: Iterable[Record]) -> list[list[Record]]:
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


def _drawable(records: Iterable[Record]) -> list[list[Record]]:
    """Groups of a distance that was scored at more than one moment of a training."""
    return [
        g
        for g in _comparable(records)
        if kind_of(g[0].name) in DISTANCES and len({r.kimg for r in g if r.kimg is not None}) > 1
    ]


def _labels(groups: Sequence[Sequence[Record]]) -> list[str]:
    """A name for each group: its metric; with reference and extractor where two would have the same."""
    names = [g[0].metric for g in groups]
    return [
        name
        if names.count(name) == 1
        else f"{name} ({g[0].reference} {g[0].reference_sha256[:6]}, {g[0].extractor_sha256[:6]})"
        for name, g in zip(names, groups, strict=True)
    ]


def _apart(groups: Sequence[Sequence[Record]]) -> list[str]:
    """Which scores of one name cannot stand beside each other, and why; a sentence each."""
    firsts: dict[str, Record] = {}
    out = []
    for group in groups:
        other = group[0]
        first = firsts.setdefault(other.name, other)
        differ = [x for x in COMPARED if x != "metric" and getattr(first, x) != getattr(other, x)]
        if differ:
            why = "; ".join(f"{x}, {in_words(getattr(first, x))} and {in_words(getattr(other, x))}" for x in differ)
            out.append(f"{first.metric} and {other.metric} cannot stand beside each other: they differ in {why}.")
    return out


def _levels(f: Summary, group: Sequence[Record]) -> dict[str, float]:
    """The teacher's scores comparable with a group, fewest steps first; the best one alone if all are far above it."""
    found = {_teacher_name(r): r.value for r in f.teacher if len(_comparable([group[0], r])) == 1}
    near = {name: v for name, v in found.items() if v <= FAR * max(r.value for r in group)}
    return near or dict(sorted(found.items(), key=lambda item: item[1])[:1])


def _teacher_name(record: Record) -> str:
    """How a score on a teacher's card is called: by its steps, or as two halves of the real images."""
    if record.sampler == "data":
        return "two halves of the real images"
    steps, *more = record.sampler.rpartition("heun-")[2].split(" ", 1)
    return ", ".join([look(f"teacher-{steps}").label, *more])


def _score_rows(f: Summary) -> list[list[str]]:
    """One row per score of the student and of its teacher, below `HEAD`."""
    rows = [_row("student" if r.kimg is None else f"student, {r.kimg:g} kimg", r) for r in f.records]
    return rows + [_row(_teacher_name(r), r) for r in f.teacher]


def _row(what: str, r: Record) -> list[str]:
    if r.seeds is None:
        seeds = "given"
    else:
        seeds = f"split {r.seeds[0]}" if r.sampler == "data" else f"{r.seeds[0]} to {r.seeds[1]}"
    extractor = f"{r.extractor}, {r.extractor_input_size} px, {r.extractor_sha256[:6]}"
    reference = f"{r.reference}, {r.reference_n}, {r.reference_sha256[:6]}"
    return [what, r.metric, _value(r), "" if r.std is None else f"{r.std:.2g}", str(r.n), seeds, extractor, reference]


def _score_cell(f: Summary, group: Sequence[Record]) -> str:
    """The newest score of a run in a group, with its moment where that is not the end; empty without one."""
    record = f.last(group)
    if record is None:
        return ""
    at = "" if record.kimg in (None, f.fields["total_kimg"]) else f" at {record.kimg:g} kimg"
    return f"{_value(record)}{at}"


def _value(record: Record) -> str:
    """Two decimals, or four digits of a small score."""
    return f"{record.value:.2f}" if abs(record.value) >= 10 else f"{record.value:.4g}"


def _best(f: Summary) -> str:
    """Which student was best, in a sentence; empty where none can be told."""
    if kept := f.best:
        score = f"{kept['metric']} {kept['value']:.4g} at {kept['kimg']:g} kimg"
        return f"The best student scored during training is kept: {score}."
    for group in _drawable(f.scores):
        own = [r for r in group if r.kimg is not None]
        first = min(own, key=lambda r: r.value)
        return f"The nearest to the data of {len(own)} scored: {first.metric} {_value(first)} at {first.kimg:g} kimg."
    return ""


def _charts(runs: Sequence[Summary]) -> list[tuple[str, Picture, list[str]]]:
    """Distances of runs over the training, one line per experiment: name, picture, runs without such a score."""
    charts, groups = [], _comparable(r for f in runs for r in f.scores)
    drawable = _drawable(r for f in runs for r in f.scores)
    for group, name in zip(groups, _labels(groups), strict=True):
        if group not in drawable:
            continue
        rows: list[dict[str, Any]] = []
        for f in runs:
            own = {r.kimg: r.value for r in f.scores if r in group and r.kimg is not None}
            about = {"experiment": f.experiment, "metric": name, "state": f.state}
            rows += [about | {"kimg": kimg, "value": v} for kimg, v in own.items()]
        levels = next((found for f in runs if (found := _levels(f, group))), {})
        drawn = draw_curves(pd.DataFrame(rows).sort_values("kimg", kind="stable"), levels=levels)
        absent = [f.name for f in runs if f.last(group) is None]
        charts.append((name, of_figure(drawn, f"{name} over the training"), absent))
    return charts
