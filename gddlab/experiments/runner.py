"""Runs declared experiments and studies, skips what is done, continues what was interrupted; ships the results."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gddlab.errors import GddlabError, unknown
from gddlab.evaluation import append_records, evaluate_end, evaluate_snapshots, load_records, missing_at_end
from gddlab.experiments.digits import DIGITS
from gddlab.experiments.experiment import Experiment, ExperimentList, Judge, Measured, Study, Subjects
from gddlab.experiments.full import FULL
from gddlab.experiments.masks import measure, rule
from gddlab.files import atomic_path, folder_of, last_jsonl, read_json, write_bytes, write_json
from gddlab.launch import attach, train
from gddlab.lock import held
from gddlab.probing import ProbeResult
from gddlab.provenance import commit, hardware, versions
from gddlab.runs import Run, load_run
from gddlab.runtime import chosen_device
from gddlab.teachers import load_precond

LISTS: dict[str, ExperimentList] = {"digits": DIGITS, **FULL}


def at_end(judge: Judge) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    """Metrics of a run's end, each with arguments of `evaluate_end`."""
    return [
        (("fid", "kid", "prc"), {"extractor": judge.extractor}),
        (("fid",), {"extractor": judge.extractor, "blocks": judge.blocks}),
        (("fid",), {"extractor": judge.second}),
    ]


@dataclass(frozen=True)
class Planned:
    """A run or study of a list, with its state.

    Attributes:
        item, seed, folder: What, with which seed (None for a study), and where.
        state: "to do", "begun", "to evaluate" or "done".
        seconds: How long it will take, or took; None if unknown.
    """

    item: Experiment | Study
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


def feeding(notebook: str, name: str = "digits") -> tuple[str, ...]:
    """Experiments that a notebook shows, in the order of their list.

    Args:
        notebook: Its file's name without .ipynb.
        name: The list.

    Raises:
        GddlabError: Unknown list, or no experiment feeds such a notebook.
    """
    found = find_list(name)
    fed = [e.name for e in found.experiments if notebook in e.feeds]
    if not fed:
        raise unknown("notebook", notebook, sorted({f for e in found.experiments for f in e.feeds}))
    return tuple(fed)


def plan(
    name: str = "digits", *, out: str | Path = "reproduction", only: Sequence[str] = (), seeds: int = 3
) -> list[Planned]:
    """The runs of a list in their order, then its studies, with their states.

    Raises:
        GddlabError: Unknown list, experiment or study.
    """
    chosen = find_list(name)
    for wanted in only:
        if wanted not in chosen.names:
            raise unknown("experiment", wanted, chosen.names)
    if seeds < 1:
        raise GddlabError(f"seeds={seeds}: give at least 1")
    folder = folder_of("out", out) / name
    planned: list[Planned] = []
    for seed, e in itertools.product(range(seeds), chosen.experiments):
        path = folder / e.name / f"seed-{seed}"
        if not only or e.name in only:
            planned.append(Planned(e, seed, path, *_run_state(e, path, chosen.judge)))
    for s in chosen.studies:
        if not only or s.name in only:
            planned.append(Planned(s, None, folder / s.name, *_study_state(s, folder)))
    return planned


def _run_state(experiment: Experiment, run_dir: Path, judge: Judge) -> tuple[str, float | None]:
    if not (run_dir / "config.json").exists():
        return "to do", experiment.seconds
    run = load_run(run_dir)
    last = last_jsonl(run_dir / "metrics.jsonl")
    took = float(last["seconds"]) if last else 0.0
    if run.written_status.get("state") != "done":
        share = last["kimg"] / run.config.total_kimg if last else 0.0
        return "begun", None if experiment.seconds is None else experiment.seconds * (1 - share)
    missing = any(missing_at_end(run, metrics, **how) for metrics, how in at_end(judge))
    return ("to evaluate" if missing else "done"), took


def _study_state(study: Study, folder: Path) -> tuple[str, float | None]:
    path = folder / study.name / "meta.json"
    if not path.exists():
        return "to do", study.seconds
    about = read_json(path)
    return ("done" if about["inputs"] == _inputs(study, folder) else "to do"), float(about["seconds"])


def _inputs(study: Study, folder: Path) -> dict[str, str | None]:
    """Hash of each student that a study can measure, by experiment: those of seed 0 that were scored at the end."""
    found: dict[str, str | None] = {}
    for name in study.needs:
        run_dir = folder / name / "seed-0"
        if (run_dir / "config.json").exists():
            run = load_run(run_dir)
            for record in load_records(run_dir):
                if record.kimg == run.config.end_kimg:
                    found[name] = record.model_sha256
    return found


