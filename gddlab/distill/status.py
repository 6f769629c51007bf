"""Status and checkpoints of a run, as others see them. No torch is imported: the process that starts ranks is fast."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from gddlab.errors import GddlabError, shown
from gddlab.files import read_object, write_json

ACTIVE = ("starting", "running")
PROGRESS = ("nimg", "total_nimg", "world_size", "alarm")
"""What stays when a run is marked from outside."""


OUT_OF_TIME = "time"
"""`cause` of a run that a cluster has stopped before its time limit, by SIGUSR1, and that goes on in another job."""


def write_status(run_dir: Path, state: str, **extra: Any) -> None:
    """Writes status.json: the state, the time of the heartbeat (Unix seconds) and more.

    Args:
        run_dir: The run.
        state: "starting", "running", "done", "failed" or "stopped".
        **extra: Images seen, world size, error, ...; `heartbeat` in place of the present time.
    """
    write_json(run_dir / "status.json", {"state": state, "heartbeat": time.time(), **extra})


def read_status(run_dir: Path) -> dict[str, Any]:
    """status.json of a run: state, heartbeat (Unix seconds) and more; {} before there is one.

    Raises:
        GddlabError: It is damaged.
    """
    status = read_object(run_dir / "status.json")
    for name in ("heartbeat", "nimg", "total_nimg"):
        if not isinstance(status.get(name, 0), int | float):
            raise GddlabError(f"{run_dir / 'status.json'} holds {name}={shown(status[name])}, no number: it is damaged")
    return status


def progress_of(status: dict[str, Any]) -> str:
    """Thousands of images seen, of all, such as "0.604 of 8"; "" where a run did not begin."""
    if missing := [name for name in ("nimg", "total_nimg") if name not in status]:
        if len(missing) == 1:
            raise GddlabError(f"status.json lacks {missing[0]}: it is damaged")
        return ""
    return f"{status['nimg'] / 1000:g} of {status['total_nimg'] / 1000:g}"


NAME = re.compile(r"\d+\.\d{3}")
"""Names of checkpoints, thousands of images."""
LATEST, BEST = "latest", "best"


def name_of(nimg: int) -> str:
    """Name of what belongs to a moment of a run: thousands of images, in a form that sorts."""
    return f"{nimg / 1000:010.3f}"


def checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first: those up to the one that the pointer `latest` names."""
    folder = run_dir / "checkpoints"
    latest = float(pointer(folder, LATEST) or "inf")
    return [p for p in named(folder) if (p / "meta.json").exists() and float(p.name) <= latest]


def named(folder: Path) -> list[Path]:
    """What has the name of a checkpoint, oldest first."""
    return sorted((p for p in folder.glob("*") if NAME.fullmatch(p.name)), key=lambda p: float(p.name))


def pointer(folder: Path, name: str) -> str | None:
    """The checkpoint that a file names, `LATEST` or `BEST`; None without one."""
    try:
        text = (folder / name).read_text().strip()
    except OSError:
        return None
    return text if NAME.fullmatch(text) else None


def where_it_continues(run_dir: Path) -> str:
    """From what the same call continues a run, in words."""
    have = checkpoints(run_dir)
    return f"the checkpoint of {float(have[-1].name):g} kimg" if have else "the start, as no checkpoint was written"


def mark(run_dir: Path, state: str, **extra: Any) -> None:
    """Writes a state from outside the training, with how far it came; arguments as for `write_status`."""
    status = read_status(run_dir)
    write_status(run_dir, state, **{k: status[k] for k in PROGRESS if k in status}, **extra)
