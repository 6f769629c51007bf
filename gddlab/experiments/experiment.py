"""What is declared: experiments, which train; studies, which measure what was trained; and the list that holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gddlab.distill.config import TrainConfig
from gddlab.evaluation import Record
from gddlab.freezing import FreezeMask
from gddlab.nets import OneStepPrecond, Precond
from gddlab.probing import ProbeResult

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Measured:
    """What masks are chosen from: the teacher's probe, and the rule's mask, whose budget all others share."""

    result: ProbeResult
    rule: FreezeMask


@dataclass(frozen=True)
class Experiment:
    """One row of a table, run with several seeds.

    Attributes:
        name: Folder of its runs, and the name in tables.
        what: One line for people.
        feeds: Notebooks that read it.
        mask: The mask for a training seed; None trains everything.
        configure: The configuration of a run, from its folder, seed and mask.
        seconds: One run with its evaluation, roughly; None if it was never measured.
    """

    name: str
    what: str
    feeds: tuple[str, ...]
    mask: Callable[[Measured, int], FreezeMask | None]
    configure: Callable[[Path, int, FreezeMask | None], TrainConfig]
    seconds: float | None = None


@dataclass(frozen=True)
class Judge:
    """How images are scored.

    Attributes:
        extractor: Feature network of the scores during a training and at its end.
        second: Another one, for the distance at the end alone.
        n: Images; None for as many as there are real ones.
        blocks: Blocks of `n` images for the first extractor's distance at the end, and for the full teacher; the lowest
            distance counts.
        pairs: Images of each network when networks are compared with each other; None for `n`.
    """

    extractor: str = "lite2"
    second: str = "lite0"
    n: int | None = None
    blocks: int = 1
    pairs: int | None = None


@dataclass(frozen=True)
class Subjects:
    """What a study measures.

    Attributes:
        teacher: Its card names the data.
        data: Real images, by name or path.
        students: Of training seed 0, by experiment; those of the study's `needs` that are trained.
        steps: Heun steps of the teacher, ascending; the last is the full sampler.
        judge: How images are scored.
        configs: Of training seed 0, by experiment, for a study that times them.
        nproc: Processes that sample for a score.
    """

    teacher: Precond
    data: str
    students: Mapping[str, OneStepPrecond]
    steps: tuple[int, ...]
    judge: Judge
    configs: Mapping[str, TrainConfig] = field(default_factory=dict)
    nproc: int = 1


@dataclass(frozen=True)
class Found:
    """What a study found: a table, facts about it, and the evaluation records behind it if there are any."""

    frame: pd.DataFrame
    about: Mapping[str, object]
    records: tuple[Record, ...] = ()


@dataclass(frozen=True)
class Study:
    """A measurement over the teacher and trained students, with a folder for its table.

    Attributes:
        name: The folder, and the name on the command line.
        what: One line for people.
        feeds: Notebooks that read it.
        needs: Experiments whose students it measures; it is made again when more of them are trained.
        measure: Makes it.
        seconds: Roughly; None if it was never measured.
        timed: Also times the configurations of experiments that feed its notebooks; use an idle machine.
    """

    name: str
    what: str
    feeds: tuple[str, ...]
    needs: tuple[str, ...]
    measure: Callable[[Subjects], Found]
    seconds: float | None = None
    timed: bool = False


@dataclass(frozen=True)
class ExperimentList:
    """All that is run for one teacher, in the order that the notebooks need.

    Attributes:
        teacher, data: As in a configuration.
        experiments, studies: What is run, and what is measured afterwards.
        judge: How students are scored.
        steps: Heun steps at which the teacher is scored; the last is the full sampler.
        machine: What the times are for.
    """

    teacher: str
    data: str
    experiments: tuple[Experiment, ...]
    studies: tuple[Study, ...] = ()
    judge: Judge = field(default_factory=Judge)
    steps: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 18)
    machine: str = "two cores"

    @property
    def names(self) -> list[str]:
        return [e.name for e in self.experiments] + [s.name for s in self.studies]


OVER_IMAGES, MAIN, SECOND, MINIMA = "10_fid_over_images", "12_main_results", "13_second_extractor", "14_local_minima"
SAMPLES, LAYERS, MOVED, SPECTRA = "11_samples", "15_activations", "16_moved_parameters", "22_frequencies"
DISCRIMINATORS, AUGMENTATION, START = "18_discriminators", "19_augmentation_r1", "20_initialisation"
ATLAS, ARCHITECTURES = "01_atlas", "04_architectures"
EFFICIENCY, COST = "21_data_efficiency", "23_cost"

FEEDS: Mapping[str, tuple[str, ...]] = {
    "gdd-i": (
        *(MAIN, SECOND, MINIMA, SAMPLES, LAYERS, MOVED, SPECTRA),
        *(DISCRIMINATORS, AUGMENTATION, START, EFFICIENCY, COST),
    ),
    "gdd": (MAIN, SECOND, MINIMA, SAMPLES, LAYERS, MOVED, SPECTRA, START, COST),
    "gdd-i-long": (OVER_IMAGES, MAIN, EFFICIENCY, COST),
    "gdd-long": (OVER_IMAGES, MAIN, COST),
    "scratch": (OVER_IMAGES, SECOND, MINIMA, SAMPLES, START, COST),
    "fresh-fakes": (AUGMENTATION, COST),
    "reuse-fakes": (AUGMENTATION, COST),
    "no-r1": (AUGMENTATION,),
    "augment": (AUGMENTATION,),
    "ada": (AUGMENTATION,),
    "two-step": (MAIN, COST),
    "stylegan2": (SECOND, DISCRIMINATORS, COST),
    **dict.fromkeys(("pd", "cd", "ctm"), (MAIN, SECOND, MINIMA, SAMPLES, COST)),
    "rcd": (MINIMA,),
    "gdd-cd": (MAIN, MINIMA, COST),
    "teacher-steps": (MAIN, SECOND, MINIMA, OVER_IMAGES),
    "local-minima": (MINIMA,),
    "layers": (LAYERS, MOVED, SPECTRA),
    "input-or-level": (ATLAS, LAYERS),
    "architectures": (ARCHITECTURES,),
    "spectra": (SPECTRA,),
    "costs": (COST,),
}


def feeds_of(name: str) -> tuple[str, ...]:
    """Notebooks that read an experiment, other than those on masks, or a study."""
    if name.startswith("images-"):
        return (EFFICIENCY,)
    if name.startswith(("lpips", "lite0", "vgg16", "deit")):
        return (DISCRIMINATORS, COST)
    return FEEDS.get(name, ())
