"""The command line. Every command is a call of the Python API.

A command is a function below. Its `**options` stand for the keyword arguments of the library function that is named
beside it, and their help is the `Args:` section of that function's docstring. The library is imported when a command is
chosen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import Positional

import gddlab
from gddlab.cli_options import Command, in_one_line
from gddlab.errors import GddlabError, unknown
from gddlab.files import atomic_path, check_free, folder_of, is_run, path_of, write_json
from gddlab.memory import keep_memory
from gddlab.progress import say

if TYPE_CHECKING:
    from gddlab.diagnosis import Doctor

COMMANDS: dict[str, Command] = {}
"""By name, in the order of use; a name of two words belongs to a group."""
GROUPS = {"teacher": "Teachers: train one, show a card, score one.", "mask": "Freeze masks: show one, compare several."}


def command(
    name: str, *sources: str, omit: str = "", **parts: Callable[[list[str]], Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function as a command; arguments as in `Command`."""

    def register(run: Callable[..., None]) -> Callable[..., None]:
        COMMANDS[name] = Command(run, sources, (*omit.split(), "progress"), parts)
        return run

    return register


@command("demo", "gddlab.demo:demo")
def demo(out: Path = Path("demo"), **options: Any) -> None:
    """Goes the whole way on bundled images: probe, mask, GDD-I, evaluation, and a page to look at.

    Args:
        out: Folder for the page, numbers and the run. An interrupted demo continues there.
    """
    from gddlab.demo import demo

    with following(out / "run"):
        demo(out, **options)


@command("teacher train", config=lambda words: teacher_of(words))
def teacher_train(config: gddlab.TeacherConfig) -> None:
    """Trains a diffusion teacher. The same command continues."""
    say(gddlab.train_teacher(config))


@command("teacher show", "gddlab.teachers:load_teacher")
def teacher_show(source: Positional[str] = "digits") -> None:
    """Prints the card of a teacher: what it is, where it comes from, how good it is."""
    say(gddlab.load_teacher(source).card)


@command("teacher score", "gddlab.evaluation.run_scores:score_teacher")
def teacher_score(run_dir: Positional[Path], **options: Any) -> None:
    """Scores a teacher at 1, 5 and 18 Heun steps, and two halves of the real set. Writes scores.json and samples."""
    from gddlab.evaluation.run_scores import score_teacher

    for record in score_teacher(run_dir, **options):
        say(f"{record.metric:<20} {record.value:10.3f}  {record.sampler}")


@command("convert", "gddlab.teachers:convert", "gddlab.teachers:load_teacher")
def convert(source: Positional[str], out: Positional[Path], **options: Any) -> None:
    """Turns an EDM pickle into a safetensors file with equal outputs. The pickle is read as data and never run."""
    done = gddlab.convert(source, out, **options)
    say(done.card)
    say(done)


@command("export", "gddlab.nets.export:export")
def export(model: Positional[str], out: Positional[Path], **options: Any) -> None:
    """Writes a one-step student for use without gddlab: ONNX (.onnx) or a torch.export program (.pt2).

    Args:
        model: Run directory of a student, or a file with one.
    """
    say(gddlab.export(gddlab.load_teacher(model), out, **options))


@command("prepare", "gddlab.datasets:prepare", "gddlab.datasets:open_dataset")
def prepare(source: Positional[str], out: Positional[Path | None] = None, **options: Any) -> None:
    """Makes an EDM zip with a manifest from images. The same command continues.

    Args:
        source: Folder, zip, cifar10, cifar-10-python.tar.gz, or hf:NAME[:CONFIG][:SPLIT].
    """
    report = gddlab.prepare(source, out, **options)
    for line in str(report).splitlines():
        say(COMMANDS["prepare"].in_shell_words(line))
    if not report.ok:
        sys.exit(2)


