"""The CIFAR-10 GDD-I iteration twice: the plainest correct float32 loop, and the trainer's; what it costs in work.

Random weights of teacher, VGG16 and images (times do not depend on them); `train_step.py` and `gpu.py` time both.
"""

from __future__ import annotations

import collections
import copy
import functools
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode

from gddlab.datasets import ImageDataset
from gddlab.diagnosis.scaling import Counter
from gddlab.distill.config import TrainConfig
from gddlab.distill.distributed import CPU, World
from gddlab.distill.presets import cifar10
from gddlab.distill.projected import Projected, ProjectedDiscriminator
from gddlab.distill.trainer import Trainer
from gddlab.ema import ema_beta
from gddlab.freezing import select_freeze
from gddlab.nets import Precond, build
from gddlab.nets.io import make_student

Batch = tuple[Tensor, Tensor, Tensor]
"""Real images in [-1, 1] and the latents of both steps, each (B, 3, 32, 32)."""
CLONE = Path(__file__).resolve().parents[2]
BOTH = ("vgg16_bn", "tf_efficientnet_lite0")
WEIGHT, GAMMA, LR = 64, 1e-4, 1e-4


@dataclass(frozen=True)
class Setting:
    """What is trained, and where; the published sizes unless others are given.

    Attributes:
        batch: Images of an iteration.
        student: What differs from the published architecture of student and teacher, names and values.
        backbones: Of the discriminator.
        input_size, head_width: Pixels of the backbones, and the most channels of the heads.
        interval: Iterations between two R1 steps.
        images: Number of real images.
        device: Where it runs.
    """

    batch: int = 8
    student: tuple[tuple[str, int], ...] = ()
    backbones: tuple[str, ...] = BOTH
    input_size: int = 224
    head_width: int = 512
    interval: int = 16
    images: int = 512
    device: torch.device = CPU

    def part(self) -> dict[str, Any]:
        """Fields of the discriminator."""
        weights = {name: "random" for name in self.backbones if name == "vgg16_bn"}
        sizes = {"input_size": self.input_size, "head_width": self.head_width}
        return {"backbones": self.backbones, "weights": weights} | sizes


@functools.lru_cache(maxsize=1)
def teacher_of(student: tuple[tuple[str, int], ...]) -> Precond:
    torch.manual_seed(0)
    return build("ncsnpp-cifar10", **dict(student)).eval()


@functools.lru_cache(maxsize=1)
def data_of(n: int) -> ImageDataset:
    images = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    return ImageDataset(images, None, classes=0, name="random", source="numpy, seed 0")


def config_of(setting: Setting, **fields: Any) -> TrainConfig:
    """The preset with these fields in place of its own."""
    given = {"batch": setting.batch, "r1_interval": setting.interval, "r1_gamma": GAMMA, "lr_g": LR, "lr_d": LR}
    mask = select_freeze(teacher_of(setting.student), strategy="gdd-i")
    given |= {"adversarial_weight": WEIGHT, "discriminator": setting.part(), "device": setting.device.type}
    return cifar10(run_dir="unused", mask=mask, **(given | fields))


