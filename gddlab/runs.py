"""The one reader of a run directory: configuration, status, metrics, alarms, snapshots, student, scores.

Torch is imported only where it is needed, so that listing runs and starting them is fast.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import lzma
import os
import socket
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gddlab.distill.status import ACTIVE, progress_of, read_status, where_it_continues
from gddlab.errors import GddlabError, NotFound
from gddlab.files import (
    atomic_path,
    by_number,
    cache_dir,
    file_sha256,
    hash_json,
    is_run,
    last_jsonl,
    made_in,
    path_of,
    read_json,
    read_jsonl,
    read_object,
    thin_jsonl,
    writing,
)
from gddlab.lock import held

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from gddlab.distill.config import TrainConfig
    from gddlab.freezing import FreezeMask
    from gddlab.nets import OneStepPrecond

STALE_S = 120.0
"""A run on another machine whose last heartbeat is older than this counts as dead."""


def _frame(rows: list[Any], columns: list[str] | None = None) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(rows, columns=columns)


class Run:
    """A run directory, seen from outside; reads what is there when asked, holds nothing."""

    def __init__(self, run_dir: str | Path):
        self.run_dir = place_of(path_of("run_dir", run_dir).resolve())
        if not (self.run_dir / "config.json").is_file() or made_in(self.run_dir) == "teacher":
            raise NotFound(f"{run_dir} is {_what(self.run_dir)}: give the directory of a run")

    def __repr__(self) -> str:
        try:
            share, status = progress_of(self.written_status), self.status
        except GddlabError as e:
            return f"<run {self.run_dir.name}: {e}>"
        return f"<run {self.run_dir.name}: {status}{f', {share} kimg' if share else ''}>"

    def __fspath__(self) -> str:
        """Its folder, so that what takes the path of a run takes the run."""
        return str(self.run_dir)

    @property
    def config(self) -> TrainConfig:
        """The validated configuration."""
        from gddlab.distill.config import TrainConfig

        return TrainConfig.load(self.run_dir)

    @property
    def provenance(self) -> dict[str, Any]:
        """Versions, commit, hashes, number of processes, hardware, and every start; {} before the first one."""
        return read_object(self.run_dir / "provenance.json")

    @property
    def written_status(self) -> dict[str, Any]:
        """status.json as it is, {} before there is one; `status` also looks whether the processes are alive."""
        return read_status(self.run_dir)

    @property
    def status(self) -> str:
        """ "starting", "running", "done", "failed" or "stopped"; a run whose processes have vanished reads "failed".

        When a rank has failed, this reads "running" until all processes have ended or were restarted (`max_restarts`).
        """
        state, alive = self._state(), held(self.run_dir)
        if state == "failed" and alive:
            return "running"
        if state in ACTIVE and not alive and not self._heard_elsewhere():
            state = self._state()  # it may have ended between the two looks
            return "failed" if state in ACTIVE else state
        return state

    def _state(self) -> str:
        return str(self.written_status.get("state", "stopped")) if self.run_dir.is_dir() else "failed"

    def _heard_elsewhere(self) -> bool:
        """Whether another machine, whose lock may not be visible here, sent a heartbeat recently."""
        s = self.written_status
        elsewhere = s.get("host", socket.gethostname()) != socket.gethostname()
        return elsewhere and time.time() - float(s["heartbeat"]) < STALE_S

    @property
    def metrics(self) -> pd.DataFrame:
        """One row per tick: kimg, loss/*, logits/*, r1, sec_per_kimg, ..."""
        return _frame(read_jsonl(self.run_dir / "metrics.jsonl"))

    @property
    def last_metrics(self) -> dict[str, Any] | None:
        """The last row of `metrics`, without reading the others; None before the first tick."""
        return last_jsonl(self.run_dir / "metrics.jsonl")

    def thinned_metrics(self, most: int = 1000) -> pd.DataFrame:
        """About `most` rows of `metrics`, evenly spread, and the last; costs the same however long the run is."""
        return _frame(thin_jsonl(self.run_dir / "metrics.jsonl", most))

    @property
    def evaluation(self) -> pd.DataFrame:
        """One row per evaluation record."""
        return _frame(read_jsonl(self.run_dir / "evaluation.jsonl"))

    @property
    def alarms(self) -> pd.DataFrame:
        """One row per alarm: kind, kimg, message, value, threshold; empty for a healthy run."""
        return _frame(read_jsonl(self.run_dir / "alarms.jsonl"), ["kind", "kimg", "message", "value", "threshold"])

    @property
    def probes(self) -> pd.DataFrame:
        """One row per layer and statistic of each probe made during training; empty where `probe_kimg` was not set."""
        import pandas as pd

        from gddlab.probing import ProbeResult
        from gddlab.probing.result import COLUMNS

        folders = [p for p in by_number(self.run_dir / "probes", "") if (p / "meta.json").is_file()]
        parts = [ProbeResult.load(p).frame.assign(kimg=float(p.name)) for p in folders]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["kimg", *COLUMNS])

    def draw_probes(self, stat: str, ax: Axes | None = None) -> Axes:
        """Draws one statistic of the student's layers over the training, such as "weight_change"; needs `probe_kimg`.

        Raises:
            GddlabError: No probe was made while training, or it has no such statistic.
        """
        from gddlab.probing.plots.heatmaps import draw_over_training

        frame = self.probes
        if not len(frame):
            raise GddlabError(f"{self.run_dir} has no probes: train with probe_kimg=")
        return draw_over_training(frame, stat, ax)

    @property
    def best(self) -> dict[str, Any] | None:
        """Metric, value and kimg of the best student scored during training; None where `metric_kimg` was not set."""
        return read_object(self.run_dir / "best.json") or None

    @property
    def written_config(self) -> dict[str, Any]:
        """config.json as it is, also where this version cannot read it."""
        return read_object(self.run_dir / "config.json")

    @property
    def card(self) -> dict[str, Any]:
        """The teacher's card, teacher.json; {} before there is one."""
        return read_object(self.run_dir / "teacher.json")

    @property
    def mask(self) -> FreezeMask | None:
        """The mask that the run trains under, mask.json; None without one."""
        from gddlab.freezing import FreezeMask

        path = self.run_dir / "mask.json"
        return FreezeMask.load(path) if path.exists() else None

    def snapshots(self) -> list[Path]:
        """EMA students saved during training, oldest first; the file's name is its kimg."""
        from gddlab.teachers.catalog import snapshots_of

        return snapshots_of(self.run_dir)

    def grids(self) -> list[Path]:
        """Sample grids of the same noise, oldest first; the file's name is its kimg."""
        return by_number(self.run_dir / "samples", ".png")

    def student(self, snapshot: str | Path | float | None = None) -> OneStepPrecond:
        """The EMA student: the final one, or that of a snapshot (path, or thousands of images), or the newest.

        "best" is the one with the best score of those made during training (`metric_kimg`); `best` says which.
        """
        from gddlab.teachers.catalog import load_student

        return load_student(self.run_dir, snapshot)


def _what(folder: Path) -> str:
    """What a folder is that holds no run."""
    return "a teacher's folder, not a run" if made_in(folder) == "teacher" else "no run directory, without config.json"


def load_run(run_dir: str | Path) -> Run:
    """A run directory to read, running or not; "NAME/seed-0" is also found in the archive NAME.tar.xz.

    Raises:
        NotFound: No run there.
    """
    return Run(run_dir)


ARCHIVE = ".tar.xz"
"""Suffix of run directories in one file: NAME.tar.xz holds NAME/seed-0, NAME/seed-1, ..."""


def write_archive(path: str | Path, files: Mapping[str, bytes]) -> None:
    """Writes files by name, the same bytes each time."""
    with atomic_path(path) as tmp, tarfile.open(tmp, "w:xz", preset=9) as tar:
        for name, content in sorted(files.items()):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def place_of(path: Path) -> Path:
    """Where a run, or the folder of an experiment's runs, is: there, or unpacked in the cache from its archive."""
    if not path.exists():
        path = path.absolute()
        for named in (p for p in (path.parent, path) if p.name):
            archive = named.with_name(f"{named.name}{ARCHIVE}")
            if archive.is_file():
                return _unpacked(named.parent, [archive]) / named.name / path.relative_to(named)
    return path


def _unpacked(folder: Path, archives: Sequence[Path]) -> Path:
    """The folder in the cache that holds what is in some of a folder's archives."""
    state = [[p.name, file_sha256(p)] for p in sorted(folder.glob(f"*{ARCHIVE}"))]
    top = cache_dir() / "runs" / f"{folder.name}-{hash_json(state)[:16]}"
    with writing(top):
        top.mkdir(parents=True, exist_ok=True)
    for archive in archives:
        name = archive.name.removesuffix(ARCHIVE)
        if (top / name).is_dir():
            continue
        with writing(top), tempfile.TemporaryDirectory(dir=top, prefix=".") as tmp:
            try:
                with tarfile.open(archive, "r:xz") as tar:
                    tar.extractall(tmp, filter="data")
            except (tarfile.TarError, lzma.LZMAError, EOFError) as e:
                raise GddlabError(f"{archive} cannot be read as an archive of runs ({e}): ship them again") from None
            if not (Path(tmp) / name).is_dir():
                raise GddlabError(f"{archive} has no folder {name!r}: give it the name of the folder inside")
            with contextlib.suppress(OSError):  # another process was first
                (Path(tmp) / name).rename(top / name)
    return top


def _files_below(folder: Path, pattern: str) -> list[Path]:
    """Files by name, hidden folders omitted.

    A folder that vanishes meanwhile holds none: others may train runs and unpack them at the same time.
    """
    found = []
    for top, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(top, name) for name in fnmatch.filter(names, pattern)]
    return found


def load_runs(folder: str | Path) -> list[Run]:
    """Every run directory at or below `folder`, by name; those in archives, NAME.tar.xz, are unpacked in the cache.

    A run that is both in a folder and in an archive beside it is the folder's.

    Raises:
        NotFound: No such folder, or no run in it.
    """
    folder = place_of(path_of("folder", folder))
    if folder.is_file():
        raise GddlabError(f"{folder} is a file: give a folder that holds run directories")
    if not folder.is_dir():
        raise NotFound(f"no such folder: {folder}: give a folder that holds run directories")
    archives: dict[Path, list[Path]] = {}
    for path in _files_below(folder, f"*{ARCHIVE}"):
        archives.setdefault(path.parent, []).append(path)
    places = {folder: folder} | {_unpacked(parent, sorted(paths)): parent for parent, paths in archives.items()}
    runs: dict[Path, Path] = {}
    for top, stands_for in places.items():
        for path in (p.parent for p in _files_below(top, "config.json")):
            runs.setdefault(stands_for / path.relative_to(top), path)
    found = [path for _, path in sorted(runs.items()) if is_run(path)]
    if not found:
        what = f"{folder} is {_what(folder)}" if made_in(folder) == "teacher" else f"no run below {folder}"
        raise NotFound(f"{what}: give a folder that holds run directories")
    return [Run(path) for path in found]


LISTED = ("run", "state", "kimg", "processes", "heard", "note")


def listing(folder: str | Path) -> pd.DataFrame:
    """The runs at or below a folder, one row each; a damaged run has the state "damaged", and its note says why.

    Args:
        folder: Folder of run directories, or one of them.

    Returns:
        Columns run (path below the folder), state, kimg ("3.2 of 12"), processes, heard (age of the last heartbeat
        while it runs; else empty), note (the last alarm, or why it failed).

    Raises:
        NotFound: No run there.
    """
    return _frame(list_runs(folder), [*LISTED])


def list_runs(folder: str | Path) -> list[dict[str, str]]:
    """The rows of `listing`, without pandas."""
    top = path_of("folder", folder).resolve()
    rows = []
    for run in load_runs(top):
        try:
            read_json(run.run_dir / "config.json")
            s, state = run.written_status, run.status
            heard = f"{time.time() - s['heartbeat']:.0f} s ago" if state == "running" and "heartbeat" in s else ""
            note = str(s.get("message") or s.get("alarm") or "").partition("\n")[0]
            if state == "failed" and not {"error", "message"} & {*s}:
                note = f"ended without a word; the same call continues from {where_it_continues(run.run_dir)}"
            row = (state, progress_of(s), str(s.get("world_size", "")), heard, note)
        except (ValueError, KeyError, TypeError, OSError) as e:
            row = ("damaged", "", "", "", str(e).replace(f"{run.run_dir}/", ""))
        inside = run.run_dir.is_relative_to(top)
        name = str(run.run_dir.relative_to(top)) if inside else f"{run.run_dir.parent.name}/{run.run_dir.name}"
        name = top.name if run.run_dir == top else name
        rows.append(dict(zip(LISTED, (name, *row), strict=True)))
    return rows


def load_study(folder: str | Path) -> pd.DataFrame:
    """The table of a study: what `gddlab reproduce` measured over several networks.

    Args:
        folder: Holds frame.parquet and meta.json.

    Returns:
        The table; `attrs` says where it comes from: name, what, command, inputs (hash of each student), n, seed,
        extractor, versions, commit.

    Raises:
        NotFound: No study there.
    """
    import pandas as pd

    folder = path_of("folder", folder)
    if not ((folder / "frame.parquet").is_file() and (folder / "meta.json").is_file()):
        raise NotFound(f"no study in {folder}: gddlab reproduce makes it, --only {folder.name}")
    frame = pd.read_parquet(folder / "frame.parquet")
    frame.attrs = read_json(folder / "meta.json")
    return frame
