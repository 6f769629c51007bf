"""Runs declared teachers, experiments and studies, skips what is done, continues what was stopped; ships results."""

from __future__ import annotations

import functools
import json
import os
import struct
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout

from gddlab.datasets import open_dataset
from gddlab.distill.config import TrainConfig
from gddlab.distill.teacher import train_teacher
from gddlab.errors import GddlabError, unknown
from gddlab.evaluation import (
    append_records,
    evaluate_snapshots,
    find_extractor,
    load_records,
    missing_scores,
    score_student,
    scores_of,
)
from gddlab.experiments.digits import DIGITS
from gddlab.experiments.emoji import EMOJI
from gddlab.experiments.experiment import (
    Experiment,
    ExperimentList,
    MaskInputs,
    Question,
    Study,
    StudyInputs,
    TeacherRun,
)
from gddlab.experiments.full import FULL
from gddlab.experiments.masks import measure
from gddlab.files import atomic_path, folder_of, last_jsonl, read_json, thin_jsonl, write_bytes, write_json
from gddlab.launch import attach, train
from gddlab.lock import held
from gddlab.nets import load_network, save_network
from gddlab.probing import ProbeResult
from gddlab.provenance import commit, hardware, versions
from gddlab.runs import ARCHIVE, Run, load_run, write_archive
from gddlab.runtime import chosen_device
from gddlab.teachers import bundled_teachers, load_precond
from gddlab.teachers.catalog import tensors_of
from gddlab.workers import run_workers

LISTS: dict[str, ExperimentList] = {"digits": DIGITS, "emoji": EMOJI, **FULL}
STAGES = ("teachers", "experiments", "studies")
"""In this order: each needs what is made before."""
STUDENT = "student.safetensors"
TEACHERS = "teachers"
"""Folder of the teachers of a list; what begins with it is the path of one."""
WAIT_S = 5.0
"""Between two looks at what other processes work on."""


@dataclass(frozen=True)
class Planned:
    """A teacher, run or study of a list, with its state.

    Attributes:
        item, seed, folder: What, with which seed (None for a teacher or study), and where.
        state: "to do", "begun", "to evaluate" or "done".
        seconds: How long it will take, or took; None if unknown.
    """

    item: TeacherRun | Experiment | Study
    seed: int | None
    folder: Path
    state: str
    seconds: float | None

    def __str__(self) -> str:
        return self.item.name if self.seed is None else f"{self.item.name} seed {self.seed}"


def find_list(name: str) -> ExperimentList:
    if name not in LISTS:
        raise unknown("list of experiments", name, LISTS)
    return LISTS[name]


def question(notebook: str, name: str = "digits") -> Question:
    """What a notebook answers, as it was declared before the runs.

    Args:
        notebook: Its file's name without .ipynb.
        name: The list.

    Raises:
        GddlabError: Unknown list, or no such question.
    """
    chosen = find_list(name)
    found = chosen.asked_by(notebook)
    if found is None:
        raise unknown("notebook", notebook, sorted(q.notebook for q in chosen.questions))
    return found


def plan(
    name: str = "digits", *, out: str | Path = "reproduction", only: Sequence[str] = (), seeds: int | None = None
) -> list[Planned]:
    """The teachers of a list, its runs, first seeds first, and its studies, with their states.

    Args:
        name, out, only, seeds: As for `reproduce`.

    Raises:
        GddlabError: Unknown list, experiment or study.
    """
    chosen = find_list(name)
    if seeds is not None and seeds < 1:
        raise GddlabError(f"seeds={seeds}: give at least 1")
    folder, wanted = folder_of("out", out) / name, _wanted(chosen, only)
    planned: list[Planned] = []
    for t in chosen.teachers:
        if t.name in wanted:
            path = folder / TEACHERS / t.name
            planned.append(Planned(t, None, path, *_teacher_state(t, path)))
    runs = [(k, e, seed) for e in chosen.experiments if e.name in wanted for k, seed in enumerate(e.seeds[:seeds])]
    for _, e, seed in sorted(runs, key=lambda run: run[0]):
        path = folder / e.name / f"seed-{seed}"
        planned.append(Planned(e, seed, path, *_run_state(chosen, e, path)))
    for s in chosen.studies:
        if s.name in wanted:
            planned.append(Planned(s, None, folder / s.name, *_study_state(chosen, s, folder)))
    if not planned:
        raise GddlabError(f"only={[*only]}: the list {name!r} has none of what it reads")
    return planned


