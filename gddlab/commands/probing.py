"""Commands that measure layers."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from gddlab.commands.output import out
from gddlab.errors import GddlabError

__all__ = ["Ablate", "Probe"]


@dataclass(frozen=True)
class Probe:
    """Measures the activation of layers at each noise level, and saves table, arrays and a heat map of each statistic."""

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
    states: Literal["noised", "prior", "trajectory", "student"] = "noised"
    """Noised images, pure noise, the sampler's states, or the one-step input."""
    layers: str = "conv"
    """Preset (conv, block, attention, norm, linear, all), glob, or re:PATTERN."""
    stats: tuple[str, ...] = ()
    """Statistics; the default ones if left away."""
    per_channel: bool = False
    """Keeps mean and variance of each channel too."""
    n: int = 256
    """Images."""
    start: int = 0
    """Position of the first image; results of other images merge."""
    batch_size: int = 64
    """Rows of a forward pass (images times noise levels)."""
    seed: int = 0
    """Image i's noise comes from seed + start + i."""
    device: str | None = None
    """Where to run, such as cuda."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the network, under autocast."""
    dry_run: bool = False
    """Measures one pass, says what the whole would cost, and writes nothing."""

    def run(self) -> None:
        from gddlab.probing import probe
        from gddlab.teachers.catalog import open_model

        _check(self.out)
        extra: dict[str, Any] = {"stats": self.stats} if self.stats else {}
        result = probe(
            open_model(self.teacher),
            _levels(self.timesteps, self.sigmas, self.states),
            data=self.data,
            states=self.states,
            layers=self.layers,
            per_channel=self.per_channel,
            n=self.n,
            start=self.start,
            batch_size=self.batch_size,
            seed=self.seed,
            device=self.device,
            dtype=self.dtype,
            dry_run=self.dry_run,
            **extra,
        )
        if self.dry_run:
            out(result)
            return
        _write(result, self.out)


@dataclass(frozen=True)
class Ablate:
    """Replaces each layer's output in turn and measures what it does to the denoised image, at each noise level."""

    teacher: Positional[str] = "digits"
    """Name, EDM pickle, .safetensors file, or run directory."""
    out: Path = Path("ablation")
    """Folder for the result."""
    timesteps: int = 18
    """Noise levels on the Karras grid from 80 to 0.002."""
    sigmas: tuple[float, ...] = ()
    """Explicit noise levels, in place of the grid."""
    layers: str = "conv"
    """Preset (conv, block, attention, norm, linear, all), glob, or re:PATTERN."""
    mode: Literal["mean", "zero", "resample"] = "mean"
    """What stands in: the channel means at that noise level, zeros, or another image's output."""
    data: str | None = None
    """Dataset; the one on the teacher's card if left away."""
    states: Literal["noised", "prior", "trajectory", "student"] = "noised"
    """Noised images, pure noise, the sampler's states, or the one-step input."""
    n: int = 16
    """Images."""
    start: int = 0
    """Position of the first image."""
    batch_size: int = 64
    """Rows of a forward pass (images times noise levels)."""
    seed: int = 0
    """Image i's noise comes from seed + start + i."""
    device: str | None = None
    """Where to run, such as cuda."""

    def run(self) -> None:
        from gddlab.probing import ablate
        from gddlab.teachers.catalog import open_model

        _check(self.out)
        result = ablate(
            open_model(self.teacher),
            _levels(self.timesteps, self.sigmas, self.states),
            self.layers,
            self.mode,
            data=self.data,
            states=self.states,
            n=self.n,
            start=self.start,
            batch_size=self.batch_size,
            seed=self.seed,
            device=self.device,
        )
        _write(result, self.out)


def _check(folder: Path) -> None:
    """Refuses before minutes are spent what could not be saved."""
    if folder.exists() and not folder.is_dir():
        raise GddlabError(f"--out {folder} is a file: give a folder")
    above = next((p for p in (folder, *folder.absolute().parents) if p.exists()), None)
    if above is None or not os.access(above, os.W_OK):
        raise GddlabError(f"--out {folder} cannot be written: give another folder")


def _levels(timesteps: int, sigmas: tuple[float, ...], states: str) -> Any:
    if states == "student" and not sigmas and timesteps == 18:
        return None
    return list(sigmas) or timesteps


def _write(result: Any, folder: Path) -> None:
    """The result, a heat map of each statistic, and a line of what was measured."""
    from gddlab.theme import save_figure

    result.save(folder)
    for stat in result.stats:
        save_figure(result.heatmap(stat), folder / f"{stat}.png")
    for bad in result.meta["nonfinite"][:5]:
        sys.stderr.write(
            f"not finite: {bad['layer']} ({bad['side']}) at sigma {bad['sigma']:g}, {bad['images']} images\n"
        )
    out(
        f"{folder}: {len(result.layers)} layers at {len(result.sigmas)} noise levels; statistics {', '.join(result.stats)}"
    )
