"""Trained heads of the projected discriminator (Sauer et al. 2021, section 3; widths and depths as in GDD)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gddlab.distill.distributed import all_reduce_sum
from gddlab.distill.embedding import EMBEDDING
from gddlab.nets.layers import autocast_off

__all__ = ["BatchNorm", "Head", "SNConv2d", "logit_sizes", "nominal_resolutions"]


def nominal_resolutions(input_size: int) -> tuple[int, ...]:
    """Resolutions of the four levels by which head depths are chosen, whatever the backbone: 2R/4 to 2R/32, R = 256 for images resized to 224."""
    resolution = 256 if input_size == 224 else input_size
    return tuple(2 * resolution // stride for stride in (4, 8, 16, 32))


def last_resolution(input_size: int) -> int:
    """The nominal resolution at which the heads of all levels end."""
    return min(8, nominal_resolutions(input_size)[-1])


def width(resolution: int) -> int:
    """Channels of a DownBlock by the nominal resolution it reaches: 64 at 64 and above, 128 at 32, 256 at 16, 512 below; between, as at the power of two below."""
    return min(512, max(64, 4096 >> (resolution.bit_length() - 1)))


def last_kernel(end: int) -> int:
    return 4 if end >= 8 else max(1, end // 2)


def logit_sizes(sizes: tuple[int, ...], input_size: int) -> tuple[int, ...]:
    """Sides of the four maps of logits.

    Args:
        sizes: Sides of the backbone's four levels, which the projection doubles.
        input_size: Size to which images are resized.

    Returns:
        One number a level; below 1 where the level is too small for its head.
    """
    end = last_resolution(input_size)
    out = []
    for size, start in zip(sizes, nominal_resolutions(input_size), strict=True):
        side, res = 2 * size, start
        while res > end:
            side, res = side // 2, res // 2
        out.append(side - last_kernel(end) + 1)
    return tuple(out)


class _Normalise(torch.autograd.Function):
    """w / (u' w v) with u and v held, (O, K): autograd's own rule takes three times as many passes over the weight."""

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
    """Convolution with spectral normalisation (Miyato et al. 2018): one power iteration a training-mode pass.

    Parameters and buffers carry PyTorch's names (`weight_orig`, `weight_u`, `weight_v`). Written out since u and v must be
    functions of the pass alone, the same on every rank, and float64 throughout when asked.
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
        """The weight divided by its largest singular value, as estimated by u and v; in full precision under autocast too."""
        p = self.weight_orig
        # As rows in the order of memory, whichever that is: copying them costs more than the rest.
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
                    # New tensors: earlier passes keep theirs for their backward.
                    kept = v.view(*shape[1:], shape[0]).permute(2, 0, 1).flatten() if last else v
                    self.weight_u, self.weight_v = u, kept
            y: Tensor = _Normalise.apply(w, u, v)
        return y.view(-1, *shape[1:], shape[0]).permute(0, 3, 1, 2) if last else y.view_as(p)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight(), self.bias, self.stride, self.padding)


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm over this process's images, or with `sync` over those of all ranks, twice differentiable (R1 needs it)."""

    sync = False

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.sync and dist.is_initialized()):
            return super().forward(x)
        n = x.numel() // x.shape[1] * dist.get_world_size()
        mean = all_reduce_sum(x.sum((0, 2, 3))) / n
        centred = x - mean[:, None, None]
        var = all_reduce_sum(centred.square().sum((0, 2, 3))) / n
        with torch.no_grad():
            assert (
                self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
            )
            assert self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (n / (n - 1)), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]


class DownBlock(nn.Module):
    """Spectral-norm convolution 4x4 stride 2, BatchNorm, LeakyReLU 0.2."""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.main = nn.Sequential(
            SNConv2d(cin, cout, 4, stride=2, padding=1), BatchNorm(cout), nn.LeakyReLU(0.2, inplace=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.main(x)
        return out


class EqualLinear(nn.Module):
    """Equalised linear layer: weight / sqrt(fan-in), bias, leaky ReLU 0.2, gain sqrt 2 (StyleGAN2).  (B, in) -> (B, out)"""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cout, cin))
        self.bias = nn.Parameter(torch.zeros(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight / math.sqrt(self.weight.shape[1]), self.bias)
        return F.leaky_relu(y, 0.2) * math.sqrt(2)


class Head(nn.Module):
    """Discriminator of one feature level: DownBlocks from `start` to `end` nominal pixels, then a convolution to logits.

    Args:
        channels: Of the feature map.
        start, end: Nominal resolutions.
        classes: Number of classes; with classes, logits are inner products with a projected class embedding (Miyato & Koyama 2018).
        max_width: Bound of the widths.
        embeddings: Rows of the class embedding (at least `classes`).
    """

    def __init__(
        self, channels: int, start: int, end: int, *, classes: int = 0, max_width: int = 512, embeddings: int = 0
    ):
        super().__init__()
        blocks: list[nn.Module] = []
        res = start
        while res > end:
            res //= 2
            cout = min(width(res), max_width)
            blocks.append(DownBlock(channels, cout))
            channels = cout
        kernel = last_kernel(end)
        self.classes = classes
        if classes:
            self.main = nn.Sequential(*blocks)
            self.cls = SNConv2d(channels, 64, kernel, bias=False)
            self.embed = nn.Embedding(embeddings or classes, EMBEDDING)
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
