"""`gddlab demo`: the whole way on the embedded digits, and a page to look at."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gddlab.distill import presets
from gddlab.errors import GddlabError
from gddlab.evaluation import Record, evaluate, evaluate_snapshots, real_split
from gddlab.evaluation.run_scores import STEPS
from gddlab.files import data_dir, write_json, write_text
from gddlab.freezing import FreezeMask, select_freeze
from gddlab.launch import RunHandle, train
from gddlab.nets import Precond
from gddlab.probing import ProbeResult, probe
from gddlab.provenance import commit, hardware, versions
from gddlab.reporting.report import Page
from gddlab.reporting.training_curves import draw_courses, draw_metrics, figure_html, image_html, save_figure
from gddlab.runtime import peak_memory_mib
from gddlab.sampling import image_grid, sample
from gddlab.teachers import load_teacher

__all__ = ["demo"]

SCORE = "rel_update"
METRIC = "fd-lite2"
GRID = 64
PROBED = 48


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def demo(out: str | Path = "demo", *, seed: int = 0, nproc: int = 1, recompute: bool = False) -> dict[str, Any]:
    """Probe, mask, GDD-I training, evaluation against the teacher; writes index.html and demo.json.

    The mask that trains is the authors' rule (option 1); one chosen by measurement is shown beside it. The same call on the same folder
    continues an interrupted demo.

    Args:
        out: Folder.
        seed: Seed of the training.
        nproc: Processes of the training.
        recompute: Scores the teacher again, minutes, instead of reading the scores that ship with it.

    Returns:
        What is in demo.json: fd_teacher_1, fd_teacher_18, fd_student, fd_real_split, frozen_fraction, kimg, seconds, and more.
    """
    began = time.perf_counter()
    out = Path(out)
    teacher = load_teacher("digits")
    say(f"teacher   {teacher.card.parameters:,} parameters, {teacher.card.unet}, from {teacher.card.source}")

    result = probe(teacher, 18, n=PROBED)
    result.save(out / "probe")
    layers = result.frame["layer"].nunique()
    say(f"probe     {layers} layers and blocks at {len(result.sigmas)} noise levels, {PROBED} images each")

    mask = select_freeze(teacher, strategy="gdd-i")
    measured = select_freeze(result, strategy="budget", score=SCORE, budget=mask.fraction)
    mask.save(out / "mask.json")
    measured.save(out / "mask-measured.json")
    say(f"mask      GDD-I freezes {mask.fraction:.1%} of the parameters; the measured one {measured.fraction:.1%}")

    config = presets.digits(mask=mask, run_dir=out / "run", seed=seed)
    continued = (config.run_dir / "config.json").exists()
    run = train(config, nproc=nproc)
    say(
        f"train     GDD-I, {config.total_kimg:g} thousand images; follow it with: tensorboard --logdir {out / 'run' / 'events'}"
    )
    run.watch()

    student = run.student()
    scores = evaluate_snapshots(run, say=say)
    references = {s.sampler: s for s in _teacher_scores(teacher, recompute) if s.name == METRIC and s.sampler != "data"}
    split = real_split("digits", metrics=("fid",), progress=False).record(METRIC)
    final = scores[-1][1]
    numbers: dict[str, Any] = {
        "fd_teacher_1": references["heun-1"].value,
        "fd_teacher_18": references["heun-18"].value,
        "fd_student": final.value,
        "fd_real_split": split.value,
        "metric": final.metric,
        "metric_real_split": split.metric,
        "frozen_fraction": mask.fraction,
        "kimg": scores[-1][0],
        "seed": seed,
        "nproc": nproc,
        "continued": continued,
        "peak_mem_mib": _peak_mib(run, nproc),
        "seconds": round(time.perf_counter() - began, 1),
    }
    grids = _grids(teacher, sample(student, GRID, seed=0))
    _picture(grids, out / "images.png")
    page = _page(numbers, teacher, grids, result, mask, measured, run, scores, references, split)
    write_text(out / "index.html", page.html())
    numbers["seconds"] = round(time.perf_counter() - began, 1)
    write_json(out / "demo.json", numbers)
    say(
        f"result    {final.metric}: student, one step {final.value:.1f}; teacher, 18 steps {numbers['fd_teacher_18']:.1f}, "
        f"1 step {numbers['fd_teacher_1']:.0f}; two halves of the real images {split.value:.1f} ({split.metric})"
    )
    say(f"page      {out / 'index.html'}  ({numbers['seconds']:.0f} s)")
    return numbers


def _peak_mib(run: RunHandle, nproc: int) -> float:
    """Bound of the memory in use at one time, MiB: this process's peak and that of every training process."""
    own = peak_memory_mib()
    return own + nproc * float(run.metrics["peak_mem_mib"].max())


