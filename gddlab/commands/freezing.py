"""Commands that choose what is frozen, and show it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import OmitSubcommandPrefixes, Positional

from gddlab.commands.output import out
from gddlab.freezing import FreezeMask

__all__ = ["Diff", "Freeze", "Mask", "Show"]


@dataclass(frozen=True)
class Freeze:
    """Chooses a freeze mask, by a rule on names or by a measured score, and saves it as JSON."""

    source: Positional[str] = "digits"
    """A teacher, or a folder that `gddlab probe` or `gddlab ablate` wrote."""
    out: Path = Path("mask.json")
    """File of the mask."""
    strategy: str = "gdd-i"
    """gdd-i, gdd-i-2, gdd-i-3, none, all-conv, norms-only, random, budget, threshold, per-resolution, invert."""
    score: str | None = None
    """Statistic that budget, threshold and per-resolution go by."""
    at: float | None = None
    """Noise level at which the score is read, sigma; 80 if left away."""
    freeze: Literal["low", "high"] | None = None
    """Whether low or high scores are frozen first; low if left away."""
    budget: float | None = None
    """Share to freeze; 0.85 if left away."""
    threshold: float | None = None
    """Score up to which (freeze low) or from which (high) strategy threshold freezes."""
    unit: Literal["params", "layers"] | None = None
    """What the budget is a share of; params if left away."""
    granularity: Literal["layer", "block", "tensor"] | None = None
    """What is frozen as a whole; layer if left away."""
    candidates: str | None = None
    """Which layers may be frozen: preset, glob or re:PATTERN; conv if left away."""
    always_train: tuple[str, ...] | None = None
    """Layers that are never frozen: first, last, names or globs; first and last if left away."""
    mask: Path | None = None
    """The mask that strategy invert inverts, or whose share strategy random takes."""
    seed: int | None = None
    """Seed of strategy random."""

    def run(self) -> None:
        from gddlab.freezing import select_freeze
        from gddlab.probing import ProbeResult
        from gddlab.teachers import load_teacher

        folder = Path(self.source)
        source = ProbeResult.load(folder) if (folder / "frame.parquet").exists() else load_teacher(self.source)
        names = (
            "score",
            "at",
            "freeze",
            "budget",
            "threshold",
            "unit",
            "granularity",
            "candidates",
            "always_train",
            "seed",
        )
        given: dict[str, Any] = {k: v for k in names if (v := getattr(self, k)) is not None}
        if self.mask is not None:
            given["mask"] = FreezeMask.load(self.mask)
        mask = select_freeze(source, strategy=self.strategy, **given)
        mask.save(self.out)
        out(mask.summary().to_string(formatters={"share": "{:.1%}".format}))
        out(f"{self.out}: {mask}")


@dataclass(frozen=True)
class Show:
    """Shows what a mask freezes, by stage and kind of layer."""

    mask: Positional[Path]
    """File of a mask."""
    names: bool = False
    """Lists the frozen parameters too."""

    def run(self) -> None:
        mask = FreezeMask.load(self.mask)
        out(mask)
        out(mask.summary().to_string(formatters={"share": "{:.1%}".format}))
        for name in mask.frozen if self.names else ():
            out(name)


@dataclass(frozen=True)
class Diff:
    """Compares masks of one network: how much they share, and for two masks which parameters differ."""

    masks: Positional[tuple[Path, ...]]
    """Two or more files of masks."""

    def run(self) -> None:
        from gddlab.errors import GddlabError
        from gddlab.freezing import compare

        if len(self.masks) < 2:
            raise GddlabError(f"mask diff compares masks, {len(self.masks)} given: name two files or more")
        masks = {f"{i}: {path}": FreezeMask.load(path) for i, path in enumerate(self.masks)}
        found = compare(masks)
        out(found.to_frame().round(4).to_string(na_rep="-"))
        out("\noverlap of the frozen parameters (Jaccard index)")
        out(found.overlap.round(3).to_string())
        if len(masks) == 2:
            first, second = masks.values()
            table = first.diff(second)
            out(f"\n{len(table)} parameters differ" + (":" if len(table) else ""))
            if len(table):
                out(table.to_string(index=False))


@dataclass(frozen=True)
class Mask:
    """Freeze masks: show one, compare several."""

    command: OmitSubcommandPrefixes[
        Annotated[Show, tyro.conf.subcommand("show")] | Annotated[Diff, tyro.conf.subcommand("diff")]
    ]

    def run(self) -> None:
        self.command.run()
