"""The configuration of a run: frozen, validated when made, in EDM's vocabulary with units in the names.

What comes in kinds is a part of its own, defined beside the code that it configures.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import tyro
from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from gddlab.datasets import BUILT_IN, name_and_part
from gddlab.distill.augment import Augment
from gddlab.distill.instance import Consistency, FromNoise, Progressive, Trajectory
from gddlab.distill.lpips import LPIPS
from gddlab.distill.parts import Settings
from gddlab.distill.projected import Projected
from gddlab.distill.stylegan2 import StyleGAN2
from gddlab.errors import GddlabError, warn
from gddlab.files import as_text, folder_of, located, made_in, path_of, read_json, read_object, write_json, writing
from gddlab.freezing import FreezeMask
from gddlab.nets.io import INITS
from gddlab.nets.precond import SIGMA_MAX, SIGMA_MIN
from gddlab.runtime import Seed
from gddlab.teachers import bundled_teachers


def _mask(value: Any) -> Any:
    return FreezeMask.load(value) if isinstance(value, (str, Path)) else value


def _data(value: Any) -> Any:
    """As `located`; of the name of a part, "faces.zip:train", the path is "faces.zip"."""
    name, part = name_and_part(as_text(value)) if isinstance(value, str | Path) else (value, None)
    return f"{_data(name)}:{part}" if part else located(name, BUILT_IN)


def _extractor(value: Any) -> Any:
    """As `located`, of the path of a judge; a name is none, whatever lies in the working folder."""
    path = isinstance(value, Path) or (isinstance(value, str) and (os.sep in value or value.endswith(".safetensors")))
    return located(value) if path else value


RunDir = Annotated[Path, BeforeValidator(lambda value: folder_of("run_dir", value))]
BEFORE = frozenset({"lock", "log", "mask.json", "status.json"})
"""What may be in the folder of a run before its configuration."""


TeacherName = Annotated[str, BeforeValidator(lambda value: located(value, bundled_teachers()))]
DataName = Annotated[str, BeforeValidator(_data)]
ExtractorName = Annotated[str, BeforeValidator(_extractor)]


StudentName = Annotated[str, BeforeValidator(lambda value: located(value, INITS))]


Discriminators = Annotated[
    Projected | StyleGAN2 | LPIPS | None, Field(discriminator="kind"), tyro.conf.AvoidSubcommands
]
InstanceLosses = Annotated[
    Progressive | Consistency | Trajectory | FromNoise | None, Field(discriminator="kind"), tyro.conf.AvoidSubcommands
]


DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}
"""Of weights and images by `precision`; bfloat16 is autocast's."""