def _wanted(chosen: ExperimentList, only: Sequence[str]) -> set[str]:
    """Names that `only` means: of teachers, experiments, studies, or of notebooks for all that they read."""
    if isinstance(only, str):
        raise GddlabError(f"only={only!r}: give a list of names")
    if not only:
        return set(chosen.names)
    asked = {q.notebook for q in chosen.questions}
    out: set[str] = set()
    for name in only:
        if name in asked:
            q = chosen.asked_by(name)
            assert q is not None
            needs = {need.partition("/")[0] for s in chosen.studies if s.name in q.studies for need in s.needs}
            out |= {*q.arms, *q.studies, *(needs & {*chosen.names})}
        elif name in chosen.names:
            out.add(name)
        else:
            raise unknown("experiment", name, [*chosen.names, *sorted(asked)])
    for e in reversed(chosen.experiments):  # what others begin with stands before them
        out |= e.needs if e.name in out else set()
    return out | {teacher for e in chosen.experiments if e.name in out and (teacher := _own_teacher(e))}


def _own_teacher(experiment: Experiment) -> str | None:
    """The teacher of the list that an experiment begins with."""
    folder, _, rest = (experiment.teacher or "").partition("/")
    return rest.partition("/")[0] if folder == TEACHERS else None


def _teacher_state(run: TeacherRun, folder: Path) -> tuple[str, float | None]:
    last = last_jsonl(folder / "metrics.jsonl")
    if (folder / "teacher.safetensors").exists():
        return "done", float(last["seconds"]) if last else None
    if last is None or run.seconds is None:
        return "to do" if last is None else "begun", run.seconds
    total = run.configure(folder).total_kimg
    return "begun", run.seconds * (1 - last["kimg"] / total)


def _run_state(chosen: ExperimentList, experiment: Experiment, run_dir: Path) -> tuple[str, float | None]:
    if not (run_dir / "config.json").exists():
        return "to do", experiment.seconds
    run = load_run(run_dir)
    last = last_jsonl(run_dir / "metrics.jsonl")
    took = float(last["seconds"]) if last else 0.0
    if run.written_status.get("state") != "done":
        share = last["kimg"] / run.config.total_kimg if last else 0.0
        return "begun", None if experiment.seconds is None else experiment.seconds * (1 - share)
    missing = any(
        missing_scores(run, metrics, kimg=kimg, n=_scored(chosen), **how)
        for kimg in _points(experiment, run.config)
        for metrics, how in _scores(chosen, experiment, end=kimg is None)
    )
    return ("to evaluate" if missing else "done"), took


def _scored(chosen: ExperimentList) -> int:
    """Images that scores of a list's students are of: as many as real ones, unless its judge says otherwise."""
    return chosen.judge.n or _length(chosen.data)


@functools.cache
def _length(data: str) -> int:
    return len(open_dataset(data))


def _points(experiment: Experiment, config: TrainConfig) -> list[float | None]:
    """When a run's student is scored by everything: thousands of images, and None for its end."""
    return [*(kimg for kimg in experiment.at if kimg < config.end_kimg), None]


def _study_state(chosen: ExperimentList, study: Study, folder: Path) -> tuple[str, float | None]:
    path = folder / study.name / "meta.json"
    if not path.exists():
        return "to do", study.seconds
    about = read_json(path)
    lacking = "asked" in about and not chosen.asked_of(study.name) <= {*about["asked"]}
    other = about["teacher_sha256"] != (_bundled_sha256(chosen.teacher) or about["teacher_sha256"])
    known = _inputs(study, folder).items() <= about["inputs"].items()
    made = known and not lacking and not other
    return ("done" if made else "to do"), float(about["seconds"])


