"""A page of one run, or of several beside each other: self-contained HTML, made of what lies in the run directories."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from gddlab.errors import GddlabError, NotFound
from gddlab.files import write_text
from gddlab.reporting import scores
from gddlab.reporting.facts import Facts, differing, facts, provenance_rows, python_of, trained_rows
from gddlab.reporting.figures import draw_metrics, figure_html
from gddlab.reporting.page import Page
from gddlab.runs import Run

__all__ = ["report"]

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
    groups = scores.comparable(r for f in runs for r in f.records)
    names, fields = scores.labels(groups), differing(runs)
    page.section(
        "Configurations and scores",
        "Of the configuration, only what differs. Scores are those of the end, or the newest there are.",
    )
    rows = []
    for i, f in enumerate(runs):
        values = [column[i] for column in fields.values()]
        rows.append([f.name, f.short_state, f"{f.kimg:g}", *values, *(scores.score_cell(f, group) for group in groups)])
    page.table(rows, ["run", "state", "kimg", *fields, *names])
    for sentence in scores.apart(groups):
        page.text(sentence, note=True)
    for group in scores.drawable(r for f in runs for r in f.records):
        name = names[groups.index(group)]
        page.section(f"{name} over the training", "Lower is nearer to the data. A line an experiment, a dot a score.")
        page.figure(figure_html(scores.courses(runs, group, name), f"{name} over the training"))
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
        if best := scores.best(f):
            page.text(best)
    return page


def _headline(f: Facts) -> dict[str, str]:
    out = {"state": f.short_state, f"of {f.fields['total_kimg']:g} thousand images": f"{f.kimg:g}"}
    for group in scores.drawable(f.records)[:1]:
        out[f"{group[0].metric}, student"] = scores.score_cell(f, group)
        best = dict(sorted(scores.levels(f, group).items(), key=lambda level: level[1])[:1])
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
    for group in scores.drawable(f.records):
        page.figure(figure_html(scores.courses([f], group, group[0].metric), f"{group[0].metric} over the training"))
    if rows := scores.score_rows(f):
        page.table(rows, scores.HEAD)
    for sentence in scores.apart(scores.comparable([*f.records, *f.teacher])):
        page.text(sentence, note=True)
    if f.fields["discriminator"] == "projected":
        own = {r.extractor for r in f.records if any(str(b).endswith(r.extractor) for b in f.fields["backbones"])}
        for name in sorted(own):
            page.text(f"{name} is a backbone of the discriminator, and no neutral judge of its student.", note=True)
    if best := scores.best(f):
        page.text(best)


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
