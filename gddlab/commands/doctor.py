"""The command that looks at the machine."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gddlab.commands.output import out

if TYPE_CHECKING:
    from rich.console import Console

    from gddlab.diagnosis import Doctor as Diagnosis

__all__ = ["Doctor", "show"]


@dataclass(frozen=True)
class Doctor:
    """Says what this machine has (devices, versions, weights, data), what is missing, and what gddlab can therefore do."""

    json: bool = False
    """Writes all of it as JSON."""

    def run(self) -> None:
        from gddlab.diagnosis import doctor

        found = doctor()
        if self.json:
            out(json.dumps(found.to_dict(), indent=2, allow_nan=False))
        elif sys.stdout.isatty():
            from rich.console import Console

            show(found, Console())
        else:
            out(found)
        if found.broken:
            sys.exit(2)


def show(found: Diagnosis, console: Console) -> None:
    """A table a section, then the problems."""
    from rich.table import Table
    from rich.text import Text

    from gddlab.diagnosis import SECTIONS

    for section in SECTIONS:
        table = Table(
            box=None, show_header=False, pad_edge=False, title=section, title_justify="left", title_style="bold"
        )
        table.add_column(width=1)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for f in found.brief(section):
            text = Text(f.value)
            if f.remedy:
                text.append(f"\n{f.remedy}", "dim")
            table.add_row(Text(f.mark, "green" if f.found else "yellow"), f.name, text)
        console.print(table)
        console.print()
    console.print(Text("problems", "bold"))
    for p in found.problems or ("none",):
        console.print(Text(p, "red" if found.problems else "green"))
