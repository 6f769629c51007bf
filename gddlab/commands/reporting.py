"""The command that makes a page of runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from gddlab.commands.output import out

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """A self-contained HTML page of a run: configuration, curves, scores, samples, provenance; of several: a comparison."""

    runs: Positional[tuple[str, ...]]
    """Run directories, or folders that hold some."""
    out: Path = Path("report.html")
    """The page."""

    def run(self) -> None:
        from gddlab.reporting.report import report

        out(report(self.runs, self.out))
