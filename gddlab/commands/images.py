"""Commands that make images and score them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from gddlab.commands.output import out
from gddlab.errors import GddlabError

__all__ = ["Evaluate", "Sample"]


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
    steps: int | None = None
    """Of a teacher, noise levels, 18 if left away; of a student, network calls, 1 if left away."""
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
    S_churn: float | None = None
    """Noise added anew; 0 is deterministic."""
    S_min: float | None = None
    """Lowest sigma at which noise is added."""
    S_max: float | None = None
    """Highest sigma at which noise is added."""
    S_noise: float | None = None
    """Standard deviation of the added noise."""
    batch_size: int = 64
    """Images at once."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the network computes in."""
    channels_last: bool = False
    """Memory format that is faster with bfloat16 on CPUs, and on GPUs."""
    nproc: int = 1
    """Processes on this machine, for a folder or zip; several machines: run the same command under torchrun."""

    def run(self) -> None:
        from gddlab.runs import open_model
        from gddlab.sampling import sample, sample_files, save_grid

        names = ("steps", "sigmas", "solver", "discretization", "schedule", "scaling", "sigma_min", "sigma_max", "rho")
        given = {k: v for k in (*names, "S_churn", "S_min", "S_max", "S_noise") if (v := getattr(self, k)) is not None}
        given |= {
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
    """Scores a student, a teacher or a dataset against real images; a run keeps the records in evaluation.jsonl."""

    model: Positional[str]
    """Run directory of a student, teacher's name, EDM pickle, .safetensors file, or data: and a dataset's name or path."""
    data: str | None = None
    """Real images; the dataset on the model's card if left away."""
    metrics: tuple[str, ...] = ("fid", "kid")
    """Some of fid, kid, prc; fid is the Frechet distance on the extractor's features."""
    n: int | None = None
    """Images; as many as there are real ones if left away."""
    seed: int = 0
    """First seed."""
    steps: int | None = None
    """Of a teacher, Heun steps, 18 if left away; of a student, network calls, 1 if left away."""
    extractor: str = "lite2"
    """Feature network."""

    def run(self) -> None:
        from gddlab.datasets import open_dataset
        from gddlab.evaluation import append_records, evaluate
        from gddlab.runs import open_model

        name = self.model.removeprefix("data:")
        source: Any = open_dataset(name) if name != self.model else open_model(self.model)
        data = self.data or (name if name != self.model else None)
        scores = evaluate(
            source,
            data=data,
            metrics=self.metrics,
            n=self.n,
            seed=self.seed,
            steps=self.steps,
            extractor=self.extractor,
        )
        if (Path(self.model) / "config.json").exists():
            append_records(self.model, list(scores))
        out(scores)