def _teacher_scores(teacher: Any, recompute: bool) -> list[Record]:
    if recompute:
        return [r for k in STEPS for r in evaluate(teacher, metrics=("fid",), steps=k)]
    if not teacher.card.scores:
        raise GddlabError(f"no scores beside {teacher.card.source}: run gddlab teacher score, or demo --recompute")
    return [Record.from_dict(s) for s in teacher.card.scores]


def _grids(teacher: Precond, images: Tensor) -> dict[str, np.ndarray]:
    """Images of seeds 0 to 63 as grids: the teacher's, as they ship with it, and the student's."""
    from PIL import Image

    folder = data_dir() / "teachers" / teacher.card.name
    out: dict[str, np.ndarray] = {}
    for steps in (1, 18):
        calls = 2 * steps - 1
        title = f"teacher, {steps} step{'s' if steps > 1 else ''} ({calls} network call{'s' if calls > 1 else ''})"
        out[title] = np.asarray(Image.open(folder / f"samples-{steps}.png").convert("RGB"))
    out["student, 1 step (1 network call)"] = image_grid(images, columns=8)
    return out


def _picture(grids: dict[str, np.ndarray], path: Path) -> None:
    """The grids side by side, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(grids), 4.3), layout="constrained")
    for ax, (title, pixels) in zip(figure.subplots(1, len(grids)), grids.items(), strict=True):
        ax.imshow(pixels, interpolation="nearest")
        ax.set_axis_off()
        ax.set_title(title, fontsize=11)
    save_figure(figure, path, dpi=110)


def _page(
    numbers: dict[str, Any],
    teacher: Any,
    grids: dict[str, np.ndarray],
    result: ProbeResult,
    mask: FreezeMask,
    measured: FreezeMask,
    run: RunHandle,
    scores: list[tuple[float, Record]],
    references: dict[str, Record],
    split: Record,
) -> Page:
    final = scores[-1][1]
    page = Page("gddlab: a diffusion model becomes a one-step generator")
    page.text(
        "A diffusion teacher of handwritten digits was probed, most of its convolutions were frozen, and the rest was trained for "
        f"{numbers['kimg']:.1f} thousand images under a purely distributional (GAN) loss. The result draws an image in one network call; the "
        "teacher needs 35 for 18 Heun steps."
    )
    page.numbers(
        {
            "student, 1 step": f"{final.value:.1f}",
            "teacher, 18 steps": f"{numbers['fd_teacher_18']:.1f}",
            "teacher, 1 step": f"{numbers['fd_teacher_1']:.0f}",
            f"two halves of the real images, n = {split.n}": f"{split.value:.1f}",
            "of the parameters frozen": f"{mask.fraction:.1%}",
        }
    )
    page.text(
        f"Distances are {final.metric}: Frechet distances between EfficientNet-lite2 features of {final.n} images (seeds "
        f"{final.seeds[0] if final.seeds else '?'} to {final.seeds[1] if final.seeds else '?'}) and of all {final.reference_n} real ones; lower is nearer. "
        "They are no FID, which needs Inception features. The discriminator looked through another network, EfficientNet-lite0. "
        "The two real halves have fewer images each, which raises their distance.",
        note=True,
    )

    page.section("Images", "The same noise in the same place: seeds 0 to 63, row by row.")
    for title, pixels in grids.items():
        page.figure(image_html(pixels, title), title)

    page.section(
        "What the layers do",
        f"Each row is a residual block, each column a noise level; {result.meta['n_images']} images, the same noise at every level. The colour is the size of what a "
        "block adds to its skip path. The student is only ever run at sigma = 80, the right edge.",
    )
    page.figure(figure_html(result.heatmap("rel_update").figure, "heat map of the relative update"))
    page.figure(
        figure_html(result.heatmap("cosine").figure, "heat map of cosines"),
        "How like its output at sigma = 80 each convolution's output is at the other noise levels.",
    )

    page.section(
        "What was frozen",
        "Blue is frozen at the teacher's values, orange is trained. The first mask is the authors' rule on names and is the one trained here. The second has "
        f"the same budget and is chosen by measurement: the convolutions with the smallest {SCORE} at sigma = 80 are frozen. Which is better is an experiment, "
        "not shown by this page.",
    )
    page.figure(figure_html(mask.plot().figure, "the rule's mask"))
    page.figure(figure_html(measured.plot().figure, "the measured mask"))

    page.section("Training", "")
    metrics = run.metrics
    page.figure(
        figure_html(
            draw_metrics(metrics, {"loss/g": "generator", "loss/d": "discriminator"}, ylabel="loss").figure, "losses"
        )
    )
    page.figure(
        figure_html(
            draw_metrics(
                metrics, {"logits/fake": "on generated images", "logits/real": "on real images"}, ylabel="mean logit"
            ).figure,
            "logits",
        )
    )
    lines = {"teacher, 18 steps": numbers["fd_teacher_18"], f"real halves, n = {split.n}": split.value}
    import pandas as pd

    points = [{"kimg": k, "value": r.value} for k, r in scores]
    course = pd.DataFrame(points).assign(experiment="student, one step", metric=final.metric)
    curve = draw_courses(course, levels=lines)
    page.figure(figure_html(curve.figure, "distance over training"))

    page.section("Scores")
    rows = [[f"student, {k:.2f} kimg", f"{r.value:.1f}", r.n, r.metric, r.sampler] for k, r in scores]
    rows += [
        [f"teacher, {k.removeprefix('heun-')} steps", f"{r.value:.1f}", r.n, r.metric, k] for k, r in references.items()
    ]
    rows.append(["two halves of the real images", f"{split.value:.1f}", split.n, split.metric, split.sampler])
    page.table(rows, ["what", "distance", "n", "metric", "sampler"])

    page.section("What was run")
    config = run.config
    page.table(
        [
            ["teacher", f"{teacher.card.name}, sha256 {teacher.card.sha256[:16]}"],
            ["mask", f"{mask.strategy}, {len(mask.frozen)} tensors, sha256 {mask.hash[:16]}"],
            ["data", f"digits, sha256 {split.reference_sha256[:16]}"],
            [
                "training",
                f"seed {config.seed}, batch {config.batch}, lr {config.lr_g:g} / {config.lr_d:g}, R1 gamma {config.r1_gamma:g}, {numbers['nproc']} process(es)",
            ],
            [
                "extractor",
                f"EfficientNet-{final.extractor}, {final.extractor_input_size} px, sha256 {final.extractor_sha256[:16]}",
            ],
            ["versions", ", ".join(f"{k} {v}" for k, v in versions().items())],
            ["commit", commit() or "installed package"],
            ["machine", ", ".join(f"{k} {v}" for k, v in hardware().items() if v)],
            ["time", f"{numbers['seconds']:.0f} s, training {metrics['seconds'].iloc[-1]:.0f} s"],
        ]
    )
    page.code(
        "import gddlab\n\n"
        'teacher = gddlab.load_teacher("digits")\n'
        "result = gddlab.probe(teacher, 18)\n"
        'mask = gddlab.select_freeze(teacher, strategy="gdd-i")\n'
        f'run = gddlab.train(gddlab.presets.digits(mask=mask, run_dir="runs/a", seed={config.seed}), nproc={numbers["nproc"]})\n'
        "run.watch()\n"
        "scores = gddlab.evaluate(run.student())"
    )
    return page
