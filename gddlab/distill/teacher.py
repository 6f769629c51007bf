"""Trains a diffusion teacher, a U-Net or a transformer, on one device, resumable."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt, field_validator, model_validator
from torch import Tensor

from gddlab.datasets import BatchReader, ImageDataset, open_dataset
from gddlab.distill.config import DataName, RunDir, RunSettings
from gddlab.ema import Average, ema_beta
from gddlab.errors import GddlabError, validated
from gddlab.files import atomic_path, hash_tensors, read_jsonl, write_json, write_text
from gddlab.lock import take
from gddlab.nets import Precond, from_edm, save_network
from gddlab.nets.architectures import NCSNPP
from gddlab.nets.precond import SIGMA_MAX, SIGMA_MIN, edm_loss
from gddlab.progress import progress_bar
from gddlab.provenance import commit, versions
from gddlab.runtime import Seed, chosen_device, generator, tf32
from gddlab.sampling import sample, save_grid

DIT: dict[str, Any] = {
    "conditional": True,
    "model_channels": 96,
    "num_blocks": 6,
    "label_dropout": 0.1,
    "lr": 1e-3,
    "uniform_share": 0.1,
}
"""Defaults of a transformer that differ from those of a U-Net."""
OF_NETWORK = {"unet": ("channel_mult", "attn_resolutions", "dropout"), "dit": ("prediction", "patch_size", "num_heads")}
"""Fields that only one kind of network has."""


class TeacherConfig(RunSettings):
    """How a teacher is trained; the defaults are those of the bundled digits teacher (NCSN++, 0.26 M parameters).

    With network="dit" they are those of the bundled digits-dit (transformer, 1.06 M parameters): classes, of which a
    tenth is dropped, width 96, 6 blocks, learning rate 0.001, a tenth of the noise levels log-uniform. Files that ship
    are rounded (`half`).
    """

    places: ClassVar[tuple[str, ...]] = ("data",)
    made: ClassVar[str] = "teacher"

    run_dir: RunDir
    """Folder of log, checkpoint, samples and the finished teacher."""
    data: DataName = "digits:train"
    """Dataset by name or path."""
    network: Literal["unet", "dit"] = "unet"
    """EDM's U-Net, NCSN++, with EDM's loss; or the transformer DiT, with the loss of its prediction."""
    prediction: Literal["flow", "epsilon"] = "flow"
    """Of a transformer: noise - image, along straight lines; or the noise, on DDPM's path."""
    conditional: bool = False
    """Whether the network sees class labels."""
    label_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability that an image loses its label, so that the network learns to do without."""
    model_channels: int = Field(default=16, ge=4)
    """Base width of the U-Net; width of the transformer."""
    channel_mult: tuple[PositiveInt, ...] = Field(default=(1, 2), min_length=1)
    """Of a U-Net: width of each level, as a multiple of the base."""
    num_blocks: int = Field(default=2, ge=1)
    """Residual blocks per level of a U-Net; blocks of a transformer."""
    attn_resolutions: tuple[int, ...] = (8,)
    """Of a U-Net: resolutions with self-attention."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Of a U-Net: dropout probability."""
    patch_size: PositiveInt = 2
    """Of a transformer: side of the squares of pixels that become tokens."""
    num_heads: PositiveInt = 3
    """Of a transformer: attention heads of each block."""
    total_kimg: float = Field(default=160, gt=0)
    """Length, thousands of images."""
    batch: int = Field(default=64, ge=1)
    """Images per step."""
    lr: float = Field(default=2e-3, gt=0)
    """Adam's learning rate after warm-up."""
    lr_rampup_kimg: float = Field(default=2, ge=0)
    """Linear warm-up, thousands of images."""
    lr_rampdown: float = Field(default=0.5, ge=0, le=1)
    """Share of the training, at its end, over which the learning rate falls linearly to 0."""
    ema_halflife_kimg: float = Field(default=8, ge=0)
    """Half-life of the parameter average, thousands of images."""
    ema_rampup: float | None = Field(default=0.05, gt=0)
    """Bound of the half-life, as a share of the images seen."""
    p_mean: float = -1.2
    """Mean of ln sigma."""
    p_std: float = Field(default=1.2, gt=0)
    """Standard deviation of ln sigma."""
    uniform_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the noise levels that are drawn log-uniform within `uniform_sigmas`, and not log-normal."""
    uniform_sigmas: tuple[float, float] = (5.0, SIGMA_MAX)
    """Lowest and highest of these noise levels."""
    seed: Seed = 0
    """Seed of initialisation, order, noise."""
    tick_kimg: float = Field(default=2, gt=0)
    """Images between two lines of metrics.jsonl and two checkpoints, in thousands."""
    keep_kimg: tuple[float, ...] = ()
    """Images, in thousands, after which the average is also kept, as snapshots/KIMG.safetensors."""
    half: bool = False
    """Rounds the weights that are written, of the teacher and of `keep_kimg`, to float16: files of half the size."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run: auto is CUDA where there is a device, else the CPU."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the network under autocast; parameters and their average stay float32."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, given: Any) -> Any:
        return DIT | given if isinstance(given, dict) and given.get("network") == "dit" else given

    @model_validator(mode="after")
    def _fields_of_the_network(self) -> TeacherConfig:
        for network, names in OF_NETWORK.items():
            for name in names:
                value = getattr(self, name)
                if network != self.network and value != type(self).model_fields[name].default:
                    raise GddlabError(f"{name}={value!r} is of network={network!r}: omit it")
        if self.label_dropout and not self.conditional:
            raise GddlabError(f"label_dropout={self.label_dropout:g} without labels: give conditional=True")
        return self

    @model_validator(mode="after")
    def _kept_in_the_run(self) -> TeacherConfig:
        for kimg in self.keep_kimg:
            if not 0 < kimg * 1000 / self.batch <= self.steps or round(kimg * 1000 / self.batch) < 1:
                raise GddlabError(f"keep_kimg has {kimg:g}: give some above 0, at most total_kimg={self.total_kimg:g}")
        return self

    @property
    def steps(self) -> int:
        return -(-round(self.total_kimg * 1000) // self.batch)

    @field_validator("uniform_sigmas")
    @classmethod
    def _ascending(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] < value[1] < math.inf:
            raise ValueError("give the lowest and the highest noise level, both above 0, such as (5, 80)")
        return value


@validated
def train_teacher(config: TeacherConfig, *, progress: bool = True) -> Path:
    """Trains a teacher; the same call continues a run that was stopped.

    Ctrl-C ends it after the present step with a checkpoint; after anything else it continues from the last tick.

    Args:
        config: Everything that determines the result.
        progress: Shows a bar when at a terminal.

    Returns:
        Path of the finished `teacher.safetensors` in the run directory.

    Raises:
        GddlabError: The run directory holds a run of another configuration, or began with other images.
        KeyboardInterrupt: After Ctrl-C; it says from where the same call continues.
    """
    run, device = config.run_dir, chosen_device(config.device)
    data = open_dataset(config.data)
    if config.conditional and not data.classes:
        raise GddlabError(f"conditional=True, but {data.name} has no classes: use conditional=False")
    net = _network(config, data).to(device).train()  # first: it may be refused
    config.check_images(data.manifest.sha256)
    config.write()
    done = run / "teacher.safetensors"
    if done.exists():
        return done
    lock = take(run)
    try:
        return _trained(config, net, data, progress=progress)
    finally:
        os.close(lock)


def _trained(config: TeacherConfig, net: Precond, data: ImageDataset, *, progress: bool) -> Path:
    run, device, done = config.run_dir, next(net.parameters()).device, config.run_dir / "teacher.safetensors"
    if not (run / "checkpoint.pt").exists():
        about = {"versions": versions(), "commit": commit(), "dataset_sha256": data.manifest.sha256}
        write_json(run / "provenance.json", about)

    ema = copy.deepcopy(net).eval().requires_grad_(False)
    average = Average(ema, net)
    optimizer = torch.optim.Adam(net.parameters(), lr=config.lr, betas=(0.9, 0.999), eps=1e-8)
    reader = BatchReader(data, batch=config.batch, seed=config.seed)
    step, seconds = 0, 0.0
    losses: list[Tensor] = []
    saved: dict[str, Any] = {"net": net, "ema": ema, "optimizer": optimizer, "data": reader}
    if (run / "checkpoint.pt").exists():
        state = torch.load(run / "checkpoint.pt", weights_only=True, map_location="cpu")
        for name, part in saved.items():
            part.load_state_dict(state[name])
        step, seconds = state["step"], state["seconds"]
        losses = [torch.tensor(loss, device=device) for loss in state.get("losses", ())]
    lines = [m for m in read_jsonl(run / "metrics.jsonl") if m["kimg"] * 1000 <= step * config.batch + 0.5]

    total = config.steps
    kept = {round(kimg * 1000 / config.batch): f"{kimg:g}" for kimg in config.keep_kimg}
    tick = max(1, round(config.tick_kimg * 1000 / config.batch))
    began = time.perf_counter()
    bar = progress_bar(total=total * config.batch, desc="teacher", unit="img", enabled=progress)
    bar.update(step * config.batch)

    def save(spent: float) -> None:
        parts = {name: part.state_dict() for name, part in saved.items()}
        more = {"step": step, "seconds": spent, "losses": [loss.item() for loss in losses]}
        with atomic_path(run / "checkpoint.pt") as tmp:
            torch.save(parts | more, tmp)

    def keep(path: Path) -> None:
        rounded = copy.deepcopy(ema)
        if config.half:
            for tensor in rounded.state_dict().values():
                tensor.copy_(tensor.half())
        save_network(
            rounded,
            path,
            half=config.half,
            name=run.name,
            data=config.data,
            manifest=data.manifest.to_dict(),
            sigma_min=max(SIGMA_MIN, ema.sigma_min),
            sigma_max=min(SIGMA_MAX, ema.sigma_max),
            training=config.to_json(),
            kimg=step * config.batch / 1000,
            versions=versions(),
            weights_sha256=hash_tensors(dict(rounded.state_dict())),
        )

    # without autocast's cache of low-precision weights: it lasts as long as the context, here for all steps
    low = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16", cache_enabled=False)
    with bar, low, tf32(False), interruptions() as interrupted:
        while step < total:
            nimg = reader.position
            loss = _loss(config, net, reader, step)
            if not torch.isfinite(loss):
                raise GddlabError(f"loss is {loss.item()} at {nimg} images: lower lr={config.lr} in a new run_dir")
            for group in optimizer.param_groups:
                group["lr"] = config.lr * _lr_factor(config, step / total, nimg)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
            average.update(ema_beta(config.batch, config.ema_halflife_kimg, config.ema_rampup, step * config.batch))
            losses.append(loss.detach())
            if step in kept:
                keep(run / "snapshots" / f"{kept[step]}.safetensors")
            bar.update(config.batch)
            spent = seconds + time.perf_counter() - began
            if step % tick == 0 or step == total:
                mean = torch.stack(losses).mean().item()
                lines.append({"kimg": step * config.batch / 1000, "loss": mean, "seconds": round(spent, 1)})
                losses.clear()
                save(spent)
                write_text(run / "metrics.jsonl", "".join(json.dumps(m, allow_nan=False) + "\n" for m in lines))
            if interrupted():
                save(spent)
                raise KeyboardInterrupt(f"{run}: the same call continues from {step * config.batch / 1000:g} kimg")
    save_grid(sample(ema, 100, seed=0), run / "samples.png", columns=10)
    keep(done)
    return done


@contextlib.contextmanager
def interruptions() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is only noted, for a step to end; a second one interrupts at once.

    Where Ctrl-C does something else, as in a thread or a job in the background, that stays.
    """
    noted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ours = usual and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _network(config: TeacherConfig, data: ImageDataset) -> Precond:
    torch.manual_seed(config.seed)
    sizes = {"model_channels", "num_blocks"} | ({"label_dropout"} if config.label_dropout else set())
    common = {
        "img_resolution": data.resolution,
        "img_channels": data.channels,
        "label_dim": data.classes if config.conditional else 0,
    }
    if config.network == "dit":
        kind = "flow" if config.prediction == "flow" else "dit"
        sizes |= {"patch_size", "num_heads"}
        return from_edm("DiTPrecond", **common, kind=kind, **config.model_dump(mode="json", include=sizes))
    sizes |= {"channel_mult", "attn_resolutions", "dropout"}
    return from_edm("EDMPrecond", **common, **config.model_dump(mode="json", include=sizes), **NCSNPP)


def _loss(config: TeacherConfig, net: Precond, reader: BatchReader, step: int) -> Tensor:
    """The loss of the next batch; what is random in it is a function of seed and step.

    EDM's (Karras et al. 2022, section 5); of a transformer the mean squared error of what it predicts. Noise levels are
    log-normal in both: of a flow that makes the shares of noise logit-normal (Esser et al. 2024, section 3.1).
    """
    g = generator(config.seed, step)
    x, labels = reader.next()
    sigma = (torch.randn(config.batch, generator=g) * config.p_std + config.p_mean).exp()
    if config.uniform_share:
        chosen = torch.rand(config.batch, generator=g) < config.uniform_share
        low, high = map(math.log, config.uniform_sigmas)
        sigma = torch.where(chosen, (low + (high - low) * torch.rand(config.batch, generator=g)).exp(), sigma)
    sigma = sigma.clamp(net.sigma_min, net.sigma_max)
    noise = torch.randn(x.shape, generator=g)
    device = next(net.parameters()).device
    x, labels, sigma, noise = (t.to(device) for t in (x, labels, sigma, noise))
    torch.manual_seed(generator(config.seed, step).initial_seed())  # dropout, of labels too
    denoised = net(x + sigma.reshape(-1, 1, 1, 1) * noise, sigma, labels if config.conditional else None)
    if config.network == "unet":
        return edm_loss(denoised, x, sigma).mean()
    c_out = net.coefficients(sigma.reshape(-1, 1, 1, 1)).c_out
    return ((denoised - x) / c_out).square().mean()


def _lr_factor(config: TeacherConfig, share: float, nimg: int) -> float:
    up = min(1.0, (nimg + config.batch) / (config.lr_rampup_kimg * 1000)) if config.lr_rampup_kimg else 1.0
    down = min(1.0, (1 - share) / config.lr_rampdown) if config.lr_rampdown else 1.0
    return up * down
