"""The runs below a folder, at a glance."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from gddlab.errors import NotFound
from gddlab.launch.handle import attach
from gddlab.runs import load_runs
from gddlab.teachers.catalog import is_run

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["listing"]


def listing(folder: str | Path) -> pd.DataFrame:
    """A row a run.

    Args:
        folder: Folder of run directories, or one of them.

    Returns:
        Columns run (path below the folder), state, kimg ("3.2 of 12"), processes, heard (seconds since the last sign of life of one that runs; else
        empty), note (the last alarm, or why it failed).

    Raises:
        NotFound: No run there.
    """
    import pandas as pd

    folder = Path(folder)
    if not folder.is_dir():
        raise NotFound(f"no such folder: {folder}")
    runs = [attach(folder)] if is_run(folder) else [attach(r.run_dir) for r in load_runs(folder)]
    rows = []
    for run in runs:
        s, state = run.written_status, run.status
        seen = f"{s['nimg'] / 1000:.4g} of {s['total_nimg'] / 1000:.4g}" if "total_nimg" in s else ""
        heard = f"{time.time() - s['heartbeat']:.0f} s ago" if state == "running" and "heartbeat" in s else ""
        note = str(s.get("message") or s.get("alarm") or "").partition("\n")[0]
        name = folder.name if run.run_dir == folder else str(run.run_dir.relative_to(folder))
        rows.append((name, state, seen, str(s.get("world_size", "")), heard, note))
    return pd.DataFrame(rows, columns=["run", "state", "kimg", "processes", "heard", "note"])
