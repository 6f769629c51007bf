"""Building blocks of the EDM U-Nets (Karras et al. 2022, appendix F.2; Song et al. 2021; Dhariwal & Nichol 2021)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gddlab.errors import GddlabError


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Full precision inside autocast; does nothing where autocast is off, so that exported graphs do not show it."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm`, in float32 where PyTorch's CPU kernel is slow: bfloat16, small maps, groups below 16 channels."""

    def __init__(self, channels: int, eps: float):
        groups = min(32, channels // 4)
        if not groups or channels % groups:
            raise GddlabError(
                f"{channels} channels in {groups} groups: give model_channels in steps of 4, above 128 of 32"
            )
        super().__init__(groups, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        slow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and self.num_channels < 16 * self.num_groups
        if slow and x.shape[-2] * x.shape[-1] < 1024:
            return super().forward(x.float()).to(x.dtype)
        return super().forward(x)


def xavier_(layer: nn.Linear | nn.Conv2d, gain: float = 1.0) -> None:
    """Song et al.'s initialisation: uniform Xavier weights times `gain`, zero biases."""
    nn.init.xavier_uniform_(layer.weight)
    with torch.no_grad():
        layer.weight.mul_(gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def resample_filter(taps: Sequence[float]) -> Tensor:
    """Separable low-pass filter of unit sum, (1, 1, T, T)."""
    scale = sum(taps) ** 2
    return torch.tensor([[[[a * b / scale for a in taps] for b in taps]]], dtype=torch.float32)


def upsample(x: Tensor, f: Tensor, pad: int) -> Tensor:
    """Doubles the resolution: zero insertion, then `f`.  (B, C, H, W) -> (B, C, 2H, 2W)"""
    if f.shape[-1] == 2 and pad == 0:  # the box filter repeats pixels
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    c = x.shape[1]
    wide = x if x.dtype == torch.float64 else x.float()  # bfloat16 has no fast kernel for this on CPU: 20 times slower
    with autocast_off(x.device):
        y = F.conv_transpose2d(wide, (f * 4).to(wide.dtype).repeat(c, 1, 1, 1), groups=c, stride=2, padding=pad)
    return y.to(x.dtype)


def downsample(x: Tensor, f: Tensor, pad: int) -> Tensor:
    """Halves the resolution: `f`, then every second pixel.  (B, C, H, W) -> (B, C, H/2, W/2)"""
    if f.shape[-1] == 2 and pad == 0:  # the box filter averages
        return F.avg_pool2d(x, 2)
    c = x.shape[1]
    return F.conv2d(x, f.to(x.dtype).repeat(c, 1, 1, 1), groups=c, stride=2, padding=pad)


class Resample(nn.Module):
    """Resampling by two without weights; the filter is a buffer, as in EDM's state dicts."""

    def __init__(self, channels: int, *, up: bool = False, down: bool = False, taps: Sequence[float] = (1, 1)):
        super().__init__()
        assert up != down
        self.in_channels = self.out_channels = channels
        self.up = up
        self.register_buffer("resample_filter", resample_filter(taps))
        self.resample_filter: Tensor
        self.pad = (len(taps) - 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        return (upsample if self.up else downsample)(x, self.resample_filter, self.pad)


class Conv2d(nn.Conv2d):
    """Convolution at equal size, or with resampling by two before it.

    `fused`, for downsampling: the filter comes after the convolution, with merged paddings. Weights, bias and
    `resample_filter` have the reference's names.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        up: bool = False,
        down: bool = False,
        taps: Sequence[float] = (1, 1),
        fused: bool = False,
    ):
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        assert down or not fused
        self.up, self.down, self.fused = up, down, fused
        self.register_buffer("resample_filter", resample_filter(taps) if up or down else None)
        self.resample_filter: Tensor
        self.pad = (len(taps) - 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        if not (self.up or self.down):
            return super().forward(x)
        f, pad = self.resample_filter, self.pad
        if self.fused:
            x = F.conv2d(x, self.weight, None, padding=self.kernel_size[0] // 2 + pad)
            x = downsample(x, f, 0)
            return x if self.bias is None else x + self.bias.to(x.dtype).reshape(1, -1, 1, 1)
        return super().forward((upsample if self.up else downsample)(x, f, pad))


class PositionalEmbedding(nn.Module):
    """Cosines and sines of geometrically spaced frequencies (Vaswani et al. 2017).  (B,) -> (B, C)"""

    def __init__(self, channels: int, *, endpoint: bool = False):
        super().__init__()
        self.channels, self.endpoint = channels, endpoint

    def forward(self, x: Tensor) -> Tensor:
        half = self.channels // 2
        k = torch.arange(half, dtype=x.dtype, device=x.device) / (half - (1 if self.endpoint else 0))
        x = x.outer(10_000**-k)
        return torch.cat([x.cos(), x.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """Cosines and sines of random frequencies (Tancik et al. 2020).  (B,) -> (B, C)"""

    def __init__(self, channels: int):
        super().__init__()
        freqs = torch.empty(channels // 2)
        if not freqs.is_meta:  # drawing there imports torch's compiler, more than a second of every load
            freqs = torch.randn(channels // 2) * 16
        self.register_buffer("freqs", freqs)
        self.freqs: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x = x.outer((2 * math.pi * self.freqs).to(x.dtype))
        return torch.cat([x.cos(), x.sin()], dim=1)


def attend(qkv: Tensor, heads: int, prepare: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Self-attention over pixels; channels are (head, channel, q k v).  (B, 3C, H, W) -> (B, C, H, W)

    `prepare` changes queries, keys and values first, (B, HW, heads, C / heads, 3).
    """
    b, c3, h, w = qkv.shape
    pixels = qkv.permute(0, 2, 3, 1).reshape(b, h * w, heads, c3 // 3 // heads, 3)
    if prepare is not None:
        pixels = prepare(pixels)
    # One copy makes channels adjacent: without it the memory-efficient kernels are refused.
    q, k, v = pixels.permute(4, 0, 2, 1, 3).contiguous()  # (B, heads, HW, C / heads) each
    a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # (B, HW, heads, C / heads)
    return a.reshape(b, h, w, c3 // 3).permute(0, 3, 1, 2)  # channels last, as the products leave it


class UNetBlock(nn.Module):
    """Residual block with optional resampling and self-attention: NCSN++/DDPM++ and ADM in one (EDM, appendix F.2).

    `adaptive_scale` (ADM): the embedding scales and shifts `norm1`; else it is added before it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        channels_per_head: int | None = None,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        taps: Sequence[float] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.num_heads = (out_channels // channels_per_head if channels_per_head else 1) if attention else 0
        self.dropout, self.skip_scale, self.adaptive_scale = dropout, skip_scale, adaptive_scale

        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, up=up, down=down, taps=taps)
        self.affine = nn.Linear(emb_channels, out_channels * (2 if adaptive_scale else 1))
        self.norm1 = GroupNorm(out_channels, eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3)
        self.skip: nn.Module | None = None
        if out_channels != in_channels or ((up or down) and resample_proj):
            self.skip = Conv2d(in_channels, out_channels, 1, up=up, down=down, taps=taps)
        elif up or down:
            self.skip = Resample(in_channels, up=up, down=down, taps=taps)
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, 1)
            self.proj = Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))  # (B, C, H, W)
        p = self.affine(emb)[:, :, None, None].to(h.dtype)
        if self.adaptive_scale:
            scale, shift = p.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h + p))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))).mul_(self.skip_scale)  # the sum is no module's output
        if self.num_heads:
            # x first: the sum takes its memory format
            x = (x + self.proj(attend(self.qkv(self.norm2(x)), self.num_heads))).mul_(self.skip_scale)
        return x
