"""Commands on networks: train, show and score teachers; convert and export."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional

from gddlab.commands.output import out
from gddlab.distill.teacher import TeacherConfig

__all__ = ["Convert", "Export", "Teacher", "TeacherScore", "TeacherShow", "TeacherTrain"]


@dataclass(frozen=True)
class TeacherTrain:
    """Trains a diffusion teacher; the same command continues."""

    config: OmitArgPrefixes[TeacherConfig] = field(default_factory=lambda: TeacherConfig(run_dir=Path("runs/teacher")))

    def run(self) -> None:
        from gddlab.distill.teacher import train_teacher

        out(train_teacher(self.config))


@dataclass(frozen=True)
class TeacherShow:
    """Prints the card of a teacher: what it is, where it comes from, how good it is."""

    teacher: Positional[str] = "digits"
    """Name, EDM pickle, .safetensors file, or run directory."""

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
        from gddlab.evaluation.run_scores import score_teacher

        for record in score_teacher(self.teacher, n=self.n):
            out(f"{record.metric:<20} {record.value:10.3f}  {record.sampler}")


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


@dataclass(frozen=True)
class Convert:
    """Turns an EDM pickle, read as data and never run, into a safetensors file with equal outputs."""

    source: Positional[str]
    """An EDM, GDD, D2O or SiD pickle, or any teacher by name."""
    out: Positional[Path]
    """File that ends in .safetensors."""
    overwrite: bool = False
    """Replaces a file that is there."""

    def run(self) -> None:
        from gddlab.teachers import convert

        done = convert(self.source, self.out, overwrite=self.overwrite)
        out(done.card)
        out(done)


@dataclass(frozen=True)
class Export:
    """Writes a one-step student for use without gddlab: ONNX (.onnx) or a torch.export program (.pt2)."""

    model: Positional[str]
    """Run directory of a student, or a file with one."""
    out: Positional[Path]
    """File that ends in .onnx or .pt2."""
    sigma: float | None = None
    """Noise level of the one step; the student's own if left away, 2.5 for SiD's."""

    def run(self) -> None:
        from gddlab.nets.export import export
        from gddlab.teachers.catalog import open_model

        out(export(open_model(self.model), self.out, sigma=self.sigma))
