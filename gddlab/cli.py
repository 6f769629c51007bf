"""The command line: every command is a call of the public API with the same configuration."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional

from gddlab.distill import presets
from gddlab.distill.config import TrainConfig
from gddlab.errors import GddlabError, unknown
from gddlab.freezing import FreezeMask
from gddlab.teachers import TeacherConfig

__all__ = ["main"]

Stats = tuple[str, ...]


def out(text: object) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@dataclass(frozen=True)
class Demo:
    """The whole way on the embedded digits: probe, mask, GDD-I, evaluation, and a page to look at."""

    out: Path = Path("demo")
    """Folder for page, numbers and run; an interrupted demo continues there."""
    seed: int = 0
    """Seed of the training."""
    nproc: int = 1
    """Processes of the training."""
    recompute: bool = False
    """Scores the teacher again (minutes) instead of reading the scores that ship with it."""

    def run(self) -> None:
        from gddlab.demo import demo

        demo(self.out, seed=self.seed, nproc=self.nproc, recompute=self.recompute)


@dataclass(frozen=True)
class TeacherTrain:
    """Trains a diffusion teacher; the same command continues."""

    config: OmitArgPrefixes[TeacherConfig] = field(default_factory=lambda: TeacherConfig(run_dir=Path("runs/teacher")))

    def run(self) -> None:
        from gddlab.teachers import train_teacher

        out(train_teacher(self.config))


@dataclass(frozen=True)
class TeacherShow:
    """Prints the card of a teacher: what it is, where it comes from, how good it is."""

    teacher: Positional[str] = "digits"
    """Name, .safetensors file, or run directory."""

    def run(self) -> None:
        from gddlab.teachers import load_teacher

        out(load_teacher(self.teacher).card)


@dataclass(frozen=True)
class TeacherScore:
    """Scores a teacher at 1, 5 and 18 Heun steps beside two halves of the real set; writes scores.json and samples beside it."""

    teacher: Positional[Path]
    """Run directory of `gddlab teacher train`."""
    n: int | None = None
    """Images; as many as there are real ones if left away."""

    def run(self) -> None:
        from gddlab.evaluation.teachers import score_teacher

        for record in score_teacher(self.teacher, n=self.n):
            out(f"{record.metric:<20} {record.value:10.3f}  {record.sampler}")


@dataclass(frozen=True)
class Probe:
    """Measures the activation of layers at each noise level, and saves table, matrices and a heat map."""

    teacher: Positional[str] = "digits"
    """Name, .safetensors file, or run directory."""
    out: Path = Path("probe")
    """Folder for the result."""
    timesteps: int = 18
    """Noise levels on the Karras grid from 80 to 0.002."""
    sigmas: tuple[float, ...] = ()
    """Explicit noise levels, in place of the grid."""
    data: str | None = None
    """Dataset; the one on the teacher's card if left away."""
    states: Literal["noised", "prior", "student"] = "noised"
    """Noised images, pure noise, or the one-step input."""
    layers: str = "conv"
    """Preset (conv, block, all), glob, or re:PATTERN."""
    stats: Stats = ()
    """Statistics; the default ones if left away."""
    n: int = 256
    """Images."""
    batch_size: int = 64
    """Rows of a forward pass (images times noise levels)."""
    seed: int = 0
    """Image i's noise comes from seed + i."""

    def run(self) -> None:
        from gddlab.probing import probe
        from gddlab.reporting.figures import save_figure
        from gddlab.teachers import load_teacher

        extra: dict[str, Any] = {"stats": self.stats} if self.stats else {}
        result = probe(
            load_teacher(self.teacher),
            list(self.sigmas) or self.timesteps,
            data=self.data,
            states=self.states,
            layers=self.layers,
            n=self.n,
            batch_size=self.batch_size,
            seed=self.seed,
            **extra,
        )
        result.save(self.out)
        for stat in result.stats:
            save_figure(result.heatmap(stat).figure, self.out / f"{stat}.png")
        layers, sigmas = result.frame["layer"].nunique(), len(result.sigmas)
        out(f"{self.out}: {layers} layers at {sigmas} noise levels; statistics {', '.join(result.stats)}")


@dataclass(frozen=True)
class Freeze:
    """Chooses a freeze mask, by a rule on names or by a measured score, and saves it as JSON."""

    source: Positional[str] = "digits"
    """A teacher, or a folder that `gddlab probe` wrote."""
    out: Path = Path("mask.json")
    """File of the mask."""
    strategy: str = "gdd-i"
    """gdd-i, gdd-i-2, gdd-i-3, budget, random, invert, none."""
    score: str | None = None
    """Statistic that strategy budget goes by."""
    at: float = 80.0
    """Noise level at which the score is read, sigma."""
    freeze: Literal["low", "high"] = "low"
    """Whether low or high scores are frozen first."""
    budget: float = 0.85
    """Share of all parameters to freeze."""
    mask: Path | None = None
    """The mask that strategy invert inverts."""
    seed: int = 0
    """Seed of strategy random."""

    def run(self) -> None:
        from gddlab.freezing import select_freeze
        from gddlab.probing import ProbeResult
        from gddlab.teachers import load_teacher

        folder = Path(self.source)
        source = ProbeResult.load(folder) if (folder / "frame.parquet").exists() else load_teacher(self.source)
        mask = select_freeze(
            source,
            strategy=self.strategy,
            score=self.score,
            at=self.at,
            freeze=self.freeze,
            budget=self.budget,
            mask=FreezeMask.load(self.mask) if self.mask else None,
            seed=self.seed,
        )
        mask.save(self.out)
        out(mask.summary().to_string())
        out(f"{self.out}: {mask.fraction:.2%} of {mask.n_params:,} parameters frozen by {mask.strategy}")


