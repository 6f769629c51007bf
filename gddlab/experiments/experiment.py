"""What is declared: questions, and the teachers, experiments and studies that answer them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gddlab.distill.config import TrainConfig
from gddlab.distill.teacher import TeacherConfig
from gddlab.errors import GddlabError
from gddlab.evaluation import Record, find_extractor
from gddlab.freezing import FreezeMask, select_freeze
from gddlab.nets import OneStepPrecond, Precond
from gddlab.probing import ProbeResult
from gddlab.runs import Run

if TYPE_CHECKING:
    import pandas as pd


NAMED = 16
"""Arms of a question that its text names."""


@dataclass(frozen=True)
class MaskInputs:
    """What masks are chosen from: the teacher's probe, the rule's mask, and what `after` has trained."""

    result: ProbeResult
    runs: Sequence[Run] = ()

    @cached_property
    def rule(self) -> FreezeMask:
        return select_freeze(self.result, strategy="gdd-i")


@dataclass(frozen=True)
class TeacherRun:
    """A teacher that is trained for a list, in `LIST/teachers/NAME`.

    Attributes:
        name: Folder, and the name in tables.
        what: One line for people.
        configure: The configuration, from its folder.
        seconds: Roughly; None if it was never measured.
    """

    name: str
    what: str
    configure: Callable[[Path], TeacherConfig]
    seconds: float | None = None


@dataclass(frozen=True)
class Experiment:
    """One arm of a comparison, run with several seeds.

    Attributes:
        name: Folder of its runs, and the name in tables.
        what: One line for people.
        mask: The mask for a training seed; None trains everything.
        configure: The configuration of a run, from its folder, seed and mask.
        seeds: Training seeds.
        at: Thousands of images after which a student is scored by all metrics; those that a run has, and its end. Where
            there are none, all snapshots are scored by the first distance.
        teacher: File of the teacher within the list's folder, such as "teachers/early/snapshots/20.safetensors"; None
            for the list's own.
        start: An experiment, and thousands of images after which its student of the same seed is where this one begins.
        after: Experiments whose runs `mask` reads; it waits for them.
        seconds: One run with its evaluation, roughly; None if it was never measured.
    """

    name: str
    what: str
    mask: Callable[[MaskInputs, int], FreezeMask | None]
    configure: Callable[[Path, int, FreezeMask | None], TrainConfig]
    seeds: tuple[int, ...] = (0, 1, 2)
    at: tuple[float, ...] = ()
    teacher: str | None = None
    start: tuple[str, float] | None = None
    after: tuple[str, ...] = ()
    seconds: float | None = None

    @property
    def needs(self) -> set[str]:
        """Experiments that must be run before."""
        return {*self.after, *(self.start[:1] if self.start else ())}


@dataclass(frozen=True)
class Question:
    """What is asked, declared before it is run; a notebook answers it.

    Attributes:
        notebook: The notebook's file without .ipynb.
        asked: One or two sentences.
        arms: Experiments that are shown.
        contrasts: Arms, and what each is compared with; these differences are tested together.
        primary: Names of the scores by which it is decided, without their n: a pair differs where it does by each.
        also: Names of other scores that are shown.
        at: Thousands of images after which they count; None for the end of the runs.
        studies: Studies that it reads.
        since: What was known when this was last changed; "" where it stands as before the first run.
        chosen_by: Training seeds that chose what is compared, so that they do not count in it.
    """

    notebook: str
    asked: str
    arms: tuple[str, ...] = ()
    contrasts: tuple[tuple[str, str], ...] = ()
    primary: tuple[str, ...] = ("fd-lite2", "kd-lite2")
    also: tuple[str, ...] = ()
    at: float | None = None
    studies: tuple[str, ...] = ()
    since: str = ""
    chosen_by: tuple[int, ...] = ()

    def counted(self, runs: Sequence[Run]) -> list[Run]:
        """The runs that count in `contrasts`: those of other seeds than the ones that chose what is compared."""
        return [run for run in runs if run.run_dir.name not in {f"seed-{seed}" for seed in self.chosen_by}]

    def __str__(self) -> str:
        from gddlab.reporting import look

        parts = [self.asked]
        if self.arms:
            more = f"; and {len(self.arms) - NAMED} others" if len(self.arms) > NAMED else ""
            parts.append(f"Arms: {'; '.join(look(name).label for name in self.arms[:NAMED])}{more}.")
        at = "at the end" if self.at is None else f"after {self.at:g} thousand images"
        together: dict[str, list[str]] = {}
        for arm, other in self.contrasts:
            together.setdefault(look(other).label, []).append(look(arm).label)
        if together:
            parts.append(f"Compared by {', '.join(self.primary)}, {at}.")
            parts += [f"Against {other}: {'; '.join(arms)}." for other, arms in together.items()]
        if self.since:
            parts.append(f"As of {self.since}.")
        if self.chosen_by:
            parts.append(f"Not counted in what is compared: seed {', '.join(map(str, self.chosen_by))}.")
        return "\n".join(parts)

    def _repr_markdown_(self) -> str:
        first, *rest = str(self).split("\n")
        return "\n\n".join([f"**Asked{'' if self.since else ' before the runs'}.** {first}", *rest])


@dataclass(frozen=True)
class Judge:
    """How images are scored.

    Attributes:
        extractor: Feature network of the scores during a training and at its end.
        others: More of them, for the distance alone.
        own: An extractor trained on these data, for distances, classes and copying; None if there is none.
        held_out: Real images that nobody has trained on, for a second kernel distance; None if there are none.
        n: Images; None for as many as there are real ones.
        blocks: Blocks of `n` images for the first extractor's distance at the end, and for the full teacher; the lowest
            distance counts.
        pairs: Images of each network when networks are compared with each other; None for `n`.
    """

    extractor: str = "lite2"
    others: tuple[str, ...] = ("lite0", "open-nsfw")
    own: str | None = None
    held_out: str | None = None
    n: int | None = None
    blocks: int = 1
    pairs: int | None = None

    def scores(
        self, data: str, *, asked: Collection[str] = (), end: bool = True
    ) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
        """How a network is scored: metrics and arguments of `evaluate`, one pair per call.

        Args:
            data: Real images.
            asked: Names of scores; those of other extractors, and copying where there are images held out, are made
                where they are among them.
            end: Whether it is the end of a training, where `blocks` count.
        """
        own: dict[str, Any] = {"extractor": self.extractor, "data": data}
        in_blocks = end and self.blocks > 1
        together = ("kid", "prc") if in_blocks else ("fid", "kid", "prc")
        out: list[tuple[tuple[str, ...], dict[str, Any]]] = [(together, own)]
        if in_blocks:
            out.append((("fid",), {**own, "blocks": self.blocks}))
        for other in self.others:
            if find_extractor(other).metric_name("fid") in asked:
                out.append((("fid",), {"extractor": other, "data": data}))
        if self.held_out is not None:
            out.append((("kid",), {"extractor": self.extractor, "data": self.held_out}))
        if self.own is not None:
            out.append((("fid", "kid", "classes"), {"extractor": self.own, "data": data}))
        # not in the judge's features: it has seen the training images
        copied = [e for e in (self.extractor, "pixels") if self.held_out is not None and f"copying-{e}" in asked]
        return out + [(("copying",), {"extractor": extractor, "data": data}) for extractor in copied]


@dataclass(frozen=True)
class StudyInputs:
    """What a study measures.

    Attributes:
        teacher: Its card names the data.
        data: Real images, by name or path.
        students: By experiment, those of the study's `needs` that are trained; of the first seed, or of the one named;
            after as many images as the study says.
        steps: Heun steps of the teacher, ascending; the last is the full sampler.
        judge: How images are scored.
        folders: Run directories of the students.
        asked: Scores that the study's questions ask for.
        configs: Of the first training seed, by experiment, for a study that times them.
        nproc: Processes that sample for a score.
    """

    teacher: Precond
    data: str
    students: Mapping[str, OneStepPrecond]
    steps: tuple[int, ...]
    judge: Judge
    folders: Mapping[str, Path] = field(default_factory=dict)
    asked: Collection[str] = ()
    configs: Mapping[str, TrainConfig] = field(default_factory=dict)
    nproc: int = 1

    def student(self, name: str) -> OneStepPrecond:
        """One that the study cannot do without.

        Raises:
            GddlabError: It is not trained.
        """
        if name not in self.students:
            raise GddlabError(f"the study needs a student of {name!r}, which is not there: run --only {name} first")
        return self.students[name]


@dataclass(frozen=True)
class StudyResult:
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
        needs: Experiments whose students it measures, "gdd" for the first seed's, "gdd/seed-1" for another's; what a
            list lacks is omitted. It is made again when more of them are trained.
        measure: Makes it.
        at: Thousands of images after which students are measured, or at their end where that is earlier; None for the
            end.
        seconds: Roughly; None if it was never measured.
        timed: Also times the configurations of the experiments in its questions; use an idle machine.
    """

    name: str
    what: str
    needs: tuple[str, ...]
    measure: Callable[[StudyInputs], StudyResult]
    seconds: float | None = None
    at: float | None = None
    timed: bool = False