class PlainDiscriminator(nn.Module):
    """Written from the papers, nothing saved: BatchNorm unfolded, projection last, torch's spectral norm."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        ours = ProjectedDiscriminator(Projected(**setting.part()), fold=False).to(setting.device)
        self.frozen = [(n, b.net.eval(), ours.projections[n]) for n, b in ours.backbones.items()]
        self.size, most = setting.input_size, setting.head_width
        largest = 128 if self.size == 224 else self.size // 2
        starts = [largest, largest // 2, largest // 4, largest // 8]
        end = min(8, starts[-1])
        self.heads = nn.ModuleList(
            nn.ModuleList(self.head(c, s, end, most) for c, s in zip((64, 64, 128, 256), starts, strict=True))
            for _ in self.frozen
        ).to(setting.device)
        state = {k: v for k, v in ours.state_dict().items() if k.startswith("discriminators.")}
        own = self.heads.state_dict()
        assert [v.shape for v in own.values()] == [v.shape for v in state.values()]
        self.heads.load_state_dict(dict(zip(own, state.values(), strict=True)))
        self.train()

    @staticmethod
    def head(channels: int, res: int, end: int, most: int) -> nn.Sequential:
        widths = {64: 64, 32: 128, 16: 256, 8: 512, 4: 512, 2: 512}
        widths = {k: min(v, most) for k, v in widths.items()}
        layers: list[nn.Module] = []
        while res > end:
            res //= 2
            conv = spectral_norm(nn.Conv2d(channels, widths[res], 4, stride=2, padding=1))
            layers += [conv, nn.BatchNorm2d(widths[res]), nn.LeakyReLU(0.2)]
            channels = widths[res]
        return nn.Sequential(*layers, spectral_norm(nn.Conv2d(channels, 1, max(1, end // 2), bias=False)))

    def forward(self, images: Tensor) -> list[Tensor]:
        logits = []
        for (name, net, projection), heads in zip(self.frozen, self.heads, strict=True):
            vgg = name == "vgg16_bn"
            mean = torch.tensor([0.485, 0.456, 0.406] if vgg else [0.5] * 3, device=images.device)[:, None, None]
            std = torch.tensor([0.229, 0.224, 0.225] if vgg else [0.5] * 3, device=images.device)[:, None, None]
            x = ((images + 1) / 2 - mean) / std
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False)
            maps = []
            if vgg:
                for i, layer in enumerate(net):
                    x = layer(x)
                    if i in (12, 22, 32, 42):
                        maps.append(x)
            else:
                maps = net.forward_intermediates(x, intermediates_only=True)[-4:]
            above: Tensor | None = None
            mixed: list[Tensor] = []
            for i in (3, 2, 1, 0):
                h = projection.get_submodule(f"layer{i}_ccm")(maps[i])
                h = h if above is None else h + above
                h = F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=True)
                above = projection.get_submodule(f"layer{i}_csm.out_conv")(h)
                mixed.insert(0, above)
            logits.append(torch.cat([head(m).flatten(1) for head, m in zip(heads, mixed, strict=True)], 1))
        return logits


class Plain:
    """The plainest correct loop: everything afresh, one parameter after the other."""

    def __init__(self, setting: Setting):
        teacher, config = teacher_of(setting.student), config_of(setting)
        self.setting, self.number, self.nimg = setting, 0, 0
        self.g = make_student(teacher).eval().to(setting.device)
        assert config.mask is not None
        config.mask.apply(self.g)
        torch.manual_seed(config.seed)  # as build_step does before it makes its discriminator
        self.d = PlainDiscriminator(setting)
        self.ema = copy.deepcopy(self.g)
        self.g_params = [p for p in self.g.parameters() if p.requires_grad]
        self.d_params = list(self.d.parameters())
        c = setting.interval / (setting.interval + 1)
        self.opt_g = torch.optim.Adam(self.g_params, lr=LR, betas=(0.0, 0.99), eps=1e-8)
        self.opt_d = torch.optim.Adam(self.d_params, lr=LR * c, betas=(0.0, 0.99**c), eps=1e-8)

    def update(self, opt: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
        for p in params:
            if p.grad is not None:
                p.grad = torch.nan_to_num(p.grad, nan=0.0, posinf=1e5, neginf=-1e5)
        opt.step()

    def iteration(self, batch: Batch) -> dict[str, Tensor]:
        real, z_g, z_d = batch
        self.d.requires_grad_(False)
        self.opt_g.zero_grad()
        loss_g = torch.stack([F.softplus(-x).mean() for x in self.d(self.g.generate(z_g))]).sum()
        (WEIGHT * loss_g).backward()
        self.update(self.opt_g, self.g_params)
        self.d.requires_grad_(True)
        self.opt_d.zero_grad()
        with torch.no_grad():
            fake = self.g.generate(z_d)
        loss_fake = torch.stack([F.softplus(x).mean() for x in self.d(fake)]).sum()
        (WEIGHT * loss_fake).backward()
        loss_real = torch.stack([F.softplus(-x).mean() for x in self.d(real)]).sum()
        (WEIGHT * loss_real).backward()
        self.update(self.opt_d, self.d_params)
        self.nimg += len(real)
        beta = ema_beta(len(real), 500, 0.05, self.nimg)
        with torch.no_grad():
            for a, b in zip(self.ema.parameters(), self.g.parameters(), strict=True):
                a.copy_(b.lerp(a, beta))
        self.number += 1
        return {"loss/g": loss_g.detach(), "loss/d": (loss_fake + loss_real).detach()}

    def r1(self, images: Tensor) -> dict[str, Tensor]:
        x = images.clone().requires_grad_(True)
        self.opt_d.zero_grad()
        (grad,) = torch.autograd.grad(torch.stack([y.sum() for y in self.d(x)]).sum(), x, create_graph=True)
        penalty = grad.square().sum((1, 2, 3)).mean()
        (GAMMA / 2 * self.setting.interval * penalty).backward()
        self.update(self.opt_d, self.d_params)
        return {"r1": penalty.detach()}

    def upcoming(self) -> Batch:
        """Images in their order, and new noise."""
        n, size, where = self.setting.batch, self.setting.images, self.setting.device
        real = data_of(size).images([i % size for i in range(self.nimg, self.nimg + n)]).to(where)
        return real, torch.randn(n, 3, 32, 32, device=where), torch.randn(n, 3, 32, 32, device=where)

    def iterate(self) -> None:
        """The next iteration, with R1 in every `interval`-th but the first."""
        due = self.number % self.setting.interval == 0 and self.number > 0
        batch = self.upcoming()
        self.iteration(batch)
        if due:
            self.r1(batch[0])


class Ours:
    """The trainer of the preset, with fields of its configuration."""

    def __init__(self, setting: Setting, **fields: Any):
        self.setting = setting
        given = teacher_of(setting.student), data_of(setting.images)
        self.trainer = Trainer(config_of(setting, **fields), World(0, 1, setting.device), given=given)
        self.g_params, self.d_params = self.trainer.step.g_params, self.trainer.step.d_params

    @property
    def number(self) -> int:
        """Of the next iteration, from 0."""
        return self.trainer.iteration

    @number.setter
    def number(self, value: int) -> None:
        self.trainer.iteration = value

    def upcoming(self) -> Batch:
        """What the next iteration will see."""
        t = self.trainer
        z_g, z_d = (t.drawer.latents(t.iteration, stream) for stream in (0, 1))
        real, z_g, z_d = map(t.drawer.place, (t.data.images(t.reader.indices()), z_g, z_d))
        return real, z_g, z_d

    def iterate(self) -> None:
        self.trainer.iterate()

    def r1(self, images: Tensor) -> dict[str, Tensor]:
        return self.trainer.step.r1_step(images, None)

    def losses(self) -> dict[str, float]:
        """Means of losses and logits since this was asked last."""
        line = self.trainer.tick()
        return {k: v for k, v in line.items() if k.startswith(("loss/", "logits/", "nonfinite/")) or k == "r1"}


Loop = Plain | Ours


def check(plain: Plain, ours: Ours) -> dict[str, float]:
    """An iteration and an R1 step of both, new, in float32: relative differences of losses, R1 and norms of gradients.

    Raises:
        AssertionError: They differ by more than rounding.
    """
    out: dict[str, float] = {}

    def compare(step: str, a: dict[str, Any], b: dict[str, Any], most: float) -> None:
        out.update({k: abs(float(a[k]) / float(b[k]) - 1) for k in a})
        for net in ("g_params", "d_params"):
            norms = [
                torch.stack([p.grad.norm() for p in getattr(x, net) if p.grad is not None]).norm().item()
                for x in (plain, ours)
            ]
            out[f"gradient of {net[0]} after {step}"] = abs(norms[0] / norms[1] - 1)
        assert all(v < most for v in out.values()), out

    batch = ours.upcoming()
    ours.iterate()
    compare("iteration", plain.iteration(batch), ours.losses(), 1e-3)
    # Adam's first step is all but a sign: it makes rounding visible in what follows it.
    compare("r1", plain.r1(batch[0]), ours.r1(batch[0]), 1e-2)
    return out


def work(run: Callable[[], object]) -> tuple[float, int]:
    """GFLOP of convolutions and matrix products, and kernels started; spoils the loop, whose results become zeros."""
    with Counter() as counter:
        run()
    return counter.flops / 1e9, counter.kernels


# What a card would wait for.


def place(file: str, line: int | None) -> str | None:
    """FILE:LINE of what is in the clone."""
    path = Path(file)
    return f"{path.relative_to(CLONE)}:{line}" if path.is_relative_to(CLONE) else None


WAITS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique", "unique_", "is_nonzero")
"""Operations for whose result Python, or the size of a tensor, waits."""


class Waits(TorchDispatchMode):
    """Counts, on a CPU, operations that would wait for a card, by the line that asks for them.

    Args:
        more: Other operations that count.
    """

    def __init__(self, *more: str) -> None:
        super().__init__()
        self.names = *WAITS, *more
        self.seen: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        masked = name.startswith("index.") and any(x is not None and x.dtype == torch.bool for x in args[1])
        if masked or name.startswith(self.names):
            frames = traceback.extract_stack()[:-1]
            at = (p for f in reversed(frames) if (p := place(f.filename, f.lineno)) and "benchmarks/" not in p)
            self.seen[next(at, name)] += 1
        return func(*args, **(kwargs or {}))
