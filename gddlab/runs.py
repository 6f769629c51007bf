"""Reads a run directory: configuration, metrics, snapshots, student, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gddlab.distill.config import TrainConfig
from gddlab.errors import GddlabError, NotFound
from gddlab.files import read_json, read_jsonl
from gddlab.freezing import FreezeMask
from gddlab.nets import OneStepPrecond
from gddlab.teachers.catalog import load_student, snapshots_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["Run", "load_run", "load_runs", "load_study"]


class Run:
    """A run directory, seen from outside; reads what is there when asked, holds nothing."""

    def __init__(self, run_dir: str | Path):
        self.run_dir = Path(run_dir).resolve()
        if not (self.run_dir / "config.json").is_file():
            raise NotFound(f"{run_dir} is no run directory: it has no config.json")

    @property
    def config(self) -> TrainConfig:
        """The validated configuration."""
        return TrainConfig.load(self.run_dir)

    @property
    def provenance(self) -> dict[str, Any]:
        """Versions, commit, hashes, number of processes, hardware, and every start; {} before the first one."""
        path = self.run_dir / "provenance.json"
        return dict(read_json(path)) if path.exists() else {}

    @property
    def metrics(self) -> pd.DataFrame:
        """A row a tick: kimg, loss/*, logits/*, r1, sec_per_kimg, ..."""
        import pandas as pd

        return pd.DataFrame(read_jsonl(self.run_dir / "metrics.jsonl"))

    @property
    def evaluation(self) -> pd.DataFrame:
        """A row an evaluation record."""
        import pandas as pd

        return pd.DataFrame(read_jsonl(self.run_dir / "evaluation.jsonl"))

    @property
    def written_status(self) -> dict[str, Any]:
        """status.json, {} before there is one."""
        path = self.run_dir / "status.json"
        return read_json(path) if path.exists() else {}

    @property
    def probes(self) -> pd.DataFrame:
        """A row a layer and statistic of each probe made while training, with its kimg; empty where `probe_kimg` was not set."""
        import pandas as pd

        from gddlab.probing import ProbeResult
        from gddlab.probing.result import COLUMNS

        folders = sorted((self.run_dir / "probes").glob("*/meta.json"), key=lambda p: float(p.parent.name))
        parts = [ProbeResult.load(p.parent).frame.assign(kimg=float(p.parent.name)) for p in folders]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["kimg", *COLUMNS])

    def draw_probes(self, stat: str, ax: Axes | None = None) -> Axes:
        """Draws one statistic of the student's layers over the training, such as "weight_change"; needs `probe_kimg`.

        Raises:
            GddlabError: No probe was made while training, or it has no such statistic.
        """
        from gddlab.probing.plots import draw_over_training

        frame = self.probes
        if not len(frame):
            raise GddlabError(f"{self.run_dir} has no probes: train with probe_kimg=")
        return draw_over_training(frame, stat, ax)

    @property
    def best(self) -> dict[str, Any] | None:
        """Metric, value and kimg of the best student scored while training; None where `metric_kimg` was not set."""
        path = self.run_dir / "best.json"
        return read_json(path) if path.exists() else None

    @property
    def alarms(self) -> pd.DataFrame:
        """A row an alarm: kind, kimg, message, value, threshold; empty for a healthy run."""
        import pandas as pd

        return pd.DataFrame(
            read_jsonl(self.run_dir / "alarms.jsonl"), columns=["kind", "kimg", "message", "value", "threshold"]
        )

    @property
    def written_config(self) -> dict[str, Any]:
        """config.json as it is, also where this version cannot read it."""
        return dict(read_json(self.run_dir / "config.json"))

    @property
    def card(self) -> dict[str, Any]:
        """The teacher's card, teacher.json; {} before there is one."""
        path = self.run_dir / "teacher.json"
        return dict(read_json(path)) if path.exists() else {}

    @property
    def mask(self) -> FreezeMask | None:
        """The mask that the run trains under, mask.json; None without one."""
        path = self.run_dir / "mask.json"
        return FreezeMask.load(path) if path.exists() else None

    def snapshots(self) -> list[Path]:
        """EMA students saved on the way, oldest first; the file's name is its kimg."""
        return snapshots_of(self.run_dir)

    def grids(self) -> list[Path]:
        """Sample grids of the same noise, oldest first; the file's name is its kimg."""
        return sorted((self.run_dir / "samples").glob("*.png"), key=lambda p: float(p.stem))

    def student(self, snapshot: str | Path | None = None) -> OneStepPrecond:
        """The EMA student: of the end, or of a snapshot (its path, or its kimg as in `snapshots()`), or the newest there is.

        "best" is the one with the best score of those made while training (`metric_kimg`); `best` says which.
        """
        return load_student(self.run_dir, snapshot)


def load_run(run_dir: str | Path) -> Run:
    """A run directory to read, running or not.

    Raises:
        NotFound: No run there.
    """
    return Run(run_dir)


def load_runs(folder: str | Path) -> list[Run]:
    """Every run directory below `folder`, by path.

    Raises:
        NotFound: No such folder, or no run in it.
    """
    found = sorted(p.parent for p in Path(folder).rglob("config.json"))
    if not found:
        raise NotFound(f"no run below {folder}: give a folder that holds run directories")
    return [Run(path) for path in found]


def load_study(folder: str | Path) -> pd.DataFrame:
    """The table of a study: what `gddlab reproduce` measured over several networks.

    Args:
        folder: Holds frame.parquet and meta.json.

    Returns:
        The table; `attrs` says where it comes from: name, what, command, inputs (hash of each student), n, seed, extractor, versions, commit.

    Raises:
        NotFound: No study there.
    """
    import pandas as pd

    folder = Path(folder)
    if not ((folder / "frame.parquet").is_file() and (folder / "meta.json").is_file()):
        raise NotFound(f"no study in {folder}: gddlab reproduce makes it, --only {folder.name}")
    frame = pd.read_parquet(folder / "frame.parquet")
    frame.attrs = read_json(folder / "meta.json")
    return frame
