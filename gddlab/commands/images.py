"""Commands that make images and score them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tyro.conf import OmitArgPrefixes, Positional

from gddlab.commands.output import out
from gddlab.errors import GddlabError

__all__ = ["Evaluate", "Reference", "Sample", "SamplerOptions"]


@dataclass(frozen=True)
class SamplerOptions:
    """How a network makes images."""

    steps: int | None = None
    """Of a teacher, noise levels, 18 if left away; of a student, network calls, its own if left away."""
    sigmas: tuple[float, ...] | None = None
    """Of a student: noise levels of its steps, descending from 80."""
    solver: Literal["heun", "euler"] | None = None
    """Of a teacher, like all that follow; EDM's choice if left away."""
    discretization: Literal["edm", "vp", "ve", "iddpm"] | None = None
    """Which noise levels are visited."""
    schedule: Literal["linear", "vp", "ve"] | None = None
    """sigma(t)."""
    scaling: Literal["none", "vp"] | None = None
    """s(t)."""
    sigma_min: float | None = None
    """Lowest noise level but 0."""
    sigma_max: float | None = None
    """Highest noise level; a SiD student is --steps 1 --sigma-max 2.5."""
    rho: float | None = None
    """Exponent of discretization edm."""
    alpha: float | None = None
    """Where Heun takes its second slope, as a share of the step."""
    S_churn: float | None = None
    """Noise added anew; 0 is deterministic."""
    S_min: float | None = None
    """Lowest sigma at which noise is added."""
    S_max: float | None = None
    """Highest sigma at which noise is added."""
    S_noise: float | None = None
    """Standard deviation of the added noise."""

    def given(self) -> dict[str, Any]:
        """The options that were given."""
        return {k: v for k, v in vars(self).items() if v is not None}


@dataclass(frozen=True)
class Sample:
    """Draws images: to a PNG grid, to a folder of PNG files, or to an EDM zip. Folder and zip: the same command continues."""

    model: Positional[str]
    """Run directory of a student, teacher's name, EDM pickle, or .safetensors file."""
    out: Path = Path("samples.png")
    """File that ends in .png (a grid) or .zip, or a folder."""
    n: int = 64
    """Images."""
    seed: int = 0
    """Image i comes from seed + i."""
    label: int | None = None
    """Class of all images, of a conditional network; in turn if left away."""
    sampler: OmitArgPrefixes[SamplerOptions] = field(default_factory=SamplerOptions)
    batch_size: int = 64
    """Images at once."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the network computes in."""
    channels_last: bool = False
    """Memory format that is faster with bfloat16 on CPUs, and on GPUs."""
    nproc: int = 1
    """Processes on this machine, for a folder or zip; several machines: run the same command under torchrun."""

    def run(self) -> None:
        from gddlab.sampling import sample, sample_files, save_grid
        from gddlab.teachers.catalog import open_model

        given = self.sampler.given() | {
            "seed": self.seed,
            "class_labels": self.label,
            "batch_size": self.batch_size,
            "dtype": None if self.dtype == "float32" else self.dtype,
            "channels_last": self.channels_last,
        }
        if self.out.suffix != ".png":
            out(sample_files(self.model, self.out, self.n, nproc=self.nproc, **given))
            return
        if self.nproc != 1:
            raise GddlabError(f"nproc={self.nproc} for a grid: several processes write a folder or a .zip")
        save_grid(sample(open_model(self.model), self.n, progress=True, **given), self.out)
        out(self.out)


@dataclass(frozen=True)
class Evaluate:
    """Scores a student, a teacher, a dataset or a folder of images against real images; a run keeps the records in evaluation.jsonl."""

    model: Positional[str]
    """Run directory of a student, teacher's name, EDM pickle, .safetensors file, folder or zip of images, or data: and a dataset's name."""
    snapshot: str | None = None
    """Of a run: the snapshot by its thousands of images, or best; the student of the end if left away."""
    data: str | None = None
    """Real images, or .npz of their statistics (EDM's, or of `gddlab reference`); the dataset on the model's card if left away."""
    metrics: tuple[str, ...] = ("fid", "kid")
    """Some of fid, kid, prc, is, mind; fid is the Frechet distance on the extractor's features."""
    n: int | None = None
    """Images; as many as there are real ones if left away."""
    seed: int = 0
    """First seed."""
    blocks: int = 1
    """Blocks of n seeds, one after another, and their least distance; EDM's protocol is --n 50000 --blocks 3."""
    extractor: str = "lite2"
    """Feature network: lite2, lite0, inception, clip, dinov2, vgg16."""
    sampler: OmitArgPrefixes[SamplerOptions] = field(default_factory=SamplerOptions)
    batch_size: int = 128
    """Images sampled at once."""
    nproc: int | None = None
    """Processes on this machine; or run the same command under torchrun."""
    out: Path | None = None
    """Also writes the records to this file, JSON."""

    def run(self) -> None:
        from gddlab.evaluation import append_records, evaluate
        from gddlab.files import write_json
        from gddlab.runs import load_run
        from gddlab.teachers.catalog import is_run

        of_run = is_run(self.model)
        if self.snapshot is not None and not of_run:
            raise GddlabError(f"snapshot {self.snapshot} of {self.model}, which is no run directory: leave it away")
        source: Any = self.model if self.snapshot is None else load_run(self.model).student(self.snapshot)
        scores = evaluate(
            source,
            data=self.data,
            metrics=self.metrics,
            n=self.n,
            seed=self.seed,
            extractor=self.extractor,
            blocks=self.blocks,
            batch_size=self.batch_size,
            nproc=self.nproc,
            **self.sampler.given(),
        )
        if int(os.environ.get("RANK", 0)):
            return  # all ranks have the scores, the first one tells
        if of_run:
            append_records(self.model, list(scores))
        if self.out is not None:
            write_json(self.out, [r.to_dict() for r in scores])
        out(scores)


@dataclass(frozen=True)
class Reference:
    """Writes what images are scored against to a .npz: mean and covariance of the features of real images, with manifest and extractor."""

    data: Positional[str]
    """Dataset by name or path."""
    out: Path = Path("reference.npz")
    """File that ends in .npz."""
    extractor: str = "lite2"
    """Feature network, as for `gddlab evaluate`."""
    features: bool = False
    """Also keeps the features of each image, for kid, prc and mind."""

    def run(self) -> None:
        from gddlab.evaluation import reference

        out(reference(self.data, self.out, extractor=self.extractor, features=self.features))
