"""Commands that train students, and that say beforehand what training takes."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import OmitArgPrefixes, Positional

from gddlab.commands.output import out
from gddlab.distill import presets
from gddlab.distill.config import TrainConfig
from gddlab.errors import GddlabError, unknown
from gddlab.freezing import FreezeMask, select_freeze
from gddlab.nets import Precond

__all__ = ["Configured", "Demo", "Preflight", "Runs", "Train"]


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
class Configured:
    """A preset with fields, a mask and fast mode; the preset's fields are known before the rest of the line is read."""

    preset: Positional[str] = "digits"
    """Preset that gives the fields not named here, as the first word: digits, cifar10, cifar10_cond, afhqv2, ffhq, imagenet64."""
    config: OmitArgPrefixes[TrainConfig] = field(default_factory=lambda: presets.digits(run_dir="runs/digits"))
    mask: Path | None = None
    """Freeze mask, a file that `gddlab freeze` wrote (GDD-I); GDD if neither this nor a rule is given."""
    rule: str | None = None
    """A rule on names in place of a file, such as gdd-i: the mask is made of the teacher's names."""
    fast: bool = False
    """Fast mode: bfloat16 in student and discriminator, fakes reused, channels last. Faster; results differ from the preset's."""
    nproc: int = 1
    """Processes on this machine."""

    @classmethod
    def of_preset(cls, name: str) -> Configured:
        """The command with a preset's fields for defaults; as it is for an unknown one, which `configured` refuses."""
        if name not in presets.PRESETS:
            return cls(preset=name)
        return cls(preset=name, config=presets.preset(name, run_dir=f"runs/{name}"))

    def configured(self, teacher: Precond | None = None) -> TrainConfig:
        """The configuration; `teacher` in place of the one named, for the names of a rule."""
        if self.preset not in presets.PRESETS:
            raise unknown("preset", self.preset, presets.PRESETS)
        fields = {name: getattr(self.config, name) for name in TrainConfig.model_fields}
        if self.mask is not None and self.rule is not None:
            raise GddlabError(f"mask {self.mask} and rule {self.rule!r}: give one of them")
        if self.mask is not None:
            fields["mask"] = FreezeMask.load(self.mask)
        if self.rule is not None:
            from gddlab.teachers import load_teacher

            source = load_teacher(self.config.teacher) if teacher is None else teacher
            fields["mask"] = select_freeze(source, strategy=self.rule)
        return TrainConfig(**(fields | (presets.FAST if self.fast else {})))


@dataclass(frozen=True)
class Train(Configured):
    """Trains a one-step student: GDD-I with a mask, GDD without. The same command continues a run."""

    detach: bool = False
    """Returns at once; the run goes on."""
    nnodes: int = 1
    """Machines; each runs this command, on a directory that all of them see."""
    rdzv_endpoint: str | None = None
    """HOST:PORT of one of the machines, where they meet; under SLURM the first of them, if left away."""
    max_restarts: int = 0
    """So many times the processes are started again from the last checkpoint when one of them has died."""
    timeout_s: float = 600
    """Seconds after which a process that does not answer the others ends the run."""
    print_launch: Literal["torchrun", "slurm"] | None = None
    """Trains nothing: writes the configuration into the run directory and prints the command that trains it, a line or a batch script."""

    def run(self) -> None:
        from gddlab.launch import train
        from gddlab.launch.train import HEAD, Launch, prepared

        endpoint = HEAD if self.print_launch == "slurm" and self.rdzv_endpoint is None else self.rdzv_endpoint
        how: dict[str, Any] = {"nproc": self.nproc, "nnodes": self.nnodes, "rdzv_endpoint": endpoint}
        how |= {"max_restarts": self.max_restarts, "timeout_s": self.timeout_s}
        if self.print_launch is not None:
            out(prepared(self.configured(), Launch(**how), self.print_launch))
            return
        run = train(self.configured(), **how)
        if not self.detach:
            run.watch()
        out(run)


@dataclass(frozen=True)
class Runs:
    """Says which runs lie below a folder, and what each has come to."""

    folder: Positional[Path] = Path("runs")
    """Folder of run directories, or one of them."""
    state: bool = False
    """Only the state, a word a run: starting, running, done, failed, stopped."""
    json: bool = False
    """Prints JSON."""

    def run(self) -> None:
        from gddlab.runs import listing

        found = listing(self.folder)
        if self.json:
            out(json.dumps(found.to_dict("records"), indent=2))
        else:
            out("\n".join(found["state"]) if self.state else found.to_string(index=False))


@dataclass(frozen=True)
class Preflight(Configured):
    """Says what a run needs, whether it is there, and how long and how large it will be; exit code 1 where something is missing."""

    steps: int = 3
    """Iterations timed at each of two batches."""
    measure_batch: int | None = None
    """The larger of the two; what a process would hold, on a CPU at most what takes ten seconds, if left away."""
    stand_in: bool = False
    """Random weights for teacher and backbones, and random images: time and memory without any download."""
    json: bool = False
    """Prints JSON."""

    def run(self) -> None:
        from gddlab.diagnosis.preflight import preflight, stand_ins
        from gddlab.teachers import load_teacher

        teacher, command = None, self
        if self.rule is not None:
            try:
                teacher = stand_ins(self.config)[0] if self.stand_in else load_teacher(self.config.teacher)
            except (GddlabError, OSError):
                command = replace(
                    self, rule=None
                )  # no names for a rule; the page lists the teacher among what is missing
        found = preflight(
            command.configured(teacher),
            nproc=self.nproc,
            steps=self.steps,
            measure_batch=self.measure_batch,
            stand_in=self.stand_in,
        )
        out(json.dumps(found.to_dict(), indent=2) if self.json else found)
        if not found.ok:
            sys.exit(1)