class RunSettings(Settings):
    """The configuration of a run, which is written to its folder."""

    run_dir: RunDir
    places: ClassVar[tuple[str, ...]] = ()
    """Fields that name what the run knows by its hash too."""
    made: ClassVar[str] = "run"
    """What `made_in` says of its folder."""

    def to_json(self) -> dict[str, Any]:
        """Everything that determines the result; the folder left out."""
        return self.model_dump(mode="json", exclude={"run_dir"})

    def first_difference(self, other: dict[str, Any]) -> str | None:
        """The first field in which a written configuration differs from this one, with both values; None if equal.

        A field that did not exist when the other was written had its default.
        """
        defaults = type(self).model_construct(run_dir=Path()).to_json()
        for name, here in self.to_json().items():
            there = other.get(name, defaults.get(name))
            if not isinstance(here, dict) or not isinstance(there, dict) or here.get("kind") != there.get("kind"):
                if there != here:
                    return f"{name} is {_short(there)} there, {_short(here)} here"
                continue
            there = type(getattr(self, name)).model_construct().model_dump(mode="json") | there
            for field, value in here.items():
                if there[field] != value:
                    return f"{name}.{field} is {there[field]!r} there, {value!r} here"
        return None

    def make_folder(self) -> None:
        """Makes the folder where it is not there.

        Raises:
            GddlabError: It cannot be written, or holds something else than a run.
        """
        with writing(self.run_dir):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            names = {p.name for p in self.run_dir.iterdir() if not p.name.startswith(".")}
        kind = made_in(self.run_dir)
        if kind not in (self.made, None):
            raise GddlabError(f"{self.run_dir} holds a {kind}, no {self.made}: give an empty or new folder as run_dir")
        if "config.json" not in names and (other := sorted(names - BEFORE)):
            raise GddlabError(f"{self.run_dir} holds {other[0]!r} and no run: give an empty or new folder as run_dir")

    def check_images(self, sha256: str) -> None:
        """Refuses to continue with other images, by the hash of their manifest, than the run began with."""
        if read_object(self.run_dir / "provenance.json").get("dataset_sha256", sha256) != sha256:
            raise self.other_run("data", "images")

    def other_run(self, field: str, what: str) -> GddlabError:
        """The refusal of data or a teacher that differ by their hash: another place, or other content there now."""
        there, here = read_object(self.run_dir / "config.json").get(field), getattr(self, field)
        differ = f"{field} is {there!r} there, {here!r} here" if there != here else f"{here} holds other {what} now"
        return GddlabError(f"{self.run_dir} holds another run: {differ}; use a new run_dir")

    def write(self) -> None:
        """Writes config.json; the same configuration again is accepted.

        A run that began has the hashes of its data and teacher, so these may have moved: config.json then gets their
        new place, with a warning.

        Raises:
            GddlabError: The folder holds a run of another configuration; nothing is written.
        """
        path, here = self.run_dir / "config.json", self.to_json()
        self.make_folder()
        if not path.exists():
            write_json(path, here)
            return
        written = read_object(path)
        began = (self.run_dir / "provenance.json").exists()
        moved = {n: here[n] for n in self.places if began and n in written and written[n] != here[n]}
        if difference := self.first_difference(written | moved):
            raise GddlabError(f"{self.run_dir} holds another run: {difference}; use a new run_dir")
        if moved:
            write_json(path, written | moved)
            for name, place in moved.items():
                warn(f"{name} has moved from {written[name]} to {place}; its hash is the same")


def _short(value: Any) -> str:
    """A value of a field; a part that comes in kinds by its kind."""
    return f"of kind {value['kind']!r}" if isinstance(value, dict) and "kind" in value else repr(value)


