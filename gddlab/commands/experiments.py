"""Commands that repeat the experiments behind figures and tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from gddlab.commands.output import out
from gddlab.errors import GddlabError

__all__ = ["Reproduce"]


@dataclass(frozen=True)
class Reproduce:
    """Runs a declared list of experiments; what is done is skipped, what was killed goes on. Several processes may share one folder."""

    name: Positional[str] = "digits"
    """List of experiments: digits."""
    out: Path = Path("reproduction")
    """Folder of the runs."""
    only: tuple[str, ...] = ()
    """Experiments by name; all if left away."""
    seeds: int = 3
    """Training seeds of each."""
    dry_run: bool = False
    """Lists the runs with state and time, and starts none."""
    ship: Path | None = None
    """Copies what is light of the finished runs to this folder, and starts none."""

    def run(self) -> None:
        from gddlab.experiments import plan, reproduce, ship

        if self.ship is not None and self.dry_run:
            raise GddlabError("--ship with --dry-run: give one of them")
        if self.ship is not None:
            for folder in ship(self.name, self.out, self.ship, only=self.only, seeds=self.seeds):
                out(folder)
            return
        if not self.dry_run:
            reproduce(self.name, out=self.out, only=self.only, seeds=self.seeds, say=out)
        runs = plan(self.name, out=self.out, only=self.only, seeds=self.seeds)
        width = max(len(p.experiment.name) for p in runs)
        for p in runs:
            feeds = f" ({', '.join(p.experiment.feeds)})" if p.experiment.feeds else ""
            out(
                f"{p.experiment.name:<{width}}  seed {p.seed}  {p.state:<11}  {p.seconds / 60:5.1f} min  {p.experiment.what}{feeds}"
            )
        left = [p for p in runs if p.state != "done"]
        out(
            f"{len(runs) - len(left)} of {len(runs)} runs are done; the rest takes about {sum(p.seconds for p in left) / 60:.0f} minutes"
        )
