"""`report`: a page of one run, or of several beside each other, self-contained HTML."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gddlab.errors import GddlabError
from gddlab.files import check_kind, path_of, write_text
from gddlab.runs import Run, load_runs


def report(runs: str | Path | Run | Sequence[str | Path | Run], out: str | Path = "report.html") -> Path:
    """Writes a page of one run or several: configuration, provenance, curves, scores, samples, alarms.

    The page is one file and fetches nothing. Several runs are compared: what differs in their configurations, their
    distances over training, their last samples. A run that is not finished, failed, was never scored, or was written by
    another version is shown as such.

    Args:
        runs: Run directories, or folders that hold some at any depth.
        out: The file, which ends in .html; a page that is there is replaced.

    Returns:
        Its path.

    Raises:
        NotFound: No such folder, or no run in it.
        GddlabError: No runs, or `out` is a folder, has another suffix, or is there and no page of gddlab.
    """
    given = runs if isinstance(runs, Sequence) and not isinstance(runs, str) else [runs]
    found = [run for each in given for run in _runs(each)]
    folders = list(dict.fromkeys(run.run_dir for run in found))
    if not folders:
        raise GddlabError("no runs given: give run directories, or a folder that holds some")
    out = path_of("out", out)
    if out.is_dir() or out.suffix.lower() not in (".html", ".htm"):
        raise GddlabError(f"out={str(out)!r}{' is a folder' * out.is_dir()}: give a name that ends in .html")
    check_kind(out, lambda path: b'name="generator" content="gddlab"' in path.read_bytes(), "page of gddlab")
    from gddlab.reporting.run_pages import run_page, runs_page
    from gddlab.reporting.run_summary import Summary

    seen = [Summary(Run(folder), name) for folder, name in zip(folders, _names(folders), strict=True)]
    write_text(out, run_page(seen[0]) if len(seen) == 1 else runs_page(seen))
    return out


def _runs(given: str | Path | Run) -> Sequence[Run]:
    """A run without those inside it, or the runs below a folder."""
    if isinstance(given, Run):
        return [given]
    folder = path_of("runs", given)
    return [Run(folder)] if (folder / "config.json").is_file() else load_runs(folder)


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest paths that tell the runs apart, with the experiment's folder above one of a seed."""
    common = Path(os.path.commonpath([f.parent for f in folders]))
    if any(f.parent == common and f.name.startswith("seed-") for f in folders):
        common = common.parent
    return [f.relative_to(common).as_posix() for f in folders]
