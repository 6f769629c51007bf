"""What an experiment is: a name, what it shows, and a configuration for each seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gddlab.distill.config import TrainConfig
from gddlab.freezing import FreezeMask
from gddlab.probing import ProbeResult

__all__ = ["Experiment", "Measured"]


@dataclass(frozen=True)
class Measured:
    """What masks are chosen from: the teacher's probe, and the rule's mask, whose budget all others share."""

    result: ProbeResult
    rule: FreezeMask


@dataclass(frozen=True)
class Experiment:
    """One row of a table, run with several seeds.

    Attributes:
        name: Folder of its runs, and the name in tables.
        what: One line for people.
        feeds: Notebooks that read it.
        mask: The mask for a training seed; None trains everything.
        configure: The configuration of a run, from its folder, seed and mask.
        seconds: One run with its evaluation on two cores, roughly; for the plan.
    """

    name: str
    what: str
    feeds: tuple[str, ...]
    mask: Callable[[Measured, int], FreezeMask | None]
    configure: Callable[[Path, int, FreezeMask | None], TrainConfig]
    seconds: float = 220.0
