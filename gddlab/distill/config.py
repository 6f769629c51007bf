"""The configuration of a run: frozen, validated when made, in EDM's vocabulary with units in the names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from gddlab.errors import GddlabError, unknown
from gddlab.files import read_json, write_json
from gddlab.freezing import FreezeMask

__all__ = ["TrainConfig"]


def _mask(value: Any) -> FreezeMask | None:
    if value is None or isinstance(value, FreezeMask):
        return value
    if isinstance(value, (str, Path)):
        return FreezeMask.load(value)
    raise GddlabError(f"mask={value!r}: give a FreezeMask, the path of a saved one, or None")


class TrainConfig(BaseModel):
    """A GDD run (without a mask) or a GDD-I run (with one). Presets make it; every field has a meaning at any size."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    run_dir: Path
    """Folder of the run."""
    teacher: str = "digits"
    """Teacher: a name, or the path of a .safetensors file."""
    data: str = "digits"
    """Real images: a dataset by name."""
    mask: Annotated[FreezeMask | None, BeforeValidator(_mask), tyro.conf.Suppress, tyro.conf.Fixed] = None
    """What is frozen; None trains everything (GDD). On the command line it is given by its file."""
    seed: int = Field(default=0, ge=0)
    """Seed of discriminator, projection, order, noise."""
    total_kimg: float = Field(default=5000, gt=0)
    """Length, thousands of real images."""
    batch: int = Field(default=256, ge=1)
    """Images a step over all processes."""
    lr_g: float = Field(default=1e-4, gt=0)
    """Adam's learning rate of the student."""
    lr_d: float = Field(default=1e-4, gt=0)
    """Adam's learning rate of the discriminator, before the correction for lazy R1."""
    loss: Literal["ns", "hinge"] = "ns"
    """Non-saturating or hinge."""
    adversarial_weight: float = Field(default=64, gt=0)
    """Factor of the adversarial losses, which are means over images."""
    r1_gamma: float = Field(default=1e-4, ge=0)
    """Weight of R1; 0 for none."""
    r1_interval: int = Field(default=16, ge=1)
    """Iterations between two R1 steps."""
    ema_halflife_kimg: float = Field(default=500, ge=0)
    """Half-life of the parameter average, thousands of images."""
    ema_rampup: float | None = Field(default=0.05, gt=0)
    """Bound of the half-life as a share of the images seen; None for no bound."""
    backbones: tuple[str, ...] = ("tf_efficientnet_lite0",)
    """Frozen feature networks of the discriminator."""
    input_size: int = Field(default=224, ge=32, le=256, multiple_of=32)
    """Size to which images are resized for the backbones, pixels."""
    cout: int = Field(default=64, ge=1)
    """Base width of the random projection, channels."""
    head_width: int = Field(default=512, ge=1)
    """Bound of the discriminator heads' widths, channels."""
    reuse_fakes: bool = False
    """Trains the discriminator on the images (and their features) of the generator step, instead of on fresh ones."""
    cache_real: bool = False
    """Keeps the real set's projected features in memory (exact: they do not change)."""
    sync_batchnorm: bool = False
    """BatchNorm statistics of the discriminator over all processes."""
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """bfloat16: the student runs under autocast; the discriminator stays float32. float64: everything, to check exactness."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""
    tick_kimg: float = Field(default=50, gt=0)
    """Images between two lines of metrics.jsonl, thousands."""
    snapshot_kimg: float = Field(default=500, gt=0)
    """Images between two sample grids and student snapshots, thousands."""
    checkpoint_kimg: float = Field(default=500, gt=0)
    """Images between two checkpoints, thousands."""
    probe_kimg: float | None = Field(default=None, gt=0)
    """Images between two probes of the averaged student into `probes/`, thousands; None for none."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Checkpoints kept."""

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as e:
            first = e.errors()[0]
            field = ".".join(str(x) for x in first["loc"])
            if first["type"] == "extra_forbidden":
                raise unknown("configuration field", field, type(self).model_fields) from None
            raise GddlabError(f"{field}={first['input']!r}: {first['msg']}") from None

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        from gddlab.nets.lite import LITE_WHEELS

        for name in self.backbones:
            if name not in LITE_WHEELS:
                raise unknown("backbone", name, LITE_WHEELS)
        if not self.backbones:
            raise GddlabError("backbones=(): give at least one")
        return self

    def to_json(self) -> dict[str, Any]:
        """Everything that determines the result; the mask by its hash, the folder left out."""
        out = self.model_dump(mode="json", exclude={"run_dir", "mask"})
        return out | {"mask": None if self.mask is None else self.mask.hash}

    def first_difference(self, other: dict[str, Any]) -> str | None:
        """The first field in which a written configuration differs from this one, with both values; None if equal."""
        for key, here in self.to_json().items():
            if other.get(key) != here:
                return f"{key} is {other.get(key)!r} there, {here!r} here"
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
        mask = FreezeMask.load(run_dir / "mask.json") if values["mask"] else None
        if mask is not None and mask.hash != values["mask"]:
            raise GddlabError(f"{run_dir / 'mask.json'} is not the mask of this run: restore it or use a new run_dir")
        return cls(**(values | {"run_dir": run_dir, "mask": mask}))
