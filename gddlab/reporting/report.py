"""A page of one run, or of several beside each other: self-contained HTML, made of what lies in the run directories."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from gddlab.errors import GddlabError, NotFound
from gddlab.evaluation import Record, compare
from gddlab.evaluation.metrics import DISTANCES
from gddlab.evaluation.records import COMPARED, kind_of
from gddlab.files import write_text
from gddlab.reporting.run_summary import Facts, differing, facts, provenance_rows, python_of, shown, trained_rows
from gddlab.reporting.style import look
from gddlab.reporting.training_curves import draw_metrics, figure_html
from gddlab.runs import Run

__all__ = [
    "HEAD",
    "Page",
    "apart",
    "best",
    "comparable",
    "courses",
    "drawable",
    "labels",
    "levels",
    "report",
    "score_cell",
    "score_rows",
    "table_html",
    "teacher_name",
    "value",
]

SHORT = 36
"""Cells with at most so many letters are not broken."""

STYLE = """
body{font:16px/1.55 system-ui,sans-serif;color:#1b1b1b;max-width:1080px;margin:2.2rem auto;padding:0 1.2rem;overflow-wrap:break-word}
h1{font-size:1.7rem;margin-bottom:.2rem} h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #ddd;padding-bottom:.2rem}
h3{font-size:1rem;margin:1.2rem 0 .2rem} p{max-width:46rem} .note{color:#555;font-size:.92rem}
.scroll{overflow-x:auto} table{border-collapse:collapse;margin:.6rem 0}
td,th{padding:.22rem .8rem .22rem 0;text-align:left;vertical-align:top;font-size:.92rem} td+td{overflow-wrap:anywhere}
th{font-weight:600;border-bottom:1px solid #bbb} td.n,th.n{text-align:right;font-variant-numeric:tabular-nums} td.n,td.s,th{white-space:nowrap}
img{max-width:100%;height:auto}
figure{margin:.8rem 1.4rem .4rem 0;display:inline-block;vertical-align:top;max-width:100%}
figcaption{font-size:.88rem;color:#555;max-width:30rem}
.numbers{display:flex;flex-wrap:wrap;gap:1rem;margin:1rem 0}
.number{border:1px solid #ddd;border-radius:.5rem;padding:.6rem 1rem;min-width:8.5rem} .number b{display:block;font-size:1.5rem}
.number span{font-size:.85rem;color:#555} code,pre{font-size:.88rem;background:#f5f5f5;border-radius:.25rem}
code{padding:.05rem .3rem} pre{padding:.7rem;overflow-x:auto}
@media (max-width:40rem){body{margin-top:1rem;padding:0 .8rem} figure{margin-right:.5rem} .number{min-width:6rem;padding:.4rem .7rem} .number b{font-size:1.2rem}}
"""


def table_html(rows: Sequence[Sequence[object]], head: Sequence[str] = ()) -> str:
    """Rows as a table, which scrolls by itself where it is too wide; below a head, numbers stand to the right and short cells in one line."""
    cells = [[str(c) for c in row] for row in rows]
    top = ""
    for i, name in enumerate(head):
        numbers = i > 0 and all(c[:1].isdigit() or c[:1] in "-" for c in (row[i] for row in cells))
        top += f"<th{' class=n' if numbers else ''}>{escape(name)}</th>"
    body = "".join(f"<tr>{''.join(_cell(c, bool(head), i) for i, c in enumerate(row))}</tr>" for row in cells)
    return f'<div class="scroll"><table>{f"<tr>{top}</tr>" if head else ""}{body}</table></div>'


def _cell(text: str, headed: bool, column: int) -> str:
    number = column > 0 and (text[:1].isdigit() or (text[:1] == "-" and text[1:2].isdigit()))
    kind = ' class="n"' if headed and number else ' class="s"' if headed and len(text) <= SHORT else ""
    return f"<td{kind}>{escape(text)}</td>"


@dataclass
class Page:
    """Collects sections; `html()` gives the whole document."""

    title: str
    parts: list[str] = field(default_factory=list)

    def section(self, title: str, text: str = "", *, level: int = 2) -> None:
        """A heading and a paragraph; the text is plain, not markup."""
        self.parts.append(f"<h{level}>{escape(title)}</h{level}>")
        if text:
            self.text(text)

    def text(self, text: str, *, note: bool = False) -> None:
        self.parts.append(f"<p{' class=note' if note else ''}>{escape(text)}</p>")

    def numbers(self, values: dict[str, str]) -> None:
        """Headline numbers, label -> value."""
        boxes = (f'<div class="number"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for k, v in values.items())
        self.parts.append(f'<div class="numbers">{"".join(boxes)}</div>')

    def figure(self, image: str, caption: str = "") -> None:
        """An <img> of `figures`, with a caption."""
        under = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        self.parts.append(f"<figure>{image}{under}</figure>")

    def picture(self, png: bytes, alt: str, *, width: str) -> None:
        """A PNG, put into the page as it is and shown at a CSS width, with its description below it."""
        data = base64.b64encode(png).decode()
        image = f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
        self.parts.append(f'<figure style="width:{width}">{image}<figcaption>{escape(alt)}</figcaption></figure>')

    def table(self, rows: Sequence[Sequence[object]], head: Sequence[str] = ()) -> None:
        self.parts.append(table_html(rows, head))

    def code(self, text: str) -> None:
        self.parts.append(f"<pre>{escape(text)}</pre>")

    def html(self) -> str:
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
            f"<body><h1>{escape(self.title)}</h1>{''.join(self.parts)}</body></html>\n"
        )


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


GRID, SMALL_GRID = "320px", "min(240px,45%)"
"""Width of a grid of samples on the page: of one run, of several."""
PIXELS = 640
"""Greatest width of a grid inside the page, pixels: fine screens have two in one of CSS."""
CURVES = (
    ("loss", {"loss/g": "generator", "loss/d": "discriminator", "loss/instance": "instance"}),
    ("mean logit", {"logits/fake": "on generated images", "logits/real": "on real images"}),
    ("R1: squared gradient norm", {"r1": "on real images"}),
    ("learning rate", {"lr/g": "student", "lr/d": "discriminator"}),
    ("probability of augmentation", {"ada/p": "ADA"}),
)


def report(runs: str | Path | Run | Sequence[str | Path | Run], out: str | Path = "report.html") -> Path:
    """Writes a page of one run or several: configuration, provenance, curves, scores, samples, alarms. Nothing in it is fetched from elsewhere.

    Several runs are compared: what differs in their configurations, their distances over training, their last samples. A run that is not
    finished, failed, was never scored, or was written by another version is shown as such.

    Args:
        runs: Run directories, or folders that hold some at any depth.
        out: The HTML file; one that is there is replaced.

    Returns:
        Its path.

    Raises:
        NotFound: No such folder, or no run in it.
        GddlabError: No runs, or `out` is a folder.
    """
    folders = _folders([runs] if isinstance(runs, (str, Path, Run)) else runs)
    out = Path(out)
    if out.is_dir():
        raise GddlabError(f"out={str(out)!r} is a folder: give the name of an HTML file")
    seen = [facts(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    page = _one(seen[0]) if len(seen) == 1 else _several(seen)
    write_text(out, page.html())
    return out


def _folders(runs: Iterable[str | Path | Run]) -> list[Path]:
    found: list[Path] = []
    for run in runs:
        folder = run.run_dir if isinstance(run, Run) else Path(run)
        if not folder.is_dir():
            raise NotFound(f"no such run directory: {run}")
        whole = (folder / "config.json").is_file()
        inside = [folder] if whole else sorted(p.parent for p in folder.rglob("config.json"))
        if not inside:
            raise NotFound(f"no run in {run}: it holds no config.json, at any depth")
        found += [p.resolve() for p in inside]
    if not found:
        raise GddlabError("no runs given: give run directories, or a folder that holds some")
    return list(dict.fromkeys(found))


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest paths that tell the runs apart, with the experiment's folder where only a seed's would be left."""
    common = Path(os.path.commonpath([f.parent for f in folders]))
    if any(f.parent == common and f.name.startswith("seed-") for f in folders):
        common = common.parent
    return [f.relative_to(common).as_posix() for f in folders]


def _one(f: Facts) -> Page:
    page = Page(f"Run {f.name}")
    page.numbers(_headline(f))
    _troubles(page, f)
    page.section("What was trained")
    page.table(_trained(f))
    _scores(page, f)
    if "kimg" in f.metrics:
        page.section("Training")
        _curves(page, f)
        page.table(_costs(f))
    if grids := f.run.grids():
        page.section("Samples", "The averaged student, the same noise in the same place: first, middle and last grid.")
        for path in dict.fromkeys([grids[0], grids[(len(grids) - 1) // 2], grids[-1]]):
            page.picture(_png(path), f"{float(path.stem):g} thousand images", width=GRID)
    page.section("What ran")
    page.table(provenance_rows(f) or [["provenance", "none was written"]])
    page.text("The same run again:")
    page.code(python_of(f))
    return page


def _several(runs: Sequence[Facts]) -> Page:
    page = Page(f"{len(runs)} runs")
    groups = comparable(r for f in runs for r in f.records)
    names, fields = labels(groups), differing(runs)
    page.section(
        "Configurations and scores",
        "Of the configuration, only what differs. Scores are those of the end, or the newest there are.",
    )
    rows = []
    for i, f in enumerate(runs):
        values = [column[i] for column in fields.values()]
        rows.append([f.name, f.short_state, f"{f.kimg:g}", *values, *(score_cell(f, group) for group in groups)])
    page.table(rows, ["run", "state", "kimg", *fields, *names])
    for sentence in apart(groups):
        page.text(sentence, note=True)
    for group in drawable(r for f in runs for r in f.records):
        name = names[groups.index(group)]
        page.section(f"{name} over the training", "Lower is nearer to the data. A line an experiment, a dot a score.")
        page.figure(figure_html(courses(runs, group, name), f"{name} over the training"))
        if absent := [f.name for f in runs if f.last(group) is None]:
            page.text(f"Without such a score: {', '.join(absent)}.", note=True)
    page.section(
        "Last samples", "The averaged student of the end, or the newest there is; the same noise in the same place."
    )
    for f in runs:
        for path in f.run.grids()[-1:]:
            page.picture(_png(path), f"{f.name}, {float(path.stem):g} thousand images", width=SMALL_GRID)
    if absent := [f.name for f in runs if not f.run.grids()]:
        page.text(f"Without samples: {', '.join(absent)}.", note=True)
    page.section("Each run")
    for f in runs:
        page.section(f.name, level=3)
        _troubles(page, f)
        page.table([["state", f.state], *_trained(f), *_costs(f), *provenance_rows(f)])
        if found := best(f):
            page.text(found)
    return page


def _headline(f: Facts) -> dict[str, str]:
    out = {"state": f.short_state, f"of {f.fields['total_kimg']:g} thousand images": f"{f.kimg:g}"}
    for group in drawable(f.records)[:1]:
        out[f"{group[0].metric}, student"] = score_cell(f, group)
        best = dict(sorted(levels(f, group).items(), key=lambda level: level[1])[:1])
        out |= {f"{group[0].metric}, {name}": f"{level:.4g}" for name, level in best.items()}
    if f.mask is not None:
        out["of the parameters frozen"] = f"{f.mask.fraction:.1%}"
    return out


def _troubles(page: Page, f: Facts) -> None:
    """What could not be read, why it failed, and what it warned of."""
    if f.problems:
        page.text(f"Could not be read, and is missing here: {'; '.join(f.problems)}.", note=True)
    if f.state.startswith("failed"):
        page.section("Why it failed", str(f.status.get("message") or f.state), level=3)
        if error := f.status.get("error"):
            page.code(str(error).strip())
        log = f.run.tail()
        page.text("The last lines of its log:" if log else "It left no log.")
        if log:
            page.code(log)
    if len(f.alarms):
        page.section("Alarms", level=3)
        rows = [[f"{a['kimg']:g}", a["kind"], a["message"]] for _, a in f.alarms.iterrows()]
        page.table(rows, ["kimg", "kind", "what"])


def _trained(f: Facts) -> list[list[str]]:
    try:
        return trained_rows(f)
    except (ValueError, KeyError, TypeError, AttributeError):  # another version's configuration
        return [["configuration", json.dumps(f.fields)]]


def _scores(page: Page, f: Facts) -> None:
    page.section("Scores")
    if not f.records:
        page.text("This run was never scored; gddlab evaluate adds records.")
    for group in drawable(f.records):
        page.figure(figure_html(courses([f], group, group[0].metric), f"{group[0].metric} over the training"))
    if rows := score_rows(f):
        page.table(rows, HEAD)
    for sentence in apart(comparable([*f.records, *f.teacher])):
        page.text(sentence, note=True)
    if f.fields["discriminator"] == "projected":
        own = {r.extractor for r in f.records if any(str(b).endswith(r.extractor) for b in f.fields["backbones"])}
        for name in sorted(own):
            page.text(f"{name} is a backbone of the discriminator, and no neutral judge of its student.", note=True)
    if found := best(f):
        page.text(found)


def _curves(page: Page, f: Facts) -> None:
    for ylabel, names in CURVES:
        drawn = {k: v for k, v in names.items() if k in f.metrics and f.metrics[k].notna().any()}
        if drawn:
            page.figure(figure_html(draw_metrics(f.metrics, drawn, ylabel=ylabel).figure, ylabel))


def _costs(f: Facts) -> list[list[str]]:
    m = f.metrics
    rows = []
    if {"sec_per_kimg", "seconds"} <= set(m):
        each, whole = m["sec_per_kimg"].median(), m["seconds"].iloc[-1]
        rows.append(["time", f"{each:.1f} s per thousand images (median of {len(m)} ticks), {whole:.0f} s in all"])
    if "peak_mem_mib" in m:
        rows.append(["memory", f"at most {m['peak_mem_mib'].max():.0f} MiB in a process"])
    return rows


def _png(path: Path) -> bytes:
    """A grid as a PNG, made smaller where it has more pixels than a page shows."""
    from PIL import Image

    image = Image.open(path)
    if image.width <= PIXELS:
        return path.read_bytes()
    buffer = io.BytesIO()
    size = PIXELS, round(image.height * PIXELS / image.width)
    image.convert("RGB").resize(size, Image.Resampling.BOX).save(buffer, format="PNG")
    return buffer.getvalue()
