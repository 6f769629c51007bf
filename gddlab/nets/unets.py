"""SongUNet (DDPM++, NCSN++) and DhariwalUNet (ADM), with EDM's constructor arguments and state-dict names."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gddlab.errors import GddlabError, unknown
from gddlab.nets.layers import (
    Conv2d,
    FourierEmbedding,
    PositionalEmbedding,
    Resample,
    UNetBlock,
    autocast_off,
    group_norm,
    xavier_,
)


def _drop_labels(labels: Tensor, p: float, batch: int) -> Tensor:
    """Zeroes the label of each image with probability `p`.  (B or 1, label_dim) -> (B, label_dim)"""
    return labels * (torch.rand(batch, 1, device=labels.device) >= p).to(labels.dtype) if p else labels


TARGET_LAYERS = ("map_target0", "map_target1")
"""The layers that embed a target noise level; a student may have them besides its teacher's."""


class UNet(nn.Module):
    """The part that both U-Nets share: the embedding of a second, target noise level, which a student may have."""

    map_layer0: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        self.map_target0: nn.Linear | None = None
        self.map_target1: nn.Linear | None = None

    def add_target(self) -> None:
        """Adds two layers after the embedding of a target noise level; the last is zero: the output does not change."""
        cin, cout = self.map_layer0.in_features, self.map_layer0.out_features
        self.map_target0, self.map_target1 = nn.Linear(cin, cout), nn.Linear(cout, cout)
        nn.init.zeros_(self.map_target1.weight)
        nn.init.zeros_(self.map_target1.bias)


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
        if embedding_type not in ("positional", "fourier"):
            raise unknown("embedding_type", embedding_type, ("positional", "fourier"))
        if encoder_type not in ("standard", "skip", "residual"):
            raise unknown("encoder_type", encoder_type, ("standard", "skip", "residual"))
        if decoder_type not in ("standard", "skip"):
            raise unknown("decoder_type", decoder_type, ("standard", "skip"))
        if len(resample_filter) % 2:
            raise GddlabError(
                f"resample_filter={list(resample_filter)}: give an even number of taps, as [1, 1] or [1, 3, 3, 1]"
            )
        super().__init__()
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        taps = tuple(resample_filter)

        def block(cin: int, cout: int, *, up: bool = False, down: bool = False, attention: bool = False) -> UNetBlock:
            return UNetBlock(
                cin,
                cout,
                emb_channels,
                up=up,
                down=down,
                attention=attention,
                dropout=dropout,
                skip_scale=math.sqrt(0.5),
                eps=1e-6,
                taps=taps,
                resample_proj=True,
                adaptive_scale=False,
            )

        self.map_noise: nn.Module = (
            PositionalEmbedding(noise_channels, endpoint=True)
            if embedding_type == "positional"
            else FourierEmbedding(noise_channels)
        )
        self.map_label = nn.Linear(label_dim, noise_channels) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(noise_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)

        self.enc = nn.ModuleDict()
        cout = caux = in_channels
        skips: list[int] = []
        for level, mult in enumerate(channel_mult):
            res = f"{img_resolution >> level}x{img_resolution >> level}"
            if level == 0:
                self.enc[f"{res}_conv"] = Conv2d(cout, model_channels, 3)
                cout = model_channels
                skips.append(cout)
            else:
                self.enc[f"{res}_down"] = block(cout, cout, down=True)
                skips.append(cout)
                if encoder_type == "skip":
                    self.enc[f"{res}_aux_down"] = Resample(caux, down=True, taps=taps)
                    self.enc[f"{res}_aux_skip"] = Conv2d(caux, cout, 1)
                if encoder_type == "residual":
                    self.enc[f"{res}_aux_residual"] = Conv2d(caux, cout, 3, down=True, taps=taps, fused=True)
                    caux = cout
            for i in range(num_blocks):
                attention = img_resolution >> level in attn_resolutions
                self.enc[f"{res}_block{i}"] = block(cout, model_channels * mult, attention=attention)
                cout = model_channels * mult
                skips.append(cout)

        self.dec = nn.ModuleDict()
        last = len(channel_mult) - 1
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = f"{img_resolution >> level}x{img_resolution >> level}"
            if level == last:
                self.dec[f"{res}_in0"] = block(cout, cout, attention=True)
                self.dec[f"{res}_in1"] = block(cout, cout)
            else:
                self.dec[f"{res}_up"] = block(cout, cout, up=True)
            for i in range(num_blocks + 1):
                attention = i == num_blocks and img_resolution >> level in attn_resolutions
                self.dec[f"{res}_block{i}"] = block(cout + skips.pop(), model_channels * mult, attention=attention)
                cout = model_channels * mult
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and level < last:
                    self.dec[f"{res}_aux_up"] = Resample(out_channels, up=True, taps=taps)
                self.dec[f"{res}_aux_norm"] = group_norm(cout, 1e-6)
                self.dec[f"{res}_aux_conv"] = Conv2d(cout, out_channels, 3)
        self._init()

    def _init(self) -> None:
        for name, m in self.named_modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                leaf = name.rpartition(".")[2]
                zero = leaf in ("conv1", "proj") or leaf.endswith("aux_conv")
                xavier_(m, 1e-5 if zero else math.sqrt(0.2) if leaf == "qkv" else 1.0)

    def embed(
        self,
        noise_labels: Tensor,
        class_labels: Tensor | None,
        augment_labels: Tensor | None,
        target_labels: Tensor | None = None,
    ) -> Tensor:
        """Embedding of noise level, class, augmentation, and target noise level."""
        emb = self._sines_first(noise_labels)
        if self.map_label is not None and class_labels is not None:
            labels = _drop_labels(class_labels, self.label_dropout * self.training, noise_labels.shape[0])
            emb = emb + self.map_label(labels * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_target0 is not None and self.map_target1 is not None and target_labels is not None:
            emb = emb + self.map_target1(F.silu(self.map_target0(self._sines_first(target_labels))))
        return F.silu(emb)

    def _sines_first(self, noise_labels: Tensor) -> Tensor:
        """`map_noise` in the order of the reference."""
        emb: Tensor = self.map_noise(noise_labels)
        return emb.unflatten(1, (2, -1)).flip(1).flatten(1)

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
            emb = self.embed(noise_labels, class_labels, augment_labels, target_labels)
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
        assert out is not None
        return out


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
        super().__init__()
        self.label_dropout = label_dropout
        emb_channels = model_channels * channel_mult_emb

        def block(cin: int, cout: int, *, up: bool = False, down: bool = False, attention: bool = False) -> UNetBlock:
            return UNetBlock(
                cin, cout, emb_channels, up=up, down=down, attention=attention, channels_per_head=64, dropout=dropout
            )

        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(model_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        self.map_label = nn.Linear(label_dim, emb_channels, bias=False) if label_dim else None

        self.enc = nn.ModuleDict()
        cout = model_channels * channel_mult[0]
        skips: list[int] = []
        for level, mult in enumerate(channel_mult):
            r = img_resolution >> level
            if level == 0:
                self.enc[f"{r}x{r}_conv"] = Conv2d(in_channels, cout, 3)
            else:
                self.enc[f"{r}x{r}_down"] = block(cout, cout, down=True)
            skips.append(cout)
            for i in range(num_blocks):
                self.enc[f"{r}x{r}_block{i}"] = block(cout, model_channels * mult, attention=r in attn_resolutions)
                cout = model_channels * mult
                skips.append(cout)

        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            r = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{r}x{r}_in0"] = block(cout, cout, attention=True)
                self.dec[f"{r}x{r}_in1"] = block(cout, cout)
            else:
                self.dec[f"{r}x{r}_up"] = block(cout, cout, up=True)
            for i in range(num_blocks + 1):
                cin = cout + skips.pop()
                self.dec[f"{r}x{r}_block{i}"] = block(cin, model_channels * mult, attention=r in attn_resolutions)
                cout = model_channels * mult
        self.out_norm = group_norm(cout, 1e-5)
        self.out_conv = Conv2d(cout, out_channels, 3)
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

    def embed(
        self,
        noise_labels: Tensor,
        class_labels: Tensor | None,
        augment_labels: Tensor | None,
        target_labels: Tensor | None = None,
    ) -> Tensor:
        """Embedding of noise level, augmentation, class, and target noise level."""
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and class_labels is not None:
            labels = _drop_labels(class_labels, self.label_dropout * self.training, noise_labels.shape[0])
            emb = emb + self.map_label(labels)
        if self.map_target0 is not None and self.map_target1 is not None and target_labels is not None:
            emb = emb + self.map_target1(F.silu(self.map_target0(self.map_noise(target_labels))))
        return F.silu(emb)

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
            emb = self.embed(noise_labels, class_labels, augment_labels, target_labels)
        skips: list[Tensor] = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            if "_block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            x = layer(x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))


UNETS: dict[str, type[SongUNet] | type[DhariwalUNet]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
