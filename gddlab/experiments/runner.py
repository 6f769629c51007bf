"""`reproduce`: runs what is declared, skips what is done, continues what was interrupted."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gddlab.errors import GddlabError, unknown
from gddlab.evaluation import evaluate_snapshots
from gddlab.experiments.digits import DIGITS
from gddlab.experiments.experiment import Experiment, Measured
from gddlab.experiments.masks import measure, rule
from gddlab.files import read_json, read_jsonl, write_bytes, write_json
from gddlab.launch import attach, train
from gddlab.launch.lock import held
from gddlab.probing import ProbeResult
from gddlab.runs import load_run

__all__ = ["LISTS", "Planned", "plan", "reproduce", "ship"]

LISTS = {"digits": DIGITS}
LIGHT = (
    "config.json",
    "mask.json",
    "provenance.json",
    "teacher.json",
    "metrics.jsonl",
    "evaluation.jsonl",
    "status.json",
)
"""What ships of a run, with the last sample grid."""


@dataclass(frozen=True)
class Planned:
    """A run of the list: its experiment, seed, folder, what it has come to, and how long it takes or took, seconds."""

    experiment: Experiment
    seed: int
    run_dir: Path
    state: str
    seconds: float


def plan(
    name: str = "digits", *, out: str | Path = "reproduction", only: Sequence[str] = (), seeds: int = 3
) -> list[Planned]:
    """The runs of a list in their order, with their states: "to do", "begun", "to evaluate", "done".

    Raises:
        GddlabError: Unknown list or experiment.
    """
    if name not in LISTS:
        raise unknown("list of experiments", name, LISTS)
    names = [e.name for e in LISTS[name]]
    for wanted in only:
        if wanted not in names:
            raise unknown("experiment", wanted, names)
    if seeds < 1:
        raise GddlabError(f"seeds={seeds}: give at least 1")
    chosen = [e for e in LISTS[name] if not only or e.name in only]
    folder = Path(out) / name
    runs = [(e, seed, folder / e.name / f"seed-{seed}") for seed in range(seeds) for e in chosen]
    return [Planned(e, seed, path, *_state(e, path)) for e, seed, path in runs]


def _state(experiment: Experiment, run_dir: Path) -> tuple[str, float]:
    if not (run_dir / "config.json").exists():
        return "to do", experiment.seconds
    run = load_run(run_dir)
    lines = read_jsonl(run_dir / "metrics.jsonl")
    took = float(lines[-1]["seconds"]) if lines else 0.0
    if run.written_status.get("state") != "done":
        share = lines[-1]["kimg"] / run.config.total_kimg if lines else 0.0
        return "begun", experiment.seconds * (1 - share)
    scored = {r["kimg"] for r in read_jsonl(run_dir / "evaluation.jsonl")}
    return ("done" if run.config.total_kimg in scored else "to evaluate"), took


def reproduce(
    name: str = "digits",
    *,
    out: str | Path = "reproduction",
    only: Sequence[str] = (),
    seeds: int = 3,
    say: Callable[[str], None] = lambda text: None,
) -> list[Planned]:
    """Runs a list of experiments, each in `out/LIST/EXPERIMENT/seed-S`; what is done is skipped, what was killed goes on.

    Several processes may work on one folder: each takes runs that no other has.

    Args:
        name: "digits".
        out: Folder.
        only: Experiments by name; all if empty.
        seeds: Training seeds 0 to seeds - 1.
        say: Told what happens, in lines.

    Returns:
        The plan as it stands afterwards.

    Raises:
        GddlabError: Unknown list or experiment. RunFailed: a run failed, with its traceback.
    """
    measured: Measured | None = None
    for item in plan(name, out=out, only=only, seeds=seeds):
        with _claimed(item.run_dir) as mine:
            if not mine:
                say(f"{item.experiment.name} seed {item.seed}: another process works on it")
                continue
            state = _state(item.experiment, item.run_dir)[0]
            if state == "done":
                continue
            if measured is None:
                measured = _measured(Path(out) / name / "measured")
            mask = item.experiment.mask(measured, item.seed)
            config = item.experiment.configure(item.run_dir, item.seed, mask)
            # a run outlives the process that started it: where it still goes on, this one waits for it
            run = attach(item.run_dir) if held(item.run_dir) else train(config)
            run.wait()
            scores = evaluate_snapshots(run)
            say(
                f"{item.experiment.name} seed {item.seed}: {scores[-1][1].metric} {scores[-1][1].value:.1f} at {scores[-1][0]:g} kimg"
            )
    return plan(name, out=out, only=only, seeds=seeds)


def _measured(folder: Path) -> Measured:
    """The probe that masks are chosen from; it is made once."""
    with _claimed(folder, wait=True):
        if not (folder / "meta.json").exists():
            measure().result.save(folder)
    result = ProbeResult.load(folder)
    return Measured(result, rule(result))


@contextmanager
def _claimed(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone works on `folder`; the claim ends with the process, however that ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / ".claim", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as e:
        raise GddlabError(f"{folder} cannot be written ({e.strerror}): give another out=") from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            mine = True
        except BlockingIOError:
            mine = False
        yield mine
    finally:
        os.close(fd)


def ship(name: str, out: str | Path, to: str | Path, *, only: Sequence[str] = (), seeds: int = 3) -> list[Path]:
    """Copies what is light of a list's finished runs: configuration, mask, provenance, metrics, scores, last grid; and the measurement.

    Args:
        name, out, only, seeds: As for `reproduce`.
        to: Folder; runs come to lie in `to/LIST/EXPERIMENT/seed-S`.

    Returns:
        The folders written.

    Raises:
        GddlabError: No run of these is done.
    """
    done = [p.run_dir for p in plan(name, out=out, only=only, seeds=seeds) if p.state == "done"]
    if not done:
        raise GddlabError(f"no run of {name!r} below {out} is done: run gddlab reproduce {name} first")
    written: list[Path] = []
    for source in done:
        target = Path(to) / source.relative_to(out)
        for file in (source / n for n in LIGHT):
            if file.exists():
                write_bytes(target / file.name, file.read_bytes())
        card = read_json(source / "teacher.json")
        if "source" in card:  # where the teacher lay on this machine is nobody's business
            write_json(target / "teacher.json", {**card, "source": Path(card["source"]).name})
        for grid in load_run(source).grids()[-1:]:
            write_bytes(target / "samples" / grid.name, grid.read_bytes())
        written.append(target)
    measured = Path(out) / name / "measured"
    if measured.is_dir():
        ProbeResult.load(measured).save(Path(to) / name / "measured")
        written.append(Path(to) / name / "measured")
    return written
