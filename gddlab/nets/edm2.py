"""EDM2's magnitude-preserving U-Net (Karras et al. 2024, arXiv:2312.02696, configuration G), named as in its files.

Every layer gives outputs of about unit magnitude for inputs of unit magnitude: weights are normalised whenever they are
used, and activations, sums and concatenations are scaled to what random numbers would keep.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gddlab.errors import GddlabError
from gddlab.nets.blocks import attend, autocast_off, downsample, resample_filter, upsample
from gddlab.nets.path import Coefficients, Path
from gddlab.nets.precond import Precond
from gddlab.nets.unets import UNet

EPS = 1e-4
"""Added to a magnitude before dividing by it."""
SILU_MAGNITUDE = 0.596
"""Root mean square of SiLU of standard normal numbers."""


def unit(x: Tensor, dims: int | Sequence[int]) -> Tensor:
    """`x` with root mean square 1 over `dims`; the magnitude is computed in float32 or better."""
    dims = [dims] if isinstance(dims, int) else list(dims)
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=wide)
    rms = norm / math.sqrt(math.prod([x.shape[d] for d in dims]))
    return x / (rms + EPS).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU that keeps magnitudes (equation 81)."""
    return F.silu(x) / SILU_MAGNITUDE


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Mixes `a` and a share `t` of `b` (equation 88)."""
    norm = math.hypot(1 - t, t)
    return a * ((1 - t) / norm) + b * (t / norm)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Concatenates channels; `b` contributes a share `t`, whatever the numbers of channels (equation 103)."""
    n_a, n_b = a.shape[1], b.shape[1]
    scale = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(n_a)), b * (scale * t / math.sqrt(n_b))], dim=1)


def _normal(*shape: int) -> Tensor:
    """Standard normal numbers; none on meta, where drawing imports torch's compiler, more than a second."""
    out = torch.empty(shape)
    return out if out.is_meta else torch.randn(shape)


class MPFourier(nn.Module):
    """Cosines of random frequencies and phases, times sqrt(2) (equation 75).  (B,) -> (B, C)"""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * _normal(channels))
        phases = torch.empty(channels)
        self.register_buffer("phases", phases if phases.is_meta else 2 * math.pi * torch.rand(channels))
        self.freqs: Tensor
        self.phases: Tensor

    def forward(self, x: Tensor) -> Tensor:
        angles = x.outer(self.freqs.to(x.dtype)) + self.phases.to(x.dtype)
        return angles.cos() * math.sqrt(2)


class MPConv(nn.Module):
    """Convolution, or linear layer where `kernel` is 0, without bias: weights of unit magnitude (equation 47).

    In training mode a pass also writes the normalised weights back into the parameter, frozen or not (equation 66).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 0):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight = nn.Parameter(_normal(out_channels, in_channels, *([kernel, kernel] if kernel else [])))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        dims = range(1, self.weight.ndim)
        if self.training:
            with torch.no_grad():
                self.weight.copy_(unit(self.weight, dims))
        w = unit(self.weight, dims) * (gain / math.sqrt(self.weight[0].numel()))
        w = w.to(x.dtype)
        return F.linear(x, w) if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class PixelNorm(nn.Module):
    """Every pixel's channels at root mean square 1; it is a module so that its output can be read."""

    def forward(self, x: Tensor) -> Tensor:
        return unit(x, 1)