@functools.cache
def _bundled_sha256(teacher: str) -> str | None:
    """Hash of a bundled teacher; None of another, which may have to be downloaded."""
    return load_precond(teacher).card.sha256 if teacher in bundled_teachers() else None


def _inputs(study: Study, folder: Path) -> dict[str, str | None]:
    """Hash of each student that a study can measure, by what it needs: scored, and there; most do not ship."""
    found: dict[str, str | None] = {}
    for name in study.needs:
        run_dir = _needed(folder, name)
        if (run_dir / "config.json").exists():
            run = load_run(run_dir)
            kimg = _measured_at(study, run)
            ends = {run.config.end_kimg} if (run_dir / STUDENT).exists() else set()
            if kimg not in ends | {float(path.stem) for path in run.snapshots()}:
                continue
            for record in scores_of(load_records(run_dir), run.config):
                if record.kimg == kimg:
                    found[name] = record.model_sha256
    return found


def _measured_at(study: Study, run: Run) -> float:
    """Thousands of images after which a study measures the student of a run."""
    return min(study.at or run.config.end_kimg, run.config.end_kimg)


def _needed(folder: Path, name: str) -> Path:
    """The run that a study means by "gdd" or "gdd/seed-1"."""
    return folder / (name if "/" in name else f"{name}/seed-0")