@dataclass(frozen=True)
class Train:
    """Trains a one-step student: GDD-I with a mask, GDD without. The same command continues a run."""

    preset: Positional[str] = "digits"
    """Preset that gives the fields not named here."""
    config: OmitArgPrefixes[TrainConfig] = field(default_factory=lambda: presets.digits(run_dir="runs/digits"))
    mask: Path | None = None
    """Freeze mask, a file that `gddlab freeze` wrote; GDD if left away."""
    nproc: int = 1
    """Processes on this machine."""
    detach: bool = False
    """Returns at once; the run goes on."""

    def run(self) -> None:
        from gddlab.launch import train

        if self.preset != "digits":
            raise unknown("preset", self.preset, presets.__all__)
        config = self.config
        if self.mask is not None:
            config = config.model_copy(update={"mask": FreezeMask.load(self.mask)})
        run = train(config, nproc=self.nproc)
        if not self.detach:
            run.watch()
        out(run)


@dataclass(frozen=True)
class Sample:
    """Draws images from a student or a teacher, as a PNG grid."""

    model: Positional[str]
    """Run directory of a student, teacher's name, or .safetensors file."""
    out: Path = Path("samples.png")
    """PNG file."""
    n: int = 64
    """Images."""
    seed: int = 0
    """Image i comes from seed + i."""
    steps: int | None = None
    """Heun steps of a teacher; 18 if left away."""
    label: int | None = None
    """Class of all images, of a conditional network."""

    def run(self) -> None:
        from gddlab.sampling import sample, save_grid

        net = open_model(self.model)
        save_grid(
            sample(net, self.n, seed=self.seed, steps=self.steps, class_labels=self.label, progress=True), self.out
        )
        out(self.out)


@dataclass(frozen=True)
class Evaluate:
    """Scores a student, a teacher or a dataset against real images; a run keeps the records in evaluation.jsonl."""

    model: Positional[str]
    """Run directory of a student, teacher's name, .safetensors file, or data:NAME."""
    data: str | None = None
    """Real images; the dataset on the model's card if left away."""
    metrics: tuple[str, ...] = ("fid", "kid")
    """Some of fid, kid, prc; fid is the Frechet distance on the extractor's features."""
    n: int | None = None
    """Images; as many as there are real ones if left away."""
    seed: int = 0
    """First seed."""
    steps: int | None = None
    """Heun steps of a teacher; 18 if left away."""
    extractor: str = "lite2"
    """Feature network."""

    def run(self) -> None:
        from gddlab.datasets import open_dataset
        from gddlab.evaluation import append_records, evaluate

        name = self.model.removeprefix("data:")
        source: Any = open_dataset(name) if name != self.model else open_model(self.model)
        data = self.data or (name if name != self.model else None)
        scores = evaluate(
            source,
            data=data,
            metrics=self.metrics,
            n=self.n,
            seed=self.seed,
            steps=self.steps,
            extractor=self.extractor,
        )
        if (Path(self.model) / "config.json").exists():
            append_records(self.model, list(scores))
        out(scores)


@dataclass(frozen=True)
class Teacher:
    """Teachers: train one, show a card, score one."""

    command: OmitSubcommandPrefixes[
        Annotated[TeacherTrain, tyro.conf.subcommand("train")]
        | Annotated[TeacherShow, tyro.conf.subcommand("show")]
        | Annotated[TeacherScore, tyro.conf.subcommand("score")]
    ]

    def run(self) -> None:
        self.command.run()


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Teacher, tyro.conf.subcommand("teacher")]
    | Annotated[Probe, tyro.conf.subcommand("probe")]
    | Annotated[Freeze, tyro.conf.subcommand("freeze")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
)


def open_model(source: str) -> Any:
    """A student's run directory, or a teacher."""
    from gddlab.runs import load_run
    from gddlab.teachers import load_teacher

    folder = Path(source)
    if folder.is_dir() and not (folder / "teacher.safetensors").exists() and (folder / "config.json").exists():
        return load_run(folder).student()
    return load_teacher(source)


def main(argv: list[str] | None = None) -> None:
    """Entry point: exit code 2 and one line on bad input."""
    try:
        command = tyro.cli(Command, prog="gddlab", args=argv, description=__doc__)
        command.run()
    except GddlabError as e:
        sys.stderr.write(f"gddlab: {e}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