@dataclass(frozen=True)
class ExperimentList:
    """All that is run for one teacher, in the order in which it is run.

    Attributes:
        teacher, data: As in a configuration.
        experiments, studies: What is run, and what is measured afterwards.
        questions: What is asked; arms and studies that the list lacks are not asked for.
        teachers: Teachers that are trained for it.
        judge: How students are scored.
        steps: Heun steps at which the teacher is scored; the last is the full sampler.
        threads: Threads of each run, so that its numbers do not depend on the machine's cores; None for all cores.
        machine: What the times are for.
    """

    teacher: str
    data: str
    experiments: tuple[Experiment, ...]
    studies: tuple[Study, ...] = ()
    questions: tuple[Question, ...] = ()
    teachers: tuple[TeacherRun, ...] = ()
    judge: Judge = field(default_factory=Judge)
    steps: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 18)
    threads: int | None = None
    machine: str = "two cores"

    def asked_of(self, name: str) -> set[str]:
        """Scores that the questions ask of an experiment or study."""
        questions = (q for q in self.questions if name in q.arms or name in q.studies)
        return {metric for q in questions for metric in (*q.primary, *q.also)}

    @property
    def names(self) -> list[str]:
        items: tuple[TeacherRun | Experiment | Study, ...] = (*self.teachers, *self.experiments, *self.studies)
        return [item.name for item in items]

    def asked_by(self, notebook: str) -> Question | None:
        """The question that a notebook answers, with the arms and studies that are in this list."""
        found = next((q for q in self.questions if q.notebook == notebook), None)
        if found is None:
            return None
        names = set(self.names)
        arms, studies = (tuple(n for n in given if n in names) for given in (found.arms, found.studies))
        contrasts = tuple(pair for pair in found.contrasts if names.issuperset(pair))
        return replace(found, arms=arms, studies=studies, contrasts=contrasts)

    def notebooks_of(self, name: str) -> tuple[str, ...]:
        """Notebooks that read an experiment or study, or show what an experiment is needed for."""
        read = {name} | {e.name for e in self.experiments if name in e.needs}
        read |= {s.name for s in self.studies if name in {need.partition("/")[0] for need in s.needs}}
        return tuple(q.notebook for q in self.questions if read & {*q.arms, *q.studies})
