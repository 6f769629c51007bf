"""Trained heads of the projected discriminator (Sauer et al. 2021, section 3; widths and depths as in GDD)."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gddlab.distill.distributed import all_reduce_sum

__all__ = ["BatchNorm", "Head", "SNConv2d"]

WIDTHS = {64: 64, 32: 128, 16: 256, 8: 512, 4: 512, 2: 512}
"""Channels of a DownBlock by the nominal resolution it reaches."""


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
        """The weight divided by its largest singular value, as estimated by u and v."""
        w = self.weight_orig.flatten(1)
        if self.training:
            with torch.no_grad():
                v = F.normalize(w.t() @ self.weight_u, dim=0, eps=1e-12)
                u = F.normalize(w @ v, dim=0, eps=1e-12)
                self.weight_u, self.weight_v = u, v  # new tensors: earlier passes keep theirs for their backward
        return self.weight_orig / torch.dot(self.weight_u, w @ self.weight_v)

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
            width = min(WIDTHS[res], max_width)
            blocks.append(DownBlock(channels, width))
            channels = width
        kernel = 4 if end >= 8 else max(1, end // 2)
        self.classes = classes
        if classes:
            self.main = nn.Sequential(*blocks)
            self.cls = SNConv2d(channels, 64, kernel, bias=False)
            self.embed = nn.Embedding(embeddings or classes, 320)
            self.embed_proj = EqualLinear(320, 64)
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
