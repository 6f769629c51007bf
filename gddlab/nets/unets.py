"""SongUNet (DDPM++, NCSN++) and DhariwalUNet (ADM), with EDM's constructor arguments and state-dict names."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gddlab.errors import GddlabError, unknown
from gddlab.nets.blocks import (
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    PositionalEmbedding,
    Resample,
    UNetBlock,
    autocast_off,
    xavier_,
)

TARGET_LAYERS = ("map_target0", "map_target1")
"""The layers that embed a target noise level; a student may have them besides its teacher's."""


class UNet(nn.Module):
    """What all U-Nets share: how their levels are made and run, and the target noise level that a student may take."""

    map_noise: nn.Module
    map_label: nn.Linear | None
    map_augment: nn.Linear | None
    map_layer0: nn.Linear
    map_layer1: nn.Linear
    out_norm: nn.GroupNorm
    out_conv: nn.Conv2d
    attends_in_all_blocks = True
    """Of the decoder, at a resolution with attention; else in the last one only."""
    encoder_type, decoder_type = "standard", "none"
    taps: tuple[float, ...] = (1, 1)

    def __init__(self, in_channels: int, out_channels: int, label_dropout: float):
        super().__init__()
        self.in_channels, self.out_channels, self.label_dropout = in_channels, out_channels, label_dropout
        self.map_target0: nn.Linear | None = None
        self.map_target1: nn.Linear | None = None

    def add_target(self) -> None:
        """Adds two layers after the embedding of a target noise level; the last is zero: the output does not change."""
        cin, cout = self.map_layer0.in_features, self.map_layer0.out_features
        self.map_target0, self.map_target1 = nn.Linear(cin, cout), nn.Linear(cout, cout)
        nn.init.zeros_(self.map_target1.weight)
        nn.init.zeros_(self.map_target1.bias)

    @staticmethod
    def check_taps(taps: Sequence[float]) -> None:
        """Refuses a filter of an odd length."""
        if len(taps) % 2:
            raise GddlabError(f"resample_filter={list(taps)}: give an even number of taps, as [1, 1] or [1, 3, 3, 1]")

    @staticmethod
    def widths(model_channels: int, channel_mult: Sequence[int], img_resolution: int) -> list[int]:
        """Channels of each level; refuses none, and a resolution that cannot be halved so often."""
        widths = [model_channels * mult for mult in channel_mult]
        if not widths or min(widths) < 1:
            raise GddlabError(
                f"channel_mult gives widths {list(widths)}: give at least one, all above 0, such as (1, 2)"
            )
        if img_resolution % (least := 2 ** (len(widths) - 1)):
            raise GddlabError(
                f"{img_resolution} pixels with {len(widths)} levels (channel_mult), each half as large: give a "
                f"multiple of {least}, or fewer levels"
            )
        return widths

    def _add_levels(
        self,
        block: Callable[..., nn.Module],
        stem: Any,
        widths: Sequence[int],
        *,
        decoder_block: Callable[..., nn.Module] | None = None,
        img_resolution: int,
        num_blocks: int,
        attn_resolutions: Sequence[int],
    ) -> None:
        """Makes encoder and decoder, a level per width; `decoder_block` where the decoder's are made another way."""
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        decoder_block = decoder_block or block
        cout, aux = stem.out_channels, self.in_channels
        skips: list[int] = []
        for level, width in enumerate(widths):
            r = img_resolution >> level
            if level == 0:
                self.enc[f"{r}x{r}_conv"] = stem
            else:
                self.enc[f"{r}x{r}_down"] = block(cout, cout, down=True)
            skips.append(cout)
            if level and self.encoder_type == "skip":
                self.enc[f"{r}x{r}_aux_down"] = Resample(aux, down=True, taps=self.taps)
                self.enc[f"{r}x{r}_aux_skip"] = Conv2d(aux, cout, 1)
            if level and self.encoder_type == "residual":
                self.enc[f"{r}x{r}_aux_residual"] = Conv2d(aux, cout, 3, down=True, taps=self.taps, fused=True)
                aux = cout
            for i in range(num_blocks):
                self.enc[f"{r}x{r}_block{i}"] = block(cout, width, attention=r in attn_resolutions)
                cout = width
                skips.append(cout)
        last = len(widths) - 1
        for level, width in reversed(list(enumerate(widths))):
            r = img_resolution >> level
            if level == last:
                self.dec[f"{r}x{r}_in0"] = decoder_block(cout, cout, attention=True)
                self.dec[f"{r}x{r}_in1"] = decoder_block(cout, cout)
            else:
                self.dec[f"{r}x{r}_up"] = decoder_block(cout, cout, up=True)
            for i in range(num_blocks + 1):
                attention = r in attn_resolutions and (self.attends_in_all_blocks or i == num_blocks)
                self.dec[f"{r}x{r}_block{i}"] = decoder_block(cout + skips.pop(), width, attention=attention)
                cout = width
            if self.decoder_type == "skip" or (self.decoder_type == "standard" and level == 0):
                if self.decoder_type == "skip" and level < last:
                    self.dec[f"{r}x{r}_aux_up"] = Resample(self.out_channels, up=True, taps=self.taps)
                self.dec[f"{r}x{r}_aux_norm"] = GroupNorm(cout, 1e-6)
                self.dec[f"{r}x{r}_aux_conv"] = Conv2d(cout, self.out_channels, 3)

    def _waves(self, noise_labels: Tensor) -> Tensor:
        waves: Tensor = self.map_noise(noise_labels)
        return waves

    def embed_target(self, target_labels: Tensor) -> Tensor:
        """What c_noise of the target level adds to the embedding, after `map_layer1`.  (B,) -> (B, width)"""
        assert self.map_target0 is not None and self.map_target1 is not None
        added: Tensor = self.map_target1(F.silu(self.map_target0(self._waves(target_labels))))
        return added

    def _drop_labels(self, labels: Tensor, batch: int) -> Tensor:
        """In training, zeroes the label of each image with probability `label_dropout`.  -> (batch, label_dim)"""
        p = self.label_dropout * self.training
        return labels * (torch.rand(batch, 1, device=labels.device) >= p).to(labels.dtype) if p else labels

    def _embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """Embedding of noise level, class and augmentation, before the last activation."""
        raise AssertionError("a U-Net defines its embedding")

    def forward(
        self,
        x: Float[Tensor, "b cin h w"],
        noise_labels: Float[Tensor, " b"],
        class_labels: Tensor | None = None,
        augment_labels: Float[Tensor, "b k"] | None = None,
        target_labels: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b cout h w"]:
        """F(x; noise level, class, augmentation, target noise level); class labels are (B or 1, label_dim)."""
        with autocast_off(x.device):
            emb = self._embed(noise_labels, class_labels, augment_labels)
            if self.map_target0 is not None and target_labels is not None:
                emb = emb + self.embed_target(target_labels)
            emb = F.silu(emb)
        skips: list[Tensor] = []
        aux = x
        for name, layer in self.enc.items():
            if "aux_down" in name:
                aux = layer(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + layer(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + layer(aux)) * math.sqrt(0.5)
            else:
                x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)
        out: Tensor | None = None
        normed = x
        for name, layer in self.dec.items():
            if "aux_up" in name:
                out = layer(out)
            elif "aux_norm" in name:
                normed = layer(x)
            elif "aux_conv" in name:
                y = layer(F.silu(normed))
                out = y if out is None else out + y
            else:
                if "_block" in name:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = layer(x, emb)
        return self.out_conv(F.silu(self.out_norm(x))) if out is None else out


class SongUNet(UNet):
    """DDPM++ and NCSN++ (Song et al. 2021) as reimplemented by EDM (appendix F.2, table 7).

    Args:
        img_resolution: Height and width, pixels.
        label_dim, augment_dim: Width of the one-hot class labels and of the augmentation labels; 0 for none.
        model_channels: Base width.
        channel_mult, channel_mult_emb, channel_mult_noise: Multiples of it for the levels, the embedding, and the
            noise embedding.
        num_blocks: Residual blocks per level.
        attn_resolutions: Resolutions with self-attention.
        embedding_type: "positional" (DDPM++) or "fourier" (NCSN++).
        encoder_type: "standard", "skip" or "residual" (NCSN++).
        decoder_type: "standard" or "skip".
        resample_filter: Taps: (1, 1) for DDPM++, (1, 3, 3, 1) for NCSN++.
    """

    attends_in_all_blocks = False

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ):
        for kind, value, accepted in (
            ("embedding_type", embedding_type, ("positional", "fourier")),
            ("encoder_type", encoder_type, ("standard", "skip", "residual")),
            ("decoder_type", decoder_type, ("standard", "skip")),
        ):
            if value not in accepted:
                raise unknown(kind, value, accepted)
        self.check_taps(resample_filter)
        super().__init__(in_channels, out_channels, label_dropout)
        self.encoder_type, self.decoder_type, self.taps = encoder_type, decoder_type, tuple(resample_filter)
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        self.map_noise = (
            PositionalEmbedding(noise_channels, endpoint=True)
            if embedding_type == "positional"
            else FourierEmbedding(noise_channels)
        )
        self.map_label = nn.Linear(label_dim, noise_channels) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(noise_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        block = functools.partial(
            UNetBlock,
            emb_channels=emb_channels,
            dropout=dropout,
            skip_scale=math.sqrt(0.5),
            eps=1e-6,
            taps=self.taps,
            resample_proj=True,
            adaptive_scale=False,
        )
        self._add_levels(
            block,
            Conv2d(in_channels, model_channels, 3),
            self.widths(model_channels, channel_mult, img_resolution),
            img_resolution=img_resolution,
            num_blocks=num_blocks,
            attn_resolutions=attn_resolutions,
        )
        for name, m in self.named_modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                leaf = name.rpartition(".")[2]
                zero = leaf in ("conv1", "proj") or leaf.endswith("aux_conv")
                xavier_(m, 1e-5 if zero else math.sqrt(0.2) if leaf == "qkv" else 1.0)

    def _waves(self, noise_labels: Tensor) -> Tensor:
        """Sines before cosines, as the reference has them."""
        return super()._waves(noise_labels).unflatten(1, (2, -1)).flip(1).flatten(1)

    def _embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        emb = self._waves(noise_labels)
        if self.map_label is not None and class_labels is not None:
            labels = self._drop_labels(class_labels, noise_labels.shape[0])
            emb = emb + self.map_label(labels * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        return emb


class DhariwalUNet(UNet):
    """ADM (Dhariwal & Nichol 2021) as reimplemented by EDM (appendix F.2, table 7). Arguments as in SongUNet."""

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
    ):
        super().__init__(in_channels, out_channels, label_dropout)
        widths = self.widths(model_channels, channel_mult, img_resolution)
        emb_channels = model_channels * channel_mult_emb
        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(model_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        self.map_label = nn.Linear(label_dim, emb_channels, bias=False) if label_dim else None
        self._add_levels(
            functools.partial(UNetBlock, emb_channels=emb_channels, channels_per_head=64, dropout=dropout),
            Conv2d(in_channels, widths[0], 3),
            widths,
            img_resolution=img_resolution,
            num_blocks=num_blocks,
            attn_resolutions=attn_resolutions,
        )
        self.out_norm = GroupNorm(widths[0], 1e-5)
        self.out_conv = Conv2d(widths[0], out_channels, 3)
        self._init()

    def _init(self) -> None:
        """PyTorch's defaults (uniform, 1 / sqrt(fan-in)); zeros last in each branch; unit variance for labels."""
        for name, m in self.named_modules():
            if name.rpartition(".")[2] in ("conv1", "proj", "out_conv", "map_augment"):
                assert isinstance(m, (nn.Conv2d, nn.Linear))
                nn.init.zeros_(m.weight)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        if self.map_label is not None and not self.map_label.weight.is_meta:  # see FourierEmbedding
            nn.init.normal_(self.map_label.weight)

    def _embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        emb = self._waves(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and class_labels is not None:
            emb = emb + self.map_label(self._drop_labels(class_labels, noise_labels.shape[0]))
        return emb


UNETS: dict[str, type[SongUNet] | type[DhariwalUNet]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
