"""Writes and reads status.json of a run. It imports no torch: the process that starts the ranks starts fast."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from gddlab.files import read_object, write_json

ACTIVE = ("starting", "running")
PROGRESS = ("nimg", "total_nimg", "world_size", "alarm")
"""What stays when a run is marked as stopped from outside."""


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
    return read_object(run_dir / "status.json")


def mark_stopped(run_dir: Path) -> None:
    """Writes "stopped" for a run whose processes were ended before they could; its last checkpoint remains valid."""
    status = read_status(run_dir)
    write_status(run_dir, "stopped", **{k: status[k] for k in PROGRESS if k in status})
