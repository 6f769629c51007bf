"""The one writer of a run's status.json."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from gddlab.files import write_json


def write_status(run_dir: Path, state: str, **extra: Any) -> None:
    """Writes status.json: the state, the time of the heartbeat (Unix seconds) and more.

    Args:
        run_dir: The run.
        state: "starting", "running", "done", "failed" or "stopped".
        **extra: Images seen, world size, error, ...; `heartbeat` in place of the present time.
    """
    write_json(run_dir / "status.json", {"state": state, "heartbeat": time.time(), **extra})
