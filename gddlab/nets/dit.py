"""DiT and SiT, diffusion transformers (Peebles & Xie 2023; Ma et al. 2024), with the names of their authors' files."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gddlab.errors import GddlabError, unknown
from gddlab.nets.blocks import PositionalEmbedding, autocast_off, xavier_
from gddlab.nets.path import Coefficients, Path
from gddlab.nets.precond import Precond

WAVES = 256
"""Cosines and sines that the time is given as."""
EPS = 1e-6
"""Of the layer norms."""


def place_waves(side: int, channels: int) -> Float[Tensor, "1 n d"]:
    """Sines, then cosines, of each token's column, and the same of its row, for side x side tokens, row by row."""
    waves = PositionalEmbedding(channels // 2)(torch.arange(side, dtype=torch.float64))  # (side, D/2), cosines first
    waves = waves.unflatten(1, (2, -1)).flip(1).flatten(1)
    return torch.cat([waves.repeat(side, 1), waves.repeat_interleave(side, 0)], 1)[None].float()


def modulated(
    x: Float[Tensor, "b n d"], shift: Float[Tensor, "b 1 d"], scale: Float[Tensor, "b 1 d"]
) -> Float[Tensor, "b n d"]:
    """What adaptive layer norm makes of a normed x."""
    return torch.addcmul(shift, x, 1 + scale)


class PatchEmbed(nn.Module):
    """A token for each square of pixels.  (B, C, H, W) -> (B, N, D)"""

    def __init__(self, in_channels: int, width: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.proj(x)
        return tokens.flatten(2).transpose(1, 2).contiguous()  # as all layers behind read and write them


class TimestepEmbedder(nn.Module):
    """(B,) -> (B, D)"""

    def __init__(self, width: int):
        super().__init__()
        self.waves = PositionalEmbedding(WAVES)
        self.mlp = nn.Sequential(nn.Linear(WAVES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        dtype = next(self.mlp.parameters()).dtype
        waves = self.waves(t.to(torch.promote_types(dtype, torch.float32)))  # bfloat16 would merge times
        out: Tensor = self.mlp(waves.to(dtype))
        return out


class LabelEmbedder(nn.Module):
    """A vector for each class, and one for none, the last; training drops classes at random.  (B,) -> (B, D)"""

    def __init__(self, label_dim: int, width: int, dropout: float):
        super().__init__()
        self.label_dim, self.dropout = label_dim, dropout
        table = torch.empty(label_dim + 1, width)
        self.embedding_table = nn.Embedding.from_pretrained(table, freeze=False)  # draws nothing, as it would on meta

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.dropout:
            y = torch.where(torch.rand(len(y), device=y.device) < self.dropout, self.label_dim, y)
        out: Tensor = self.embedding_table(y)
        return out


class Attention(nn.Module):
    """Self-attention over tokens; channels of `qkv` are (q k v, head, channel).  (B, N, D) -> (B, N, D)"""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """(B, N, D) -> (B, N, D)"""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU("tanh")
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class DiTBlock(nn.Module):
    """Attention and MLP, each normed, modulated and gated by the embedding c (Peebles & Xie 2023, figure 3).

    The residual stream is the input of the block and of `norm2`, and the output.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=EPS)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=EPS)
        self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Float[Tensor, "b n d"], c: Float[Tensor, "b d"]) -> Float[Tensor, "b n d"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        x = x + gate1 * self.attn(modulated(self.norm1(x), shift1, scale1))
        return x + gate2 * self.mlp(modulated(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """(B, N, D), (B, D) -> (B, N, p p C)"""

    def __init__(self, width: int, out_channels: int, patch_size: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=EPS)
        self.linear = nn.Linear(width, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=2)
        out: Tensor = self.linear(modulated(self.norm_final(x), shift, scale))
        return out


class DiT(nn.Module):
    """A transformer over patches of an image, told the time and the class.

    Args:
        img_resolution: Height and width, pixels (or latents).
        in_channels: Channels of an image.
        label_dim: Number of classes, which are 0 to label_dim - 1; label_dim itself stands for none.
        patch_size: Side of the squares that become tokens.
        model_channels: Width.
        num_blocks, num_heads: Number of blocks, and of attention heads in each.
        learn_sigma: Whether it also gives a variance, as further channels.
        label_dropout: Probability that a class becomes none in training.

    Raises:
        GddlabError: Sizes that do not divide each other.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        label_dim: int = 0,
        *,
        patch_size: int = 2,
        model_channels: int = 1152,
        num_blocks: int = 28,
        num_heads: int = 16,
        learn_sigma: bool = False,
        label_dropout: float = 0.0,
    ):
        super().__init__()
        if img_resolution % patch_size:
            raise GddlabError(f"{img_resolution} pixels, patches of {patch_size}: give a patch_size that divides them")
        if model_channels % num_heads or model_channels % 4:
            raise GddlabError(
                f"model_channels={model_channels} with num_heads={num_heads}: give a multiple of num_heads and of 4"
            )
        self.img_resolution, self.in_channels, self.patch_size = img_resolution, in_channels, patch_size
        self.side = img_resolution // patch_size
        self.x_embedder = PatchEmbed(in_channels, model_channels, patch_size)
        self.t_embedder = TimestepEmbedder(model_channels)
        self.y_embedder = LabelEmbedder(label_dim, model_channels, label_dropout)
        self.pos_embed = nn.Parameter(place_waves(self.side, model_channels), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(model_channels, num_heads) for _ in range(num_blocks))
        self.final_layer = FinalLayer(model_channels, in_channels * (1 + learn_sigma), patch_size)
        self._init()

    def _init(self) -> None:
        """Xavier's weights; zeros where a block or the network ends, so that each begins as the identity."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                xavier_(m)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(len(self.x_embedder.proj.weight), -1))
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]
        for p in (self.y_embedder.embedding_table.weight, *self.t_embedder.mlp.parameters()):
            if p.ndim == 2 and not p.is_meta:  # drawing there imports torch's compiler, more than a second
                nn.init.normal_(p, std=0.02)
        last = [m.adaLN_modulation[1] for m in (*self.blocks, self.final_layer)]
        for layer in (*last, self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Float[Tensor, "b c h w"], t: Tensor, y: Int[Tensor, " b"]) -> Float[Tensor, "b cout h w"]:
        """F(x; t, y): noise and variance, or a velocity.

        Args:
            x: (B, C, H, W), of the network's resolution, noisy, scaled as its `Path` says.
            t: Times, (B,).
            y: Class ids, (B,).

        Raises:
            GddlabError: Images of another size.
        """
        if x.shape[2] != self.img_resolution or x.shape[3] != self.img_resolution:
            r = self.img_resolution
            raise GddlabError(f"x has shape {tuple(x.shape)}: this network takes (B, {self.in_channels}, {r}, {r})")
        with autocast_off(x.device):
            c = self.t_embedder(t) + self.y_embedder(y)
        h = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            h = block(h, c)
        h = self.final_layer(h, c)  # (B, N, p p C)
        p = self.patch_size
        h = h.unflatten(2, (p, p, -1)).unflatten(1, (self.side, self.side))  # (B, H/p, W/p, p, p, C)
        return h.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, *x.shape[2:])


class SiT(DiT):
    """DiT that keeps the variance to itself, where it has one."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y)[:, : self.in_channels]


@functools.cache
def _kind(kind: str) -> tuple[type[DiT], Path]:
    """Class and path of a kind of network."""
    if kind == "dit":
        beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64, device="cpu")  # also where a network is on meta
        return DiT, Path.vp((1 - beta).cumprod(0), "epsilon")
    return SiT, Path.flow(reversed=True) if kind == "sit" else Path.flow(1000.0)


KINDS = ("dit", "sit", "flow")


class DiTPrecond(Precond):
    """A denoiser D(x; sigma) around a transformer, `self.model`.

    Args:
        img_resolution, img_channels, label_dim: As for `DiT`.
        kind: What the network predicts, and of which time:
            "dit", the noise on DDPM's path of 1,000 steps, 0 to 999 (beta linear from 1e-4 to 0.02);
            "sit", image - noise along a straight line, time 0 (noise) to 1 (image);
            "flow", noise - image along the same line, time 0 (image) to 1000 (noise).
        model_kwargs: Further arguments of `DiT`.

    Raises:
        GddlabError: An unknown kind, or sizes that do not divide each other.
    """

    def __init__(
        self, img_resolution: int, img_channels: int, label_dim: int = 0, *, kind: str = "flow", **model_kwargs: Any
    ):
        nn.Module.__init__(self)  # there is no U-Net to build
        if kind not in KINDS:
            raise unknown("kind", kind, KINDS)
        network, path = _kind(kind)
        self.path: Path = path
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.sigma_min, self.sigma_max = self.path.sigma_min, self.path.sigma_max
        self.model = network(img_resolution, img_channels, label_dim, **model_kwargs)  # type: ignore[assignment]
        self.init_kwargs, self.card = {}, None

    def coefficients(self, sigma: Tensor) -> Coefficients:
        return self.path.coefficients(sigma)

    def run(
        self,
        x: Float[Tensor, "b c h w"],
        time: Float[Tensor, " b"],
        class_labels: Tensor | None,
        augment_labels: Tensor | None,
        target: Tensor | None,
    ) -> Float[Tensor, "b cout h w"]:
        """Of one-hot rows the largest entry is the class; a row of zeros is of none. The last two are not used."""
        if class_labels is None:
            ids = torch.full((len(x),), self.label_dim, device=x.device)
        else:
            ids = torch.where((class_labels != 0).any(1), class_labels.argmax(1), self.label_dim).expand(len(x))
        out: Tensor = self.model(x, time, ids)
        return out
