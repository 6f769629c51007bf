"""Commands on images to learn from."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from gddlab.commands.output import out

__all__ = ["Prepare"]


@dataclass(frozen=True)
class Prepare:
    """Makes an EDM zip with a manifest out of images: a folder, a zip, CIFAR-10, or a Hugging Face dataset. The same command continues."""

    source: Positional[str]
    """Folder, zip, cifar10, cifar-10-python.tar.gz, or hf:NAME[:CONFIG][:SPLIT]."""
    out: Positional[Path | None] = None
    """The zip to make; not needed with --dry-run."""
    resolution: int | None = None
    """Side of the images made, pixels; that of the source if left away."""
    crop: Literal["none", "center"] = "none"
    """center: the largest square around the centre; none refuses images that are not square."""
    filter: Literal["lanczos", "box", "bicubic", "bilinear", "hamming", "nearest"] = "lanczos"
    """Resampling filter."""
    alpha: Literal["refuse", "white", "black"] = "refuse"
    """What stands behind transparent pixels."""
    classes: tuple[int, ...] | None = None
    """Class ids to keep."""
    max_images: int | None = None
    """Keeps so many, drawn by --seed."""
    seed: int = 0
    """Seed of that draw."""
    workers: int | None = None
    """Processes; as many as there are cores if left away."""
    overwrite: bool = False
    """Replaces a zip that is there."""
    dry_run: bool = False
    """Reads every image, writes nothing, and says what is wrong; exit code 2 if anything is."""
    download: bool = False
    """Fetches CIFAR-10 when it is not found."""

    def run(self) -> None:
        from gddlab.datasets import prepare

        report = prepare(
            self.source,
            self.out,
            resolution=self.resolution,
            crop=self.crop,
            filter=self.filter,
            alpha=self.alpha,
            classes=self.classes,
            max_images=self.max_images,
            seed=self.seed,
            workers=self.workers,
            overwrite=self.overwrite,
            dry_run=self.dry_run,
            download=self.download,
        )
        out(report)
        if not report.ok:
            sys.exit(2)
