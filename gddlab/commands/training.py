"""Commands that train students."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import OmitArgPrefixes, Positional

from gddlab.commands.output import out
from gddlab.distill import presets
from gddlab.distill.config import TrainConfig
from gddlab.errors import unknown
from gddlab.freezing import FreezeMask

__all__ = ["Demo", "Train"]


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