class Block(nn.Module):
    """Residual block of encoder or decoder, with optional resampling and self-attention.

    In the encoder the skip path, `conv_skip` where the width changes, ends in `norm`, and the branch starts there; in
    the decoder both start at the block's input.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        encoder: bool,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
        taps: Sequence[float] = (1, 1),
    ):
        super().__init__()
        if attention and out_channels % channels_per_head:
            raise GddlabError(
                f"{out_channels} channels in heads of {channels_per_head}: give model_channels in steps of "
                "channels_per_head"
            )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.up, self.down, self.taps = up, down, tuple(taps)
        self.num_heads = out_channels // channels_per_head if attention else 0
        self.dropout, self.res_balance, self.attn_balance, self.clip_act = dropout, res_balance, attn_balance, clip_act

        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if encoder else in_channels, out_channels, 3)
        self.emb_linear = MPConv(emb_channels, out_channels)
        self.conv_res1 = MPConv(out_channels, out_channels, 3)
        self.conv_skip = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.norm = PixelNorm() if encoder else None
        if self.num_heads:
            self.attn_qkv = MPConv(out_channels, out_channels * 3, 1)
            self.attn_proj = MPConv(out_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self._resampled(x)  # (B, C, H, W)
        if self.norm is not None:
            x = self.norm(self._skip(x))
        h = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb, gain=self.emb_gain) + 1
        h = mp_silu(h * scale[:, :, None, None].to(h.dtype))
        h = self.conv_res1(F.dropout(h, self.dropout, self.training))
        x = mp_sum(x if self.norm is not None else self._skip(x), h, self.res_balance)
        if self.num_heads:
            # queries, keys and values of unit magnitude in each head: cosine attention
            h = attend(self.attn_qkv(x), self.num_heads, prepare=functools.partial(unit, dims=3))
            x = mp_sum(x, self.attn_proj(h), self.attn_balance)
        return x if self.clip_act is None else x.clamp(-self.clip_act, self.clip_act)

    def _skip(self, x: Tensor) -> Tensor:
        return x if self.conv_skip is None else self.conv_skip(x)

    def _resampled(self, x: Tensor) -> Tensor:
        if not (self.up or self.down):
            return x
        f = resample_filter(self.taps)  # made here: a buffer would be in the state dict, or be lost on meta
        if len(self.taps) > 2:  # of the box filter only the size is asked
            f = f.to(x.device)
        return (upsample if self.up else downsample)(x, f, (len(self.taps) - 1) // 2)


class EDM2UNet(UNet):
    """EDM2's U-Net: F(x; noise level, class), with a channel of ones beside the image in place of biases.

    Args:
        img_resolution: Height and width, pixels.
        img_channels: Channels in and out.
        label_dim: Number of classes, width of the one-hot labels; 0 for none.
        model_channels: Base width.
        channel_mult: Multiples of it for the levels.
        channel_mult_noise, channel_mult_emb: ... for the noise embedding and the embedding, None for the first level's
            and the widest level's.
        num_blocks: Residual blocks per level.
        attn_resolutions: Resolutions with self-attention.
        label_balance, concat_balance, res_balance, attn_balance: Shares of the class embedding, of skip connections,
            of a block's branch and of its attention in the sums.
        channels_per_head: Width of an attention head.
        clip_act: Outputs of blocks are clipped to +- this; None to not clip.
        resample_filter: Taps.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        resample_filter: Sequence[float] = (1, 1),
        **block_kwargs: Any,
    ):
        super().__init__(img_channels, img_channels, 0.0)
        self.check_taps(resample_filter)
        widths = self.widths(model_channels, channel_mult, img_resolution)
        noise_channels = widths[0] if channel_mult_noise is None else model_channels * channel_mult_noise
        emb_channels = max(widths) if channel_mult_emb is None else model_channels * channel_mult_emb
        self.label_balance, self.concat_balance = label_balance, concat_balance
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(noise_channels)
        self.emb_noise = MPConv(noise_channels, emb_channels)
        self.emb_label = MPConv(label_dim, emb_channels) if label_dim else None
        block = functools.partial(Block, emb_channels=emb_channels, taps=resample_filter, **block_kwargs)
        self._add_levels(
            functools.partial(block, encoder=True),
            MPConv(img_channels + 1, widths[0], 3),
            widths,
            decoder_block=functools.partial(block, encoder=False),
            img_resolution=img_resolution,
            num_blocks=num_blocks,
            attn_resolutions=attn_resolutions,
        )
        self.out_conv = MPConv(widths[0], img_channels, 3)  # type: ignore[assignment]

    def _embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        emb: Tensor = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None and class_labels is not None:
            label = self.emb_label(class_labels * math.sqrt(self.emb_label.in_channels))
            emb = mp_sum(emb, label, self.label_balance)
        return emb

    def forward(
        self,
        x: Float[Tensor, "b cin h w"],
        noise_labels: Float[Tensor, " b"],
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        target_labels: Tensor | None = None,
    ) -> Float[Tensor, "b cout h w"]:
        """F(x; noise level, class); class labels are (B or 1, label_dim); it knows no augmentation and no target."""
        with autocast_off(x.device):
            emb = mp_silu(self._embed(noise_labels.to(x.dtype), class_labels, None))
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips: list[Tensor] = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            if "_block" in name:
                x = mp_cat(x, skips.pop(), self.concat_balance)
            x = layer(x, emb)
        out: Tensor = self.out_conv(x, gain=self.out_gain)
        return out


class EDM2Precond(Precond):
    """EDM's preconditioning around EDM2's U-Net, `unet`; in its authors' pickles the class is called Precond.

    In training mode a pass rewrites weights, frozen ones too (see `MPConv`): keep it in eval mode except to train it.

    Args:
        img_resolution, img_channels: Shape of an image or latent.
        label_dim: Number of classes; 0 for an unconditional network.
        sigma_data: Standard deviation of the data.
        logvar_channels: Width of the features from which `logvar` is computed.
        unet_kwargs: Arguments of `EDM2UNet`.
    """

    path: Path
    sigma_data: float

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        *,
        sigma_data: float = 0.5,
        logvar_channels: int = 128,
        **unet_kwargs: Any,
    ):
        nn.Module.__init__(self)  # another U-Net, under another name
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.sigma_min, self.sigma_max, self.sigma_data = 0.0, math.inf, sigma_data
        self.path = Path.edm(sigma_data)
        self.unet = EDM2UNet(img_resolution, img_channels, label_dim, **unet_kwargs)
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1)
        self.init_kwargs, self.card = {}, None

    @property
    def model(self) -> EDM2UNet:  # type: ignore[override]
        """The U-Net."""
        return self.unet

    def coefficients(self, sigma: Tensor) -> Coefficients:
        return self.path.coefficients(sigma)

    def logvar(self, sigma: Tensor | float) -> Float[Tensor, "b 1 1 1"]:
        """u(sigma): ln of the weighted denoising loss that the network expects at each noise level.

        It was trained by edm_weight(sigma) |D - y|^2 / exp(u) + u (equation 21).
        """
        weight = self.logvar_linear.weight
        levels = torch.as_tensor(sigma, dtype=weight.dtype, device=weight.device).reshape(-1, 1, 1, 1)
        with autocast_off(weight.device):
            c_noise = self.coefficients(levels).c_noise.to(weight.dtype)
            out: Tensor = self.logvar_linear(self.logvar_fourier(c_noise))
        return out.reshape(-1, 1, 1, 1)