@command("probe", "gddlab.probing:probe", omit="class_labels")
def probe(
    teacher: Positional[str],
    out: Path = Path("probe"),
    timesteps: int | None = None,
    sigmas: tuple[float, ...] = (),
    told: tuple[str, ...] = (),
    dry_run: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> None:
    """Measures the activation of layers at each noise level. Saves the table, arrays and a heat map of each statistic.

    Args:
        teacher: Name, pickle, .pt or .safetensors file, run directory, or folder of diffusers.
        out: Folder for the result.
        timesteps: Number of noise levels, 80 to 0.002 with rho = 7 within the network's range; 18, or 6 with --told
            cross, if not given.
        sigmas: The noise levels themselves, in place of --timesteps.
        told: What noise level the network is told, if not its input's: "cross" tells it each level for each input, and
            draws what each layer responds to; or levels, told for every input.
        dry_run: Measures one pass, prints the time and memory that all would take, and writes nothing.
        overwrite: Replaces a result that is there.
    """
    check_folder(out, overwrite or dry_run)
    if timesteps is not None:
        options["timesteps"] = timesteps
    options |= timesteps_of(sigmas, options)
    if told:
        options["told"] = "cross" if told == ("cross",) else [_number("told", t) for t in told]
    model = gddlab.load_teacher(teacher)
    if dry_run:
        say(gddlab.estimate(model, **options))
    else:
        save_result(gddlab.probe(model, **options), out)


@command("ablate", "gddlab.probing:ablate", "gddlab.probing:probe", omit="class_labels")
def ablate(
    teacher: Positional[str],
    out: Path = Path("ablation"),
    sigmas: tuple[float, ...] = (),
    overwrite: bool = False,
    **options: Any,
) -> None:
    """Replaces the output of one layer after the other, and measures what that does to the denoised image.

    Args:
        teacher: Name, pickle, .pt or .safetensors file, run directory, or folder of diffusers.
        out: Folder for the result.
        sigmas: The noise levels themselves, in place of --timesteps.
        overwrite: Replaces a result that is there.
    """
    check_folder(out, overwrite)
    options |= timesteps_of(sigmas, options)
    save_result(gddlab.ablate(gddlab.load_teacher(teacher), **options), out)


@command(
    "trace", "gddlab.evaluation.trace:trace", "gddlab.probing:ablate", "gddlab.probing:probe", omit="donor class_labels"
)
def trace(
    teacher: Positional[str],
    out: Path = Path("trace"),
    steps: int | None = None,
    sigmas: tuple[float, ...] = (),
    donor: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> None:
    """Disturbs one layer in one step of the sampler, one after the other, and measures the final images.

    Args:
        teacher: Name, pickle, .pt or .safetensors file, run directory, or folder of diffusers; of a student, too.
        out: Folder for the result.
        steps: Number of steps; by default 18 of a teacher, a student's own.
        sigmas: The noise levels that the steps start from, in place of --steps.
        donor: With --mode donor the network that gives the outputs, as TEACHER.
        overwrite: Replaces a result that is there.
    """
    check_folder(out, overwrite)
    if sigmas and steps is not None:
        raise GddlabError("--sigmas and --steps: give one of them")
    other = None if donor is None else gddlab.load_teacher(donor)
    how = list(sigmas) or steps
    save_result(gddlab.trace(gddlab.load_teacher(teacher), how, donor=other, **options), out)


@command("decode", "gddlab.probing:decode", "gddlab.probing:probe", omit="class_labels")
def decode(
    teacher: Positional[str],
    out: Path = Path("decode"),
    sigmas: tuple[float, ...] = (),
    overwrite: bool = False,
    **options: Any,
) -> None:
    """Reads image, noise, class and noise level out of each layer by linear readouts, scored on held-out images.

    Saves the table, heat maps, and readouts.png with the chance level.

    Args:
        teacher: Name, pickle, .pt or .safetensors file, run directory, or folder of diffusers.
        out: Folder for the result.
        sigmas: The noise levels themselves, in place of --timesteps.
        overwrite: Replaces a result that is there.
    """
    check_folder(out, overwrite)
    options |= timesteps_of(sigmas, options)
    save_result(gddlab.decode(gddlab.load_teacher(teacher), **options), out)


@command("lens", "gddlab.probing:lens", "gddlab.probing:probe", omit="class_labels timesteps")
def lens(
    teacher: Positional[str],
    out: Path = Path("lens"),
    sigmas: tuple[float, ...] = (),
    overwrite: bool = False,
    **options: Any,
) -> None:
    """Shows the denoised image as it is after each layer, with the rest bypassed, or as a readout finds it there.

    Saves the images, their distances to the output and to the clean images, and grid.png.

    Args:
        teacher: Name, pickle, .pt or .safetensors file, run directory, or folder of diffusers.
        out: Folder for the result.
        sigmas: The noise levels; by default 80, 5, 1 and 0.2, within the network's range.
        overwrite: Replaces a result that is there.
    """
    from gddlab.theme import save_figure

    check_folder(out, overwrite, kind=gddlab.Lens)
    found = gddlab.lens(gddlab.load_teacher(teacher), list(sigmas) or None, **options)
    found.save(out)
    with atomic_path(out / "distances.csv") as path:
        found.to_frame().to_csv(path, index=False)
    save_figure(found.grid(), out / "grid.png")
    say(f"{out}: {found}")


@command("freeze", "gddlab.freezing:select_freeze")
def freeze(
    source: Positional[str],
    out: Path = Path("mask.json"),
    strategy: str = "gdd-i",
    mask: Path | None = None,
    overwrite: bool = False,
    **options: Any,
) -> None:
    """Chooses a freeze mask, by a rule on roles of layers or by a measured score, and saves it as JSON.

    Args:
        source: A teacher, or a folder that `gddlab probe` or `gddlab ablate` wrote.
        out: File for the mask.
        strategy: By rules: gdd-i, gdd-i-2, gdd-i-3, none, all-conv, norms-only. By --score: budget, per-resolution,
            threshold. By chance: random. The opposite of --mask: invert.
        mask: The mask that invert inverts, or whose share random takes.
        overwrite: Replaces a mask that is there.
    """
    from gddlab.teachers import bundled_teachers

    folder = path_of("source", source)
    measured = source not in bundled_teachers() and (folder / "frame.parquet").exists()
    try:
        network = gddlab.ProbeResult.load(folder) if measured else gddlab.load_teacher(source)
    except GddlabError as e:
        raise e if folder.exists() else GddlabError(f"{e}; or a folder that gddlab probe wrote") from None
    gddlab.FreezeMask.check_place(out)
    check_free(out, overwrite)
    if mask is not None:
        options["mask"] = gddlab.FreezeMask.load(mask)
    chosen = gddlab.select_freeze(network, strategy=strategy, **options)
    chosen.save(out)
    say(chosen.summary().to_string(formatters={"share": "{:.1%}".format}))
    say(f"{out}: {chosen}")


@command("mask show")
def mask_show(mask: Positional[Path], names: bool = False) -> None:
    """Shows what a mask freezes, by stage and kind of layer.

    Args:
        mask: File of a mask.
        names: Lists the frozen parameters too.
    """
    shown = gddlab.FreezeMask.load(mask)
    say(shown)
    say(shown.summary().to_string(formatters={"share": "{:.1%}".format}))
    for name in shown.frozen if names else ():
        say(name)


@command("mask compare")
def mask_compare(masks: Positional[tuple[Path, ...]]) -> None:
    """Compares masks of one network: how much they share, and for two masks which parameters differ.

    Args:
        masks: Files of two or more masks.
    """
    if len(masks) < 2:
        raise GddlabError(f"mask compare takes several masks, {len(masks)} given: name two files or more")
    loaded = {f"{i}: {path}": gddlab.FreezeMask.load(path) for i, path in enumerate(masks)}
    found = gddlab.compare(loaded)
    say(found.to_frame().round(4).to_string(na_rep="-"))
    say("\noverlap of the frozen parameters (Jaccard index)")
    say(found.overlap.round(3).to_string())
    if len(loaded) == 2:
        first, second = loaded.values()
        table = first.diff(second).rename(columns=dict(zip(("self", "other"), loaded, strict=True)))
        say(f"\n{len(table)} parameters differ" + (":" if len(table) else ""))
        if len(table):
            say(table.to_string(index=False))


def first_word(words: list[str]) -> str:
    """The preset that a line begins with."""
    return words[0] if words and not words[0].startswith("-") else "digits"


def preset_of(words: list[str]) -> gddlab.TrainConfig:
    """The preset that a line begins with, with the parts that it chooses: its fields are the defaults of the options.

    The kind of a part decides which options there are; "none" omits the part. An option of augment adds it.
    """
    name = first_word(words)
    words = [w for word in words for w in word.split("=", 1)]
    kinds = {flag[2:-5]: kind for flag, kind in itertools.pairwise(words) if re.fullmatch(r"--\w+\.kind", flag)}
    parts: dict[str, Any] = {part: None if kind == "none" else {"kind": kind} for part, kind in kinds.items()}
    if any(w.startswith("--augment.") or (w == "--help" and None not in parts.values()) for w in words):
        parts["augment"] = {}
    return gddlab.presets.preset(name, run_dir=f"runs/{name}", **parts)


def teacher_of(words: list[str]) -> gddlab.TeacherConfig:
    """The defaults of `gddlab teacher train`: those of the network that --network names."""
    words = [w for word in words for w in word.split("=", 1)]
    dit = ("--network", "dit") in itertools.pairwise(words)
    return gddlab.TeacherConfig(run_dir=Path("runs/teacher"), network="dit" if dit else "unet")


def kinds_of(words: list[str]) -> Any:
    """Options that choose the kind of a part. `preset_of` reads them; they stand here for --help and to be checked."""
    from gddlab.distill.parts import parts_of

    config, options = preset_of(words), []
    for name, field in type(config).model_fields.items():
        if kinds := [kind for kind in parts_of(field.annotation) if kind]:
            text = f"{', '.join(kinds)} or none. With another kind before it, --help lists the options of that kind."
            about = tyro.conf.arg(name=f"{name}.kind", help=text, metavar="KIND")
            option = Annotated[Literal[(*kinds, "none")], about]  # type: ignore[valid-type]
            part = getattr(config, name)
            options.append((name, option, dataclasses.field(default="none" if part is None else part.kind)))
    return dataclasses.make_dataclass("Kinds", options, frozen=True)()


@command("train", "gddlab.launch:train", parts=kinds_of, config=preset_of)
def train(
    config: gddlab.TrainConfig,
    preset: Positional[str] = "digits",
    mask: Path | None = None,
    strategy: str | None = None,
    fast: bool = False,
    detach: bool = False,
    print_launch: Literal["torchrun", "slurm"] | None = None,
    **options: Any,
) -> None:
    """Trains a one-step student: GDD-I with a mask, GDD without. The same command continues a run.

    The discriminator, the instance loss and augmentation are parts with options of their own, under their names.
    Augmentation is off unless one of its options is given.

    Args:
        preset: First word: the preset that gives the fields not named here: digits, cifar10, cifar10_cond, afhqv2,
            ffhq, imagenet64.
        mask: Freeze mask (GDD-I), a file that `gddlab freeze` wrote. Without mask and strategy: GDD.
        strategy: A rule in place of a file, such as gdd-i: makes the mask from the names and classes of the teacher's
            layers.
        fast: Fast mode: bfloat16 in student and discriminator, fakes reused, channels last. Results differ from those
            of the preset.
        detach: Returns at once, while the run continues.
        print_launch: Trains nothing: writes the configuration to the run directory and prints the command that trains
            it, a line or a batch script.
    """
    from gddlab.launch.plan import HEAD, Launch, prepared

    config = configured(config, mask, strategy, fast)
    if print_launch is not None:
        if print_launch == "slurm":
            options = {"rdzv_endpoint": HEAD} | options
        say(prepared(config, Launch(**options), print_launch))
        return
    with following(config.run_dir):
        run = gddlab.train(config, **options)
        if not detach:
            run.watch()
    say(run)


@contextlib.contextmanager
def following(run_dir: Path) -> Iterator[None]:
    """Says on Ctrl-C whether the run goes on, and how to end it."""
    from gddlab.lock import held

    try:
        yield
    except KeyboardInterrupt:
        if held(run_dir):
            raise KeyboardInterrupt(f"{run_dir} is still running: gddlab watch, stop or kill {run_dir}") from None
        raise KeyboardInterrupt(f"nothing runs in {run_dir}") from None


@command("watch")
def watch(run_dir: Positional[Path]) -> None:
    """Follows a run to its end. Ctrl-C leaves it running."""
    run = gddlab.attach(run_dir)
    with following(run.run_dir):
        run.watch()
    say(run)


@command("stop")
def stop(run_dir: Positional[Path], timeout: float = 120) -> None:
    """Asks a run to write a checkpoint and end, and waits for that. The same train command continues it.

    Args:
        timeout: Seconds to wait.
    """
    say(gddlab.attach(run_dir).stop(timeout))


@command("kill")
def kill(run_dir: Positional[Path]) -> None:
    """Ends a run on this machine at once. The same train command continues it from its last checkpoint."""
    say(gddlab.attach(run_dir).kill())


@command("preflight", "gddlab.diagnosis.preflight:preflight", "gddlab.cli:train", parts=kinds_of, config=preset_of)
def preflight(
    config: gddlab.TrainConfig,
    preset: Positional[str] = "digits",
    mask: Path | None = None,
    strategy: str | None = None,
    fast: bool = False,
    stand_in: bool = False,
    json: bool = False,
    **options: Any,
) -> None:
    """Says what a run needs, whether it is there, how long it will take and how much memory.

    The exit code is 1 if something is missing.

    Args:
        json: Prints JSON.
    """
    from gddlab.diagnosis.preflight import stand_ins

    teacher = None
    if strategy is not None:
        try:
            teacher = stand_ins(config)[0] if stand_in else gddlab.load_teacher(config.teacher)
        except (GddlabError, OSError):
            strategy = None  # the page lists the teacher among what is missing
    found = gddlab.preflight(configured(config, mask, strategy, fast, teacher), stand_in=stand_in, **options)
    say(to_json(found.to_dict()) if json else found)
    if not found.ok:
        sys.exit(1)


@command("runs")
def runs(folder: Positional[Path] = Path("runs"), state: bool = False, json: bool = False) -> None:
    """Lists the runs below a folder, with their states.

    Args:
        folder: Folder of run directories, or one of them.
        state: Prints only the states, one word per run: starting, running, done, failed, stopped.
        json: Prints JSON.
    """
    from gddlab.runs import list_runs

    found = list_runs(folder)
    if json:
        say(to_json(found))
    elif state:
        say("\n".join(row["state"] for row in found))
    else:
        print_table(found)


def sampler_of(words: list[str]) -> Any:
    """EDM's sampler, whose fields are options of `sample` and `evaluate`."""
    from gddlab.sampling.samplers import Sampler

    flags = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    named = [f.name for f in dataclasses.fields(Sampler) if f.name in flags - {"steps"}]

    @dataclasses.dataclass(frozen=True)
    class Settings(Sampler):
        __doc__ = str(Sampler.__doc__).partition("\n")[0]  # the heading of these options
        steps: Annotated[int, tyro.conf.arg(name="sampler.steps"), tyro.conf.Suppress] = 18  # --steps is their own

        @property
        def given(self) -> dict[str, Any]:
            """What the line names; a student refuses these at their defaults too."""
            return {name: getattr(self, name) for name in named}

    return Settings()


@command(
    "sample",
    "gddlab.sampling:sample_files",
    "gddlab.sampling:sample",
    omit="class_labels device timeout_s",
    sampler=sampler_of,
)
def sample(
    model: Positional[str],
    out: Path = Path("samples.png"),
    label: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    nproc: int = 1,
    overwrite: bool = False,
    sampler: Any = None,
    **options: Any,
) -> None:
    """Draws images to a PNG grid, a folder of PNG files, or an EDM zip. For folder and zip the same command continues.

    Args:
        model: Run directory of a student, name of a teacher, EDM pickle, or .safetensors file.
        out: File that ends in .png (a grid) or .zip, or a folder.
        label: For a conditional network: class of all images; by default the classes in turn.
        dtype: Precision of the network, under autocast.
        nproc: Processes on this machine, for a folder or zip. On several machines run the same command under torchrun.
        overwrite: Replaces a grid that is there.
    """
    from gddlab.sampling import save_grid

    options |= sampler.given | {"class_labels": label, "dtype": None if dtype == "float32" else dtype}
    if out.suffix.lower() != ".png":
        if overwrite:
            raise GddlabError(f"--overwrite with --out {out}: it replaces a grid; delete the folder or .zip yourself")
        say(gddlab.sample_files(model, out, nproc=nproc, **options))
        return
    if nproc != 1:
        raise GddlabError(f"nproc={nproc} for a grid: several processes write a folder or a .zip")
    check_free(out, overwrite)
    save_grid(gddlab.sample(network(model), progress=True, **{"batch_size": 64} | options), out)
    say(out)


def check_grid(out: Path, overwrite: bool) -> None:
    """Refuses a file that is there, and one that by its name is no PNG, before the work is done."""
    if out.suffix.lower() != ".png":
        raise GddlabError(f"--out {out}: a grid is a PNG, give a name that ends in .png")
    check_free(out, overwrite)


@command("invert", "gddlab.editing:invert", omit="class_labels dtype")
def invert(
    model: Positional[str],
    data: Positional[str],
    images: int = 16,
    start: int = 0,
    label: int | None = None,
    out: Path = Path("inverted"),
    **options: Any,
) -> None:
    """Finds the noise from which a student makes images. The same command continues.

    Args:
        model: Run directory of a student, or .safetensors file.
        data: Images by name or path.
        images: How many.
        start: The first of them.
        label: For a conditional student: class of all images; by default it is searched for.
        out: Folder for the noise, inversion.safetensors, and for a grid of the images given, above, and found.
    """
    import torch

    from gddlab.sampling import save_grid

    given = _images(data, start, images)
    check_free(out / "images.png", (out / "inversion.json").exists())
    found = gddlab.invert(network(model), given, class_labels=label, out=out, **options)
    found.save(out / "inversion.safetensors")
    save_grid(torch.cat([given, found.images]), out / "images.png", columns=len(given))
    say(found)
    say(out)


@command("inpaint", "gddlab.editing:inpaint", "gddlab.editing:restore", omit="class_labels dtype")
def inpaint(
    model: Positional[str],
    data: Positional[str],
    keep: str = "top",
    images: int = 8,
    start: int = 0,
    label: int | None = None,
    out: Path = Path("inpainted.png"),
    overwrite: bool = False,
    **options: Any,
) -> None:
    """Completes images of which some pixels are known, and compares with what was hidden.

    Args:
        model: Run directory of a student, or .safetensors file; a teacher for --method teacher.
        data: Images by name or path.
        keep: What is known: top, bottom, left, right, border, or a PNG of the images' size, light where it is known.
        images: How many.
        start: The first of them.
        label: For a conditional network: class of all images; by default the classes in turn.
        out: Grid: each row an image, what is known of it, and its completions.
        overwrite: Replaces that file.
    """
    import torch

    from gddlab.editing.operators import check_keep
    from gddlab.sampling import save_grid

    check_grid(out, overwrite)
    given = _images(data, start, images)
    mask = check_keep(_mask(keep, given.shape[-1]) if Path(keep).suffix else keep, len(given), given.shape[1:])
    found = gddlab.inpaint(network(model), given, mask, class_labels=label, **options)
    rows = torch.cat([given[:, None], torch.where(mask, given, 0.0)[:, None], found.images], 1)
    save_grid(rows.flatten(0, 1), out, columns=rows.shape[1])
    say(found)
    say(found.scores(given).round(4).to_string(index=False))
    say(out)


@command("edit", "gddlab.editing:edit", omit="source strength class_labels towards strokes direction layers")
def edit(
    model: Positional[str],
    seeds: tuple[int, ...] = (0, 1, 2, 3),
    strength: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0),
    towards: tuple[int, ...] | None = None,
    label: int | None = None,
    layer: str | None = None,
    component: int = 0,
    layers: tuple[str, ...] | None = None,
    out: Path = Path("edited.png"),
    overwrite: bool = False,
    **options: Any,
) -> None:
    """Changes images of a student: towards others, to another class, or along a direction at a layer.

    Args:
        model: Run directory of a student, or .safetensors file.
        seeds: Of the images.
        strength: Of the edit; 0 leaves an image as it is, 1 is the whole edit; standard deviations along a direction.
        towards: Seeds of other images, as many.
        label: Class that the images shall have.
        layer: Layer whose principal component is followed.
        component: Which one, the largest first.
        layers: With --towards and --label: the layers that see the edit.
        out: Grid: each row an image and its edits.
        overwrite: Replaces that file.
    """
    import torch

    from gddlab.sampling import save_grid

    check_grid(out, overwrite)
    if not 0 <= component < 100 or (component and layer is None):
        raise GddlabError(f"--component {component}: give 0 to 99, with --layer")
    if (towards, label, layer) == (None, None, None):
        raise GddlabError("nothing to change: give --towards, --label or --layer")
    if layers is not None and layer is not None:
        raise GddlabError("--layers with --layer: it goes with --towards and --label")
    student = network(model)
    direction = None if layer is None else gddlab.directions(student, layer, k=component + 1)[component]
    how: dict[str, Any] = {"class_labels": label, "towards": towards, "direction": direction, "layers": layers}
    found = gddlab.edit(student, seeds, strength=strength, **how, **options)
    rows = torch.cat([found.before[:, None], found.images], 1)
    save_grid(rows.flatten(0, 1), out, columns=rows.shape[1])
    say(found)
    say(out)


@command("evaluate", "gddlab.evaluation:evaluate", sampler=sampler_of)
def evaluate(
    model: Positional[str],
    snapshot: str | None = None,
    sigmas: tuple[float, ...] | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    sampler: Any = None,
    **options: Any,
) -> None:
    """Scores a student, a teacher, a dataset or a folder of images against real images.

    The records of a run are also added to its evaluation.jsonl.

    Args:
        model: Run directory of a student, name of a teacher, EDM pickle, .safetensors file, folder or zip of images, or
            data:NAME for a dataset.
        snapshot: Of a run: the snapshot by its thousands of images, or best; by default the final student.
        sigmas: For a student: the noise levels of its steps, descending from 80; by default its own.
        out: Also writes the records to this file, JSON.
        overwrite: Replaces that file.
    """
    from gddlab.evaluation import append_records
    from gddlab.runtime import chosen_device
    from gddlab.teachers.catalog import run_of

    if out is not None:
        check_free(out, overwrite)
    if sigmas is not None:
        options["sigmas"] = sigmas
    run_dir = None if model.startswith("data:") else run_of(model)
    if snapshot is not None and run_dir is None:
        raise GddlabError(f"snapshot {snapshot} of {model}, which is no run directory: omit --snapshot")
    source: Any = model if snapshot is None else gddlab.load_run(model).student(snapshot).to(chosen_device())
    scores = gddlab.evaluate(source, **options, **sampler.given)
    if int(os.environ.get("RANK", 0)):
        return  # every rank has the scores, the first one reports them
    say(scores)  # first: a folder may not let them be written
    try:
        if out is not None:
            write_json(out, [r.to_dict() for r in scores])
    finally:  # whether or not the file could be written
        if run_dir is not None:
            append_records(run_dir, list(scores))


@command("judge", "gddlab.evaluation:train_judge")
def judge(data: Positional[str], run_dir: Path = Path("runs/judge"), **options: Any) -> None:
    """Trains a judge, a small classifier of labelled images, to score by: `gddlab evaluate --extractor RUN_DIR`.

    Args:
        data: Name or path of labelled images; two thirds of them are trained on, the judge is scored on the rest.
    """
    from gddlab.files import read_jsonl

    say(gddlab.train_judge(data, run_dir, **options))
    say(f"held-out accuracy {read_jsonl(run_dir / 'metrics.jsonl')[-1]['accuracy']:.2%}")


@command("reference", "gddlab.evaluation:reference", "gddlab.evaluation:evaluate")
def reference(data: Positional[str], out: Path = Path("reference.npz"), **options: Any) -> None:
    """Writes what images are scored against: mean and covariance of the features of real images."""
    say(gddlab.reference(data, out, **options))


@command("reproduce", "gddlab.experiments:reproduce")
def reproduce(
    name: Positional[str],
    out: Path = Path("reproduction"),
    only: tuple[str, ...] = (),
    seeds: int | None = None,
    jobs: int = 1,
    dry_run: bool = False,
    ship: Path | None = None,
    **options: Any,
) -> None:
    """Runs a declared list: teachers, experiments, then studies. What is done is skipped, what was killed continues.

    Several processes may share one folder.

    Args:
        out: Folder for the runs.
        dry_run: Lists what is run, with state and time, and starts nothing.
        ship: Writes the small files of finished runs to this folder, and starts nothing.
    """
    from gddlab import experiments
    from gddlab.progress import duration

    if ship is not None and dry_run:
        raise GddlabError("--ship with --dry-run: give one of them")
    if ship is not None:
        for path in experiments.ship(name, out, ship, only=only):
            say(path)
        return
    chosen: dict[str, Any] = {"only": only, "seeds": seeds}
    if not dry_run:
        gddlab.reproduce(name, out=out, say=say, jobs=jobs, **chosen, **options)
    items = experiments.plan(name, out=out, **chosen)
    listed = experiments.LISTS[name]
    width = max(len(str(p)) for p in items)
    for p in items:
        asked = listed.notebooks_of(p.item.name)
        time = "?" if p.seconds is None else duration(p.seconds)
        read_by = f" ({', '.join(asked)})" if asked else ""
        say(f"{p!s:<{width}}  {p.state:<11}  {time:>12}  {p.item.what}{read_by}")
    left = [p for p in items if p.state != "done"]
    hours = sum(p.seconds or 0 for p in left) / 3600
    at_once = f", {jobs} at a time" if jobs > 1 or listed.threads else ""
    rest = f"the rest takes about {hours / jobs:.1f} hours on {listed.machine}{at_once}"
    if untimed := sum(p.seconds is None for p in left):
        rest += f", not counting {untimed} that were never timed: see gddlab preflight {name}"
    took = sum(p.seconds or 0 for p in items if p.state == "done") / 3600
    say(f"{len(items) - len(left)} of {len(items)} are done, in {took:.1f} hours without scores; {rest}")


@command("report", "gddlab.reporting.report:report")
def report(runs: Positional[tuple[str, ...]], out: Path = Path("report.html")) -> None:
    """Writes a self-contained HTML page of a run: configuration, curves, scores, samples; or compares several runs."""
    say(gddlab.report(runs, out))


@command("doctor")
def doctor(json: bool = False) -> None:
    """Says what this machine has (devices, versions, weights, data), what is missing, and what gddlab can do with it.

    Args:
        json: Prints JSON.
    """
    found = gddlab.doctor()
    if json:
        say(to_json(found.to_dict()))
    elif console := terminal():
        print_findings(found, console)
    else:
        say(found)
    if found.broken:
        sys.exit(2)


# What commands read, print and write.


def network(source: str) -> Any:
    """A teacher or student by name or path, also a run in an archive, on the GPU where there is one."""
    from gddlab.runs import place_of
    from gddlab.runtime import chosen_device

    place = place_of(Path(source))
    return gddlab.load_teacher(place if is_run(place) else source).to(chosen_device())


def to_json(value: object) -> str:
    """Strict JSON, indented."""
    return json.dumps(value, indent=2, allow_nan=False)


def check_folder(folder: Path, overwrite: bool, *, kind: Any = None) -> None:
    """Refuses a folder that cannot be written, or holds something else, before minutes are spent.

    `kind` is the class of what is written, ProbeResult if not given.
    """
    folder_of("out", folder)
    (kind or gddlab.ProbeResult).check_place(folder)
    check_free(folder, overwrite)


def timesteps_of(sigmas: tuple[float, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The noise levels of --sigmas as the library takes them."""
    if sigmas and "timesteps" in options:
        raise GddlabError("--sigmas and --timesteps: give one of them")
    return {"timesteps": list(sigmas)} if sigmas else {}


def _images(data: str, start: int, n: int) -> Any:
    """Some images of a dataset by name or path, float (n, C, H, W)."""
    whole = gddlab.open_dataset(data)
    if start < 0 or n < 1 or start + n > len(whole):
        raise GddlabError(f"{n} images from {start} on: {data} has {len(whole)}")
    return whole.images(slice(start, start + n))


def _mask(path: str, size: int) -> Any:
    """A mask of known pixels from a PNG, white where a pixel is known."""
    import numpy as np
    import torch
    from PIL import Image

    file = path_of("keep", path)
    try:
        pixels = np.asarray(Image.open(file).convert("L"))
    except OSError as e:
        raise GddlabError(f"{file} cannot be read as an image ({e}): give a PNG of {size} x {size} pixels") from None
    return torch.from_numpy(pixels > 127)


def _number(name: str, word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise GddlabError(f'--{name} {word}: give "cross", or noise levels') from None


def save_result(result: gddlab.ProbeResult, folder: Path) -> None:
    """Writes a result with its figures, without those of one that it replaces; prints what it is.

    A heat map per statistic; "similarities" where noise levels were compared, "readouts" where these were fitted.
    """
    from gddlab.theme import save_figure

    replaced: list[str] = []
    with contextlib.suppress(GddlabError):
        replaced = gddlab.ProbeResult.load(folder).stats
    result.save(folder)
    for stat in (*replaced, "similarities", "readouts"):
        (folder / f"{stat}.png").unlink(missing_ok=True)
    for stat in result.stats:
        save_figure((result.effects_heatmap if result.told else result.heatmap)(stat), folder / f"{stat}.png")
    if result.matrices and len(result.sigmas) > 1 and not result.told:
        save_figure(result.similarities(), folder / "similarities.png")
    if result.meta["settings"].get("tier") == "decode":
        save_figure(result.readouts(), folder / "readouts.png")
    for bad in result.meta["nonfinite"][:5]:
        where = f"{bad['layer']} ({bad['side']}) at sigma {bad['sigma']:g}"
        sys.stderr.write(f"not finite: {where}, {bad['images']} images\n")
    measured = f"{len(result.layers)} layers at {len(result.sigmas)} noise levels"
    say(f"{folder}: {measured}; statistics {', '.join(result.stats)}")


def configured(
    config: gddlab.TrainConfig, mask: Path | None, strategy: str | None, fast: bool, teacher: Any = None
) -> gddlab.TrainConfig:
    """The configuration with a mask, from a file or a rule on the names of the teacher's layers, and with fast mode."""
    if mask is not None and strategy is not None:
        raise GddlabError(f"--mask {mask} and --strategy {strategy}: give one of them")
    fields: dict[str, Any] = gddlab.presets.FAST.copy() if fast else {}
    if mask is not None:
        fields["mask"] = gddlab.FreezeMask.load(mask)
    if strategy is not None:
        fields["mask"] = gddlab.select_freeze(teacher or gddlab.load_teacher(config.teacher), strategy=strategy)
    return config.model_copy(update=fields)


def terminal() -> Console | None:
    """A console for tables in colour, if standard output is a terminal."""
    return Console() if sys.stdout.isatty() else None


def print_table(rows: list[dict[str, str]]) -> None:
    """A table without frames, folded to the width of a terminal; elsewhere one line per row."""
    if console := terminal():
        shown = Table(*rows[0], box=None, pad_edge=False, header_style="bold")
        for row in rows:
            shown.add_row(*row.values())
        console.print(shown)
        return
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        say("  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip())


def print_findings(found: Doctor, console: Console) -> None:
    """One table per section, then the problems."""
    from gddlab.diagnosis import SECTIONS

    for section in SECTIONS:
        table = Table(
            box=None, show_header=False, pad_edge=False, title=section, title_justify="left", title_style="bold"
        )
        table.add_column(width=1)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for f in found.brief(section):
            text = Text(f.value)
            if f.remedy:
                text.append(f"\n{f.remedy}", "dim")
            table.add_row(Text(f.mark, "green" if f.found else "yellow"), f.name, text)
        console.print(table)
        console.print()
    console.print(Text("problems", "bold"))
    for problem in found.problems or ("none",):
        console.print(Text(problem, "red" if found.problems else "green"))


# From a line to a call.


def main(argv: list[str] | None = None) -> None:
    """Entry point: exit code 2 and one line on bad input."""
    if argv is None:  # the process is ours
        keep_memory()
    words = sys.argv[1:] if argv is None else argv
    shown = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"gddlab: {message}\n"  # Python's own shows a line of code too
    try:
        if words == ["--version"]:
            say(f"gddlab {gddlab.__version__}")
            return
        name = next((n for n in (" ".join(words[:2]), " ".join(words[:1])) if n in COMMANDS), None)
        if name is None:
            overview(words)
        else:
            call(name, words[len(name.split()) :])
    except (GddlabError, TimeoutError) as e:
        sys.stderr.write(f"gddlab: {e}\n")
        sys.exit(2)
    except BrokenPipeError:  # who reads has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest when it ends
        sys.exit(1)
    except OSError as e:  # a path that cannot be read or written: a folder where a file belongs, a full disk
        sys.stderr.write(f"gddlab: {e.filename or 'file system'}: {e.strerror or e}\n")
        sys.exit(2)
    except KeyboardInterrupt as e:
        sys.stderr.write(f"\ngddlab: {e}\n" if e.args else "")
        sys.exit(130)
    finally:
        warnings.formatwarning = shown


def overview(words: list[str]) -> None:
    """The commands, or those of a group, for --help and for a line that names none; without importing any of them."""
    group = words[0] if words and words[0] in GROUPS else None
    asked = words[1:] if group else words
    if group:
        listed = {n.split()[1]: c.summary for n, c in COMMANDS.items() if n.split()[0] == group}
    else:
        listed = {n.split()[0]: GROUPS.get(n.split()[0], c.summary) for n, c in COMMANDS.items()}
    if asked and asked[0] not in ("-h", "--help"):
        kind, flags = f"{group} command" if group else "command", ["--help"] if group else ["--help", "--version"]
        if asked[0].startswith("-"):
            raise unknown("option", asked[0], flags)
        raise unknown(kind, asked[0], [*listed, *flags])
    stubs: dict[str, Callable[[], Any]] = {
        name: dataclasses.make_dataclass("Stub", [], namespace={"__doc__": doc}) for name, doc in listed.items()
    }
    prog = f"gddlab {group}" if group else "gddlab"
    about = GROUPS[group] if group else gddlab.__doc__
    with in_one_line(prog):
        tyro.extras.subcommand_cli_from_dict(stubs, prog=prog, description=about, args=asked)


def call(name: str, words: list[str]) -> None:
    """Parses the words after the name of a command, and runs it."""
    command = COMMANDS[name]
    if not words and "config" in command.parts:  # its defaults would start work
        raise GddlabError(f"gddlab {name} without arguments: see gddlab {name} --help")
    try:
        values = command.parse(f"gddlab {name}", words)
        if (preset := values.get("preset", first_word(words))) != first_word(words):
            raise GddlabError(f"preset {preset!r} after other arguments: give it first, gddlab {name} {preset} ...")
        own = inspect.signature(command.run).parameters
        command.run(**{k: v for k, v in values.items() if k in own or (v is not None and k not in command.parts)})
    except GddlabError as e:
        raise type(e)(command.in_shell_words(str(e))) from e


if __name__ == "__main__":
    main()
