"""Commands that measure layers and choose what to freeze."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from gddlab.commands.output import out
from gddlab.freezing import FreezeMask

__all__ = ["Freeze", "Probe"]


Stats = tuple[str, ...]


@dataclass(frozen=True)
class Probe:
    """Measures the activation of layers at each noise level, and saves table, matrices and a heat map."""

    teacher: Positional[str] = "digits"
    """Name, EDM pickle, .safetensors file, or run directory."""
    out: Path = Path("probe")
    """Folder for the result."""
    timesteps: int = 18
    """Noise levels on the Karras grid from 80 to 0.002."""
    sigmas: tuple[float, ...] = ()
    """Explicit noise levels, in place of the grid."""
    data: str | None = None
    """Dataset; the one on the teacher's card if left away."""
    states: Literal["noised", "prior", "student"] = "noised"
    """Noised images, pure noise, or the one-step input."""
    layers: str = "conv"
    """Preset (conv, block, all), glob, or re:PATTERN."""
    stats: Stats = ()
    """Statistics; the default ones if left away."""
    n: int = 256
    """Images."""
    batch_size: int = 64
    """Rows of a forward pass (images times noise levels)."""
    seed: int = 0
    """Image i's noise comes from seed + i."""

    def run(self) -> None:
        from gddlab.probing import probe
        from gddlab.reporting.figures import save_figure
        from gddlab.teachers import load_teacher

        extra: dict[str, Any] = {"stats": self.stats} if self.stats else {}
        result = probe(
            load_teacher(self.teacher),
            list(self.sigmas) or self.timesteps,
            data=self.data,
            states=self.states,
            layers=self.layers,
            n=self.n,
            batch_size=self.batch_size,
            seed=self.seed,
            **extra,
        )
        result.save(self.out)
        for stat in result.stats:
            save_figure(result.heatmap(stat).figure, self.out / f"{stat}.png")
        layers, sigmas = result.frame["layer"].nunique(), len(result.sigmas)
        out(f"{self.out}: {layers} layers at {sigmas} noise levels; statistics {', '.join(result.stats)}")


@dataclass(frozen=True)
class Freeze:
    """Chooses a freeze mask, by a rule on names or by a measured score, and saves it as JSON."""

    source: Positional[str] = "digits"
    """A teacher, or a folder that `gddlab probe` wrote."""
    out: Path = Path("mask.json")
    """File of the mask."""
    strategy: str = "gdd-i"
    """gdd-i, gdd-i-2, gdd-i-3, budget, random, invert, none."""
    score: str | None = None
    """Statistic that strategy budget goes by."""
    at: float = 80.0
    """Noise level at which the score is read, sigma."""
    freeze: Literal["low", "high"] = "low"
    """Whether low or high scores are frozen first."""
    budget: float = 0.85
    """Share of all parameters to freeze."""
    mask: Path | None = None
    """The mask that strategy invert inverts."""
    seed: int = 0
    """Seed of strategy random."""

    def run(self) -> None:
        from gddlab.freezing import select_freeze
        from gddlab.probing import ProbeResult
        from gddlab.teachers import load_teacher

        folder = Path(self.source)
        source = ProbeResult.load(folder) if (folder / "frame.parquet").exists() else load_teacher(self.source)
        mask = select_freeze(
            source,
            strategy=self.strategy,
            score=self.score,
            at=self.at,
            freeze=self.freeze,
            budget=self.budget,
            mask=FreezeMask.load(self.mask) if self.mask else None,
            seed=self.seed,
        )
        mask.save(self.out)
        out(mask.summary().to_string())
        out(f"{self.out}: {mask.fraction:.2%} of {mask.n_params:,} parameters frozen by {mask.strategy}")
