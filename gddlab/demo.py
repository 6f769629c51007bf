"""`gddlab demo`: probes, trains and scores on bundled images, and writes a page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gddlab
from gddlab.errors import GddlabError, unknown
from gddlab.files import data_dir, path_of, write_json, write_text
from gddlab.progress import say
from gddlab.theme import save_figure, themed

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from torch import Tensor

    from gddlab.evaluation import Record
    from gddlab.nets import Denoiser

SCORE = "rel_update"
METRIC = "fd-lite2"
GRID = 64
PROBED = 48
COMPLETED, WAYS = 8, 4
"""Held-out images that the student completes, and in how many ways."""
SHOWN = {"digits": "handwritten digits", "emoji": "emoji"}
"""What the images show, by the bundled data set, which is also the name of its teacher and preset."""
CORRELATION = (
    "How like its output at sigma = 80 each convolution's output is at the other noise levels: correlation over images."
)
CODE = """import gddlab

teacher = gddlab.load_teacher("{data}")
result = gddlab.probe(teacher, 18)
mask = gddlab.select_freeze(teacher, strategy="gdd-i")
config = gddlab.presets.{data}(mask=mask, run_dir="runs/a", seed={seed})
run = gddlab.train(config, nproc={nproc})
run.watch()
scores = gddlab.evaluate(run.student())"""


def demo(
    out: str | Path = "demo", *, data: str = "digits", seed: int = 0, nproc: int = 1, recompute: bool = False
) -> dict[str, Any]:
    """Probe, mask, GDD-I training, evaluation against the teacher; writes index.html and demo.json.

    The mask that trains is the authors' rule (option 1); one chosen by measurement is shown beside it. The same call on
    the same folder continues an interrupted demo.

    Args:
        out: Folder.
        data: "digits", or "emoji", in colour.
        seed: Seed of the training.
        nproc: Processes of the training.
        recompute: Scores the teacher again, which takes minutes, instead of reading the scores that ship with it.

    Returns:
        The content of demo.json: fd_teacher_1, fd_teacher_18, fd_student, fd_real_split, frozen_fraction, kimg, seconds
        and more.

    Raises:
        GddlabError: Other `data`, or a run of another configuration in `out`.
    """
    from gddlab.evaluation import evaluate_snapshots
    from gddlab.reporting.pages import of_figure, of_pixels
    from gddlab.reporting.run_pages import run_page
    from gddlab.reporting.run_summary import Summary
    from gddlab.runtime import peak_memory_mib

    began = time.perf_counter()
    if data not in SHOWN:
        raise unknown("data of the demo", data, SHOWN)
    out = path_of("out", out)
    teacher = gddlab.load_teacher(data)
    say(f"teacher   {teacher.card.parameters:,} parameters, {teacher.card.unet}, from {teacher.card.source}")

    result = gddlab.probe(teacher, 18, n=PROBED)
    result.save(out / "probe")
    layers = result.frame["layer"].nunique()
    say(f"probe     {layers} layers and blocks at {len(result.sigmas)} noise levels, {PROBED} images each")

    mask = gddlab.select_freeze(teacher, strategy="gdd-i")
    measured = gddlab.select_freeze(result, strategy="budget", score=SCORE, budget=mask.fraction)
    mask.save(out / "mask.json")
    measured.save(out / "mask-measured.json")
    say(f"mask      GDD-I freezes {mask.fraction:.1%} of the parameters; the measured one {measured.fraction:.1%}")

    config = gddlab.presets.preset(data, mask=mask, run_dir=out / "run", seed=seed)
    continued = (config.run_dir / "config.json").exists()
    run = gddlab.train(config, nproc=nproc)
    events = out / "run" / "events"
    say(f"train     GDD-I, {config.total_kimg:g} thousand images; follow it with: tensorboard --logdir {events}")
    run.watch()

    student = run.student()
    scores = evaluate_snapshots(run, say=say)
    references = {s.sampler: s for s in _teacher_scores(teacher, recompute) if s.name == METRIC and s.sampler != "data"}
    split = gddlab.real_split(config.data, metrics=("fid",), progress=False).record(METRIC)
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
        "peak_mem_mib": peak_memory_mib() + nproc * float(run.metrics["peak_mem_mib"].max()),  # at one time, at most
        "seconds": round(time.perf_counter() - began, 1),
    }
    grids = _grids(teacher, gddlab.sample(student, GRID, seed=0))
    save_figure(_picture(grids), out / "images.png", dpi=110)
    summary = Summary(run, "demo")
    summary.teacher = (*references.values(), split)
    headline = {
        "student, 1 step": f"{final.value:.1f}",
        "teacher, 18 steps": f"{numbers['fd_teacher_18']:.1f}",
        "teacher, 1 step": f"{numbers['fd_teacher_1']:.0f}",
        f"two halves of the real images, n = {split.n}": f"{split.value:.1f}",
        "of the parameters frozen": f"{mask.fraction:.1%}",
    }
    page = run_page(
        summary,
        "demo.html.j2",
        title="gddlab: a diffusion model becomes a one-step generator",
        final=final,
        headline=headline,
        shown=SHOWN[data],
        networks=[of_pixels(pixels, title) for title, pixels in grids.items()],
        completed=of_pixels(_completed(student, data), f"images, their upper halves, and {WAYS} completions of each"),
        images=result.meta["n_images"],
        update=of_figure(result.heatmap("rel_update"), "heat map of the relative update"),
        similarity=of_figure(result.heatmap("correlation"), "heat map of correlations", CORRELATION),
        score=SCORE,
        masks=[of_figure(mask.plot(), "the rule's mask"), of_figure(measured.plot(), "the measured mask")],
        code=CODE.format(data=data, seed=seed, nproc=nproc),
    )
    write_text(out / "index.html", page)
    numbers["seconds"] = round(time.perf_counter() - began, 1)
    write_json(out / "demo.json", numbers)
    say(
        f"result    {final.metric}: student, one step {final.value:.1f}; "
        f"teacher, 18 steps {numbers['fd_teacher_18']:.1f}, 1 step {numbers['fd_teacher_1']:.0f}; "
        f"two halves of the real images {split.value:.1f} ({split.metric})"
    )
    say(f"page      {out / 'index.html'}  ({numbers['seconds']:.0f} s)")
    return numbers


def _teacher_scores(teacher: Any, recompute: bool) -> list[Record]:
    from gddlab.evaluation import Record
    from gddlab.evaluation.run_scores import STEPS

    if recompute:
        return [r for k in STEPS for r in gddlab.evaluate(teacher, metrics=("fid",), steps=k)]
    if not teacher.card.scores:
        raise GddlabError(f"no scores beside {teacher.card.source}: run gddlab teacher score, or demo --recompute")
    return [Record.from_dict(s) for s in teacher.card.scores]


def _grids(teacher: Denoiser, images: Tensor) -> dict[str, np.ndarray]:
    """Images of seeds 0 to 63 as grids: the teacher's, as they ship with it, and the student's."""
    import numpy as np
    from PIL import Image

    from gddlab.sampling import image_grid

    folder = data_dir() / "teachers" / teacher.card.name
    out: dict[str, np.ndarray] = {}
    for steps in (1, 18):
        calls = 2 * steps - 1
        title = f"teacher, {steps} step{'s' if steps > 1 else ''} ({calls} network call{'s' if calls > 1 else ''})"
        out[title] = np.asarray(Image.open(folder / f"samples-{steps}.png").convert("RGB"))
    out["student, 1 step (1 network call)"] = image_grid(images, columns=8)
    return out


def _completed(student: Denoiser, data: str) -> np.ndarray:
    """Held-out images, row by row: whole, their upper halves, and completions by the student; a column each."""
    import torch

    from gddlab.sampling import image_grid

    images = gddlab.open_dataset(f"{data}:held-out").images(slice(0, COMPLETED))
    known = images.clone()
    known[..., images.shape[-2] // 2 :, :] = 0  # grey
    found = gddlab.inpaint(student, images, "top", n=WAYS, progress=False).images
    return image_grid(torch.cat([images, known, *found.unbind(1)]), columns=COMPLETED)


@themed
def _picture(grids: dict[str, np.ndarray]) -> Figure:
    """The grids side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(grids), 4.3), layout="constrained")
    for ax, (title, pixels) in zip(figure.subplots(1, len(grids)), grids.items(), strict=True):
        ax.imshow(pixels, interpolation="nearest")
        ax.set_axis_off()
        ax.set_title(title, fontsize=11)
    return figure