class TrainConfig(RunSettings):
    """A GDD run (without a mask), a GDD-I run (with one), or an instance-based baseline; presets make it."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    noun: ClassVar[str] = "configuration field"
    places: ClassVar[tuple[str, ...]] = ("teacher", "data")

    run_dir: RunDir
    """Folder of the run."""
    teacher: TeacherName = "digits"
    """Teacher: a name, or the path of a .safetensors or EDM .pkl file."""
    data: DataName = "digits"
    """Real images: a dataset by name or path."""
    classes: tuple[int, ...] | None = None
    """Class ids to keep; they keep their ids. None keeps all."""
    max_images: int | None = Field(default=None, ge=1)
    """How many distinct images to keep; None keeps all."""
    subset_seed: Seed = 0
    """Of the choice of these images."""
    xflip: bool = False
    """Doubles the data by mirror images."""
    student: StudentName = "teacher"
    """Where the student begins: "teacher", with its weights; as controls "scratch", with fresh ones, or "shuffled",
    with the teacher's in random order; or a student, by the path of its file or run."""
    mid_sigmas: tuple[float, ...] = ()
    """Noise levels of a few-step student between 80 and 0.002, descending; () is one step, one level is two steps."""
    mask: Annotated[FreezeMask | None, BeforeValidator(_mask), tyro.conf.Suppress, tyro.conf.Fixed] = None
    """What is frozen; None trains everything (GDD). On the command line it is given by its file."""
    seed: Seed = 0
    """Seed of discriminator, projection, order, noise."""
    total_kimg: float = Field(default=5000, gt=0)
    """Length, thousands of real images."""
    batch: int = Field(default=256, ge=1)
    """Images per step over all processes."""
    batch_per_device: int | None = Field(default=None, ge=1)
    """Images that a process holds at once, a divisor of its share; gradients are accumulated and do not change. None
    holds all."""
    lr_g: float = Field(default=1e-4, gt=0)
    """Adam's learning rate of the student."""
    lr_d: float = Field(default=1e-4, gt=0)
    """Adam's learning rate of the discriminator, before the correction for lazy R1."""
    discriminator: Discriminators = Projected()
    """Heads on frozen backbones (projected); StyleGAN2's network, or the LPIPS network, trained whole; None trains on
    the instance loss alone."""
    instance: InstanceLosses = None
    """Instance-based loss, alone or added to the adversarial one: progressive, consistency, trajectory, or
    relative-to-noise distillation."""
    augment: Annotated[Augment | None, tyro.conf.AvoidSubcommands] = None
    """Augmentation in front of the discriminator."""
    loss: Literal["ns", "hinge"] = "ns"
    """Adversarial loss, non-saturating or hinge."""
    adversarial_weight: float = Field(default=64, gt=0)
    """Factor of the adversarial losses, which are means over images."""
    r1_gamma: float = Field(default=1e-4, ge=0)
    """Weight of R1, on real images, by the gradient with respect to the image; 0 for none."""
    r1_interval: int = Field(default=16, ge=1)
    """Iterations between two R1 steps, whose loss is multiplied by it."""
    ema_halflife_kimg: float = Field(default=500, ge=0)
    """Half-life of the parameter average, thousands of images."""
    ema_rampup: float | None = Field(default=0.05, gt=0)
    """Bound of the half-life as a share of the images seen; None for no bound."""
    reuse_fakes: bool = False
    """Trains the discriminator on the images of the generator step instead of fresh ones."""
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """Of the student: bfloat16 runs it under autocast. float64: everything, to check exactness."""
    precision_d: Literal["float32", "bfloat16"] = "float32"
    """Of the discriminator's passes in the generator and discriminator steps; R1 stays float32."""
    channels_last: bool = False
    """Memory format of student and discriminator: equal up to rounding, and faster for large networks.

    Pretrained backbones always have it.
    """
    tf32: bool = False
    """Whether float32 convolutions and matrix products use TF32 on a GPU, 10 bits of mantissa; the authors' do not."""
    cuda_graph: bool = False
    """Runs the iteration on one GPU as a CUDA graph: the same kernels, without the time to launch them."""
    compile: bool = False
    """torch.compile on the student and the frozen features."""
    shard: bool = False
    """Shards the student, its average and its optimiser over the processes (FSDP2), for students larger than a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    tick_kimg: float = Field(default=50, gt=0)
    """Images between two lines of metrics.jsonl, thousands."""
    snapshot_kimg: float = Field(default=500, gt=0)
    """Images between two sample grids and snapshots of the averaged student, thousands."""
    snapshot_raw: bool = False
    """Saves the student that is trained, not averaged, too (snapshots/raw)."""
    checkpoint_kimg: float = Field(default=500, gt=0)
    """Images between two checkpoints, thousands."""
    probe_kimg: float | None = Field(default=None, gt=0)
    """Images between two probes of the averaged student into `probes/`, thousands; None for none."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Checkpoints kept."""
    metric_kimg: float | None = Field(default=None, gt=0)
    """Images between two scores of the averaged student, thousands, of which the best is kept (best.safetensors); None
    for none."""
    metric: Literal["fid", "kid"] = "fid"
    """Frechet or kernel distance, by which the best student is chosen."""
    metric_extractor: ExtractorName = "lite2"
    """Feature network of the score, as for `evaluate`; the discriminator should not hold it."""
    metric_n: int | None = Field(default=None, ge=2)
    """Images scored; None for as many as there are real ones."""
    stop_on: tuple[Literal["nan", "saturated", "collapse", "detail", "jump"], ...] = ()
    """Alarms that stop the run; others are logged and shown."""

    @model_validator(mode="after")
    def _fields_fit(self) -> TrainConfig:
        self._check_student()
        if self.discriminator is None and self.instance is None:
            raise GddlabError("discriminator=None without instance: nothing is trained, give one of them")
        if self.discriminator is None and self.augment is not None:
            raise GddlabError("augment with discriminator=None: nothing sees augmented images, give augment=None")
        if self.precision == "float64" and self.precision_d == "bfloat16":
            raise GddlabError("precision='float64' with precision_d='bfloat16': give float32, which float64 replaces")
        if self.batch_per_device is not None and self.batch % self.batch_per_device:
            raise GddlabError(
                f"batch={self.batch}, batch_per_device={self.batch_per_device}: give a divisor of the batch"
            )
        if self.metric_kimg is None and self.metric_n is not None:
            raise GddlabError(f"metric_n={self.metric_n} without metric_kimg: nothing is scored, give metric_kimg too")
        if self.metric_kimg is None and "jump" in self.stop_on:
            raise GddlabError("stop_on='jump' without metric_kimg: no metric is there to jump, give metric_kimg too")
        return self

    def _check_student(self) -> None:
        levels = (SIGMA_MAX, *self.mid_sigmas, SIGMA_MIN)
        if any(a <= b for a, b in itertools.pairwise(levels)):
            raise GddlabError(f"mid_sigmas={self.mid_sigmas}: give descending noise levels between 80 and 0.002")
        if self.mid_sigmas and self.instance:
            raise GddlabError(
                f"mid_sigmas={self.mid_sigmas} with instance={self.instance.kind!r}: its student takes one step"
            )
        if self.shard and self.instance:
            raise GddlabError(
                f"shard=True with instance={self.instance.kind!r}: its passes hold parts of the student constant, "
                "give one of them"
            )
        other = [f for f in ("mid_sigmas", "instance", "augment", "shard") if getattr(self, f)]
        if self.cuda_graph and other:
            raise GddlabError(
                f"cuda_graph=True with {other[0]}: such an iteration does not consist of the same kernels on the GPU "
                "alone, give one of them"
            )
        if self.tf32 and self.compile:
            raise GddlabError("tf32=True with compile=True: the two were never tried together, give one of them")
        if self.shard and self.compile:
            raise GddlabError("shard=True with compile=True: the two were never tried together, give one of them")
        if self.student != "teacher" and self.mask is not None:
            raise GddlabError(f"student={self.student!r} with a mask: frozen layers are the teacher's, give mask=None")

    @property
    def has_r1(self) -> bool:
        """Whether R1 is computed."""
        return self.discriminator is not None and self.r1_gamma > 0

    @property
    def end_kimg(self) -> float:
        """Thousands of images after the last iteration: `total_kimg`, or the next whole batch."""
        return self.iterations * self.batch / 1000

    @property
    def iterations(self) -> int:
        """Of the whole run: the fewest whole batches that hold `total_kimg` thousand images."""
        return -(-round(self.total_kimg * 1000) // self.batch)

    def to_json(self) -> dict[str, Any]:
        """Everything that determines the result; the mask by its hash, the folder left out."""
        out = self.model_dump(mode="json", exclude={"run_dir", "mask"})
        return out | {"mask": None if self.mask is None else self.mask.hash}

    def write(self) -> None:
        """Writes config.json and mask.json; the same configuration again is accepted.

        Raises:
            GddlabError: The folder holds a run of another configuration; nothing is written.
        """
        self.make_folder()
        new = not (self.run_dir / "config.json").exists()
        if new and self.mask is not None:
            self.mask.save(self.run_dir / "mask.json")
        super().write()
        if not new:
            self.load(self.run_dir)  # refuses a mask.json that was edited

    @classmethod
    def load(cls, run_dir: str | Path) -> TrainConfig:
        """The configuration of a run directory."""
        run_dir = path_of("run_dir", run_dir)
        values: dict[str, Any] = read_json(run_dir / "config.json")
        if "mask" not in values:
            raise GddlabError(f"{run_dir / 'config.json'} does not say which mask, or none: it is damaged")
        mask = FreezeMask.load(run_dir / "mask.json") if values["mask"] else None
        if mask is not None and mask.hash != values["mask"]:
            raise GddlabError(f"{run_dir / 'mask.json'} is not the mask of this run: restore it or use a new run_dir")
        return cls(**(values | {"run_dir": run_dir, "mask": mask}))