def reproduce(
    name: str = "digits",
    *,
    out: str | Path = "reproduction",
    only: Sequence[str] = (),
    seeds: int = 3,
    nproc: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> list[Planned]:
    """Runs a list of experiments, each in `out/LIST/EXPERIMENT/seed-S`, then its studies.

    What is done is skipped, what was interrupted continues. Several processes may work on one folder: each takes runs
    that no other has.

    Args:
        name: "digits", "cifar10", "afhqv2", "ffhq" or "imagenet64".
        out: Folder.
        only: Experiments and studies by name; all if empty.
        seeds: Training seeds 0 to seeds - 1.
        nproc: Processes of each training, and of each sampling for a score.
        say: Called with a line about each run or study.

    Returns:
        The plan as it stands afterwards.

    Raises:
        GddlabError: Unknown list or experiment. RunFailed: a run failed, with its traceback.
    """
    chosen = find_list(name)
    folder = folder_of("out", out) / name
    measured: Measured | None = None
    for item in plan(name, out=out, only=only, seeds=seeds):
        with _claimed(item.folder) as mine:
            if not mine:
                say(f"{item}: another process works on it")
                continue
            if isinstance(item.item, Study):
                if _study_state(item.item, folder)[0] != "done":
                    _make_study(chosen, item.item, folder, name, nproc)
                    say(f"{item}: {item.folder}")
                continue
            if _run_state(item.item, item.folder, chosen.judge)[0] == "done":
                continue
            if measured is None:
                measured = _measured(chosen, folder / "measured")
            assert item.seed is not None
            config = item.item.configure(item.folder, item.seed, item.item.mask(measured, item.seed))
            # a run outlives the process that started it: if it still trains, this one waits for it
            run = attach(item.folder) if held(item.folder) else train(config, nproc=nproc)
            run.wait()
            say(f"{item}: {_score(run, chosen.judge, nproc)}")
    return plan(name, out=out, only=only, seeds=seeds)


def _score(run: Run, judge: Judge, nproc: int) -> str:
    """Scores every snapshot by the judge, the end by further metrics and the second extractor."""
    kimg, record = evaluate_snapshots(run, extractor=judge.extractor, n=judge.n, nproc=nproc)[-1]
    for metrics, how in at_end(judge):
        evaluate_end(run, metrics, n=judge.n, nproc=nproc, **how)
    return f"{record.metric} {record.value:.1f} at {kimg:g} kimg"


def _measured(chosen: ExperimentList, folder: Path) -> Measured:
    """The probe that masks are chosen from; it is made once."""
    with _claimed(folder, wait=True):
        if not (folder / "meta.json").exists():
            measure(chosen.teacher, chosen.data).result.save(folder)
    result = ProbeResult.load(folder)
    return Measured(result, rule(result))


def _make_study(chosen: ExperimentList, study: Study, folder: Path, name: str, nproc: int) -> None:
    device = chosen_device()
    inputs = _inputs(study, folder)
    students = {e: load_run(folder / e / "seed-0").student().to(device) for e in inputs}
    began = time.perf_counter()
    teacher = load_precond(chosen.teacher).to(device)
    configs = {}
    if study.timed:
        measured = _measured(chosen, folder / "measured")
        shown = [e for e in chosen.experiments if set(e.feeds) & set(study.feeds)]
        configs = {e.name: e.configure(folder / e.name / "seed-0", 0, e.mask(measured, 0)) for e in shown}
    found = study.measure(Subjects(teacher, chosen.data, students, chosen.steps, chosen.judge, configs, nproc))
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
    *("metrics.jsonl", "evaluation.jsonl", "alarms.jsonl", "status.json"),
)
"""What ships of a run; of the first seed, the last sample grid too."""
STUDY_FILES = ("frame.parquet", "evaluation.jsonl", "meta.json")


def ship(name: str, out: str | Path, to: str | Path, *, only: Sequence[str] = (), seeds: int = 3) -> list[Path]:
    """Copies the small files of a list's finished runs, one grid an experiment, its studies, and the teacher's probe.

    Args:
        name, out, only, seeds: As for `reproduce`.
        to: Folder; files are written to `to/LIST/...`, as in `out`.

    Returns:
        The folders written.

    Raises:
        GddlabError: No run and no study of these is done.
    """
    out, to = folder_of("out", out), folder_of("to", to)
    done = [p for p in plan(name, out=out, only=only, seeds=seeds) if p.state == "done"]
    if not done:
        raise GddlabError(f"no run of {name!r} below {out} is done: run gddlab reproduce {name} first")
    written: list[Path] = []
    for item in done:
        source, target = item.folder, to / item.folder.relative_to(out)
        study = isinstance(item.item, Study)
        for file in (source / n for n in (STUDY_FILES if study else RUN_FILES)):
            if file.exists():
                write_bytes(target / file.name, file.read_bytes())
        if not study:
            card = read_json(source / "teacher.json")
            if "source" in card:  # without the folder on this machine
                write_json(target / "teacher.json", {**card, "source": Path(card["source"]).name})
            for grid in load_run(source).grids()[-1:] if item.seed == 0 else ():
                write_bytes(target / "samples" / grid.name, grid.read_bytes())
        written.append(target)
    measured = out / name / "measured"
    if measured.is_dir():
        ProbeResult.load(measured).save(to / name / "measured")
        written.append(to / name / "measured")
    return written
