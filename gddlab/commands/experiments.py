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
    """Runs a declared list of experiments, then its studies; what is done is skipped, what was killed goes on. Several processes may share one folder."""

    name: Positional[str] = "digits"
    """List of experiments: digits, cifar10, afhqv2, ffhq, imagenet64."""
    out: Path = Path("reproduction")
    """Folder of the runs."""
    only: tuple[str, ...] = ()
    """Experiments and studies by name; all if left away."""
    seeds: int = 3
    """Training seeds of each experiment."""
    nproc: int = 1
    """Processes of each training."""
    dry_run: bool = False
    """Lists what there is with state and time, and starts nothing."""
    ship: Path | None = None
    """Copies what is light of what is finished to this folder, and starts nothing."""

    def run(self) -> None:
        from gddlab.experiments import LISTS, plan, reproduce, ship

        if self.ship is not None and self.dry_run:
            raise GddlabError("--ship with --dry-run: give one of them")
        if self.ship is not None:
            for folder in ship(self.name, self.out, self.ship, only=self.only, seeds=self.seeds):
                out(folder)
            return
        if not self.dry_run:
            reproduce(self.name, out=self.out, only=self.only, seeds=self.seeds, nproc=self.nproc, say=out)
        items = plan(self.name, out=self.out, only=self.only, seeds=self.seeds)
        width = max(len(str(p)) for p in items)
        for p in items:
            feeds = f" ({', '.join(p.item.feeds)})" if p.item.feeds else ""
            out(f"{p!s:<{width}}  {p.state:<11}  {_time(p.seconds)}  {p.item.what}{feeds}")
        left = [p for p in items if p.state != "done"]
        unknown = sum(p.seconds is None for p in left)
        rest = (
            f"the rest takes about {sum(p.seconds or 0 for p in left) / 60:.0f} minutes on {LISTS[self.name].machine}"
        )
        if unknown:
            rest += f", and {unknown} that nobody has timed: see gddlab preflight {self.name}"
        took = sum(p.seconds or 0 for p in items if p.state == "done") / 3600
        out(f"{len(items) - len(left)} of {len(items)} are done, in {took:.1f} hours without scores; {rest}")


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "        ?"
    return f"{seconds / 60:5.1f} min" if seconds < 7200 else f"{seconds / 3600:5.1f} h  "