def reproduce(
    name: str = "digits",
    *,
    out: str | Path = "reproduction",
    only: Sequence[str] = (),
    seeds: int | None = None,
    jobs: int = 1,
    nproc: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> list[Planned]:
    """Runs a list: its teachers, its experiments in `out/LIST/EXPERIMENT/seed-S`, then its studies.

    What is done is skipped, what was interrupted continues. Several processes may work on one folder: each takes what
    no other has.

    Args:
        name: "digits", "emoji", "cifar10", "afhqv2", "ffhq" or "imagenet64".
        out: Folder.
        only: Teachers, experiments and studies by name, or notebooks for all that they read; with what these begin with
            or are chosen from; all if empty.
        seeds: How many seeds of each experiment; None for as many as it has.
        jobs: How many are run at the same time. Where the list says the threads of a run, as for the digits, numbers do
            not depend on it.
        nproc: Processes of each training, and of each sampling for a score.
        say: Called with a line about each teacher, run or study.

    Returns:
        The plan as it stands afterwards.

    Raises:
        GddlabError: Unknown list or experiment, or an extractor of its scores lacks weights or a package. RunFailed: a
            run failed, with its traceback.
    """
    chosen = find_list(name)
    if jobs < 1:
        raise GddlabError(f"jobs={jobs}: give at least 1")
    folder_of("out", out)
    todo = [p for p in plan(name, out=out, only=only, seeds=seeds) if p.state != "done"]
    scores = (s for p in todo for s in chosen.judge.scores(chosen.data, asked=chosen.asked_of(p.item.name)))
    for extractor in {how["extractor"] for _, how in scores}:
        find_extractor(extractor).check()
    for stage in STAGES:
        left = [p for p in plan(name, out=out, only=only, seeds=seeds) if p.state != "done" and _stage(p) == stage]
        if not left:
            continue
        job: dict[str, Any] = {
            "name": name,
            "out": str(Path(out).absolute()),
            "only": list(only),
            "seeds": seeds,
            "nproc": nproc,
        }
        if jobs == 1 and chosen.threads is None:
            work(**job, stage=stage, wait=False, report=say)
        else:
            how: dict[str, Any] = {"threads": chosen.threads, "cores_for": jobs, "hint": "the same call continues"}
            entry = "gddlab.experiments.runner:work"
            run_workers({**job, "stage": stage, "wait": True}, min(jobs, len(left)), say, entry=entry, **how)
    return plan(name, out=out, only=only, seeds=seeds)


def _stage(planned: Planned) -> str:
    return STAGES[(TeacherRun, Experiment, Study).index(type(planned.item))]


def work(
    name: str,
    out: str,
    only: Sequence[str],
    seeds: int | None,
    nproc: int,
    stage: str,
    wait: bool,
    report: Callable[[str], Any],
) -> None:
    """Makes what is left of a stage of `reproduce`, one after the other, and omits what others work on.

    With `wait` it looks again until nothing is left.
    """
    chosen, folder = find_list(name), Path(out) / name
    told: set[str] = set()
    while True:
        items = [p for p in plan(name, out=out, only=only, seeds=seeds) if p.state != "done" and _stage(p) == stage]
        made, left = 0, [*items]
        for item in items:
            if isinstance(item.item, Experiment) and not _ready(item.item, item.seed, folder, left):
                continue  # another process works on what it needs
            with _claimed(item.folder) as mine:
                if mine:
                    made += 1
                    if said := _make(chosen, item, folder, name, nproc):
                        report(f"{item}: {said}")
                    left.remove(item)
                elif not wait and str(item) not in told:
                    told.add(str(item))
                    report(f"{item}: another process works on it")
        if not items or not (wait or made):
            return
        if not made:
            time.sleep(WAIT_S)


def _start(experiment: Experiment, seed: int | None, folder: Path) -> Path | None:
    """The student that a run begins with; None where that is the teacher."""
    if experiment.start is None:
        return None
    name, kimg = experiment.start
    return folder / name / f"seed-{seed}" / "snapshots" / f"{kimg:010.3f}.safetensors"


def _ready(experiment: Experiment, seed: int | None, folder: Path, left: Sequence[Planned]) -> bool:
    """Whether what a run begins with and what its mask is chosen from is there."""
    start = _start(experiment, seed, folder)
    if start is not None and not start.exists():
        assert experiment.start is not None
        name, run_dir = experiment.start[0], start.parents[1]
        if not any((p.item.name, p.seed) == (name, seed) for p in left):
            raise GddlabError(
                f"{experiment.name} begins with {start}, which is gone: remove {run_dir} to train it anew"
            )
        return False
    return not any(p.item.name in experiment.after for p in left)


def _make(chosen: ExperimentList, item: Planned, folder: Path, name: str, nproc: int) -> str:
    """Makes a teacher, run or study; "" where it is done."""
    if isinstance(item.item, TeacherRun):
        return f"{train_teacher(item.item.configure(item.folder), progress=False)}"
    if isinstance(item.item, Study):
        if _study_state(chosen, item.item, folder)[0] == "done":
            return ""
        _make_study(chosen, item.item, folder, name, nproc)
        return str(item.folder)
    if _run_state(chosen, item.item, item.folder)[0] == "done":
        return ""
    assert item.seed is not None
    config = _configured(chosen, item.item, item.seed, folder)
    # a run outlives the process that started it: if it still trains, this one waits for it
    run = attach(item.folder) if held(item.folder) else train(config, nproc=nproc)
    run.wait()
    if run.status != "done":
        raise GddlabError(f"{item} was {run.status}: the same call continues it")
    return _score(chosen, item.item, run, nproc)


def _configured(chosen: ExperimentList, experiment: Experiment, seed: int, folder: Path) -> TrainConfig:
    """The configuration of a run, with its mask, and its own teacher and start where it has them."""
    measured = MaskInputs(_measured(chosen, folder / "measured"), _runs_of(chosen, experiment.after, folder))
    config = experiment.configure(folder / experiment.name / f"seed-{seed}", seed, experiment.mask(measured, seed))
    changed: dict[str, Any] = {}
    if experiment.teacher is not None:
        path = str((folder / experiment.teacher).absolute())
        changed["teacher"] = path if _own_teacher(experiment) else experiment.teacher
    if (start := _start(experiment, seed, folder)) is not None:
        changed["student"] = str(start.absolute())
    return config.model_copy(update=changed)


def _scores(chosen: ExperimentList, experiment: Experiment, *, end: bool) -> Any:
    return chosen.judge.scores(chosen.data, asked=chosen.asked_of(experiment.name), end=end)


def _score(chosen: ExperimentList, experiment: Experiment, run: Run, nproc: int) -> str:
    """Scores a run's students where the experiment says; every snapshot by the first distance where it does not."""
    judge, n = chosen.judge, _scored(chosen)
    for kimg in _points(experiment, run.config):
        for metrics, how in _scores(chosen, experiment, end=kimg is None):
            score_student(run, metrics, kimg=kimg, n=n, nproc=nproc, **how)
    if not experiment.at:
        evaluate_snapshots(run, data=chosen.data, extractor=judge.extractor, n=n, nproc=nproc)
    name = find_extractor(judge.extractor).metric_name("fid")
    scored = scores_of(load_records(run.run_dir), run.config, n=n)
    (record,) = (r for r in scored if r.label == name and r.kimg == run.config.end_kimg)
    return f"{record.metric} {record.value:.1f} at {record.kimg:g} kimg"


def _runs_of(chosen: ExperimentList, names: Collection[str], folder: Path) -> list[Run]:
    """The finished runs of experiments."""
    paths = [folder / e.name / f"seed-{seed}" for e in chosen.experiments if e.name in names for seed in e.seeds]
    runs = [load_run(path) for path in paths if (path / "config.json").exists()]
    return [run for run in runs if run.written_status.get("state") == "done"]


def _measured(chosen: ExperimentList, folder: Path) -> ProbeResult:
    """The probe that masks are chosen from; it is made once."""
    with _claimed(folder, wait=True):
        if not (folder / "meta.json").exists():
            measure(chosen.teacher, chosen.data).save(folder)
    return ProbeResult.load(folder)


def _make_study(chosen: ExperimentList, study: Study, folder: Path, name: str, nproc: int) -> None:
    device = chosen_device()
    inputs = _inputs(study, folder)
    runs = {name: load_run(_needed(folder, name)) for name in inputs}
    ends = {name: _measured_at(study, run) for name, run in runs.items()}
    students = {
        name: run.student(None if ends[name] == run.config.end_kimg else ends[name]).to(device)
        for name, run in runs.items()
    }
    began = time.perf_counter()
    teacher = load_precond(chosen.teacher).to(device)
    configs = {}
    if study.timed:
        arms = {arm for q in chosen.questions if study.name in q.studies for arm in q.arms}
        configs = {
            e.name: _configured(chosen, e, e.seeds[0], folder)
            for e in chosen.experiments
            if e.name in arms and e.teacher is None and not e.needs
        }
    asked, folders = chosen.asked_of(study.name), {need: _needed(folder, need) for need in inputs}
    subjects = StudyInputs(teacher, chosen.data, students, chosen.steps, chosen.judge, folders, asked, configs, nproc)
    found = study.measure(subjects)
    target = folder / study.name
    (target / "meta.json").unlink(missing_ok=True)  # written last: the study is complete once it is there
    (target / "evaluation.jsonl").unlink(missing_ok=True)
    if found.records:
        append_records(target, found.records)
    with atomic_path(target / "frame.parquet") as tmp:
        found.frame.to_parquet(tmp, compression="zstd")
    about = {
        "name": study.name,
        "what": study.what,
        "command": f"gddlab reproduce {name} --only {study.name}",
        "teacher": chosen.teacher,
        "teacher_sha256": teacher.card.sha256,
        "inputs": inputs,
        **({"asked": sorted(asked)} if found.records else {}),
        "seconds": round(time.perf_counter() - began, 1),
        "versions": versions(),
        "commit": commit(),
        "hardware": hardware(),
    }
    write_json(target / "meta.json", about | dict(found.about))


@contextmanager
def _claimed(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone works on `folder`; the claim ends with the process."""
    lock = FileLock(folder / ".claim", timeout=-1 if wait else 0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        yield False
        return
    except OSError as e:
        raise GddlabError(f"{folder} cannot be written ({e.strerror}): give another out=") from None
    try:
        yield True
    finally:
        lock.release()


RUN_FILES = (
    *("config.json", "mask.json", "provenance.json", "teacher.json"),
    *("evaluation.jsonl", "alarms.jsonl", "status.json"),
)
"""What ships of a run, beside some rows of its metrics; see `SHOWN` for more."""
STUDY_FILES = ("frame.parquet", "evaluation.jsonl", "meta.json")
ROWS = 24
"""Rows of metrics that ship of a run."""
SHOWN = ("11_samples", "24_editing")
"""Notebooks whose arms also ship, of their first seed, the last sample grid and the student in half precision."""
LARGEST = 2 << 20
"""Bytes of a student that ships."""


def ship(name: str, out: str | Path, to: str | Path, *, only: Sequence[str] = ()) -> list[Path]:
    """Writes the small files of a list's finished runs, one archive per experiment, its studies, the teacher's probe.

    Args:
        name, out, only: As for `reproduce`.
        to: Folder; files are written to `to/LIST/...`. `gddlab.load_runs` reads the archives as if they were folders.

    Returns:
        The files and folders written.

    Raises:
        GddlabError: No run and no study of these is done; `to` is `out`.
    """
    chosen = find_list(name)
    out, to = folder_of("out", out), folder_of("to", to)
    if to.resolve() == out.resolve():
        raise GddlabError(f"to={to} is where the runs are: give another folder")
    done = [p for p in plan(name, out=out, only=only) if p.state == "done"]
    runs: dict[str, list[Planned]] = {}
    for p in done:
        if isinstance(p.item, Experiment):
            runs.setdefault(p.item.name, []).append(p)
    studies = [p for p in done if isinstance(p.item, Study)]
    if not runs and not studies:
        raise GddlabError(f"no run of {name!r} below {out} is done: run gddlab reproduce {name} first")
    looked_at = {arm for notebook in SHOWN if (shown := chosen.asked_by(notebook)) for arm in shown.arms}
    written: list[Path] = []
    for experiment, items in runs.items():
        files: dict[str, bytes] = {}
        for item in items:
            found = _run_files(item.folder, out / name, shown=experiment in looked_at and item is items[0])
            files |= {f"{experiment}/seed-{item.seed}/{n}": content for n, content in found.items()}
        path = to / name / f"{experiment}{ARCHIVE}"
        write_archive(path, files)
        written.append(path)
    for item in studies:
        target = to / item.folder.relative_to(out)
        for file in (item.folder / n for n in STUDY_FILES):
            if file.exists():
                write_bytes(target / file.name, file.read_bytes())
        written.append(target)
    measured = out / name / "measured"
    if measured.is_dir():
        ProbeResult.load(measured).save(to / name / "measured")
        written.append(to / name / "measured")
    return written


def _run_files(run_dir: Path, top: Path, *, shown: bool) -> dict[str, bytes]:
    """What ships of a run by name; paths of this machine become paths below the list's folder."""
    own = f"{top.absolute()}{os.sep}".encode()
    files = {n: (run_dir / n).read_bytes().replace(own, b"") for n in RUN_FILES if (run_dir / n).exists()}
    rows = thin_jsonl(run_dir / "metrics.jsonl", ROWS)
    files["metrics.jsonl"] = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    card = json.loads(files["teacher.json"])
    if "source" in card:
        card["source"] = card["source"] if card["source"].startswith(TEACHERS) else Path(card["source"]).name
        files["teacher.json"] = json.dumps(card).encode()
    for path in load_run(run_dir).grids()[-1:] if shown else ():
        files[f"samples/{path.name}"] = path.read_bytes()
    if shown:
        net, meta = load_network(run_dir / STUDENT, beside=tensors_of)
        config = load_run(run_dir).config
        frozen = config.mask is not None and config.teacher in bundled_teachers()
        beside = (config.teacher, tensors_of(config.teacher)) if frozen else None
        with TemporaryDirectory() as tmp:
            save_network(net, Path(tmp) / STUDENT, half=True, beside=beside, **meta)
            content = _sorted_header((Path(tmp) / STUDENT).read_bytes())
        files |= {STUDENT: content} if len(content) <= LARGEST else {}
    return files


def _sorted_header(content: bytes) -> bytes:
    """A .safetensors file with its header in order, which safetensors writes in another one each time."""
    (size,) = struct.unpack("<Q", content[:8])
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + content[8 + size :]
