"""Networks of other families: those of `tests.models` with what they are called with, published sizes, authors' DiT."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

from gddlab.nets.dit import DiT
from tests.models import TOKENS as TEXT
from tests.models import network

ROWS = 2


class Family(NamedTuple):
    """A class of diffusers: a tiny one, arguments of a published one, and what a call needs beside x and t."""

    kind: str
    tiny: Callable[[], nn.Module]
    published: dict[str, Any]
    call: Callable[[], dict[str, Tensor | Any]]

    def make(self, published: bool = False) -> nn.Module:
        if not published:
            return self.tiny()
        made: nn.Module = getattr(diffusers, self.kind)(**self.published)
        return made.eval()

    def run(self, net: nn.Module) -> Tensor:
        torch.manual_seed(1)
        given = {"hidden_states" if "Transformer" in self.kind else "sample": torch.randn(ROWS, 4, 8, 8)}
        given |= {"timestep": torch.tensor([5.0, 900.0])} | self.call()
        with torch.no_grad():
            out: Tensor = net(**given, return_dict=False)[0]
        return out


def _text(channels: int) -> Tensor:
    return torch.randn(ROWS, TEXT, channels)


THREE = {"num_layers": 3}
NCHW = {"in_channels": 3, "out_channels": 3}
IDS = torch.stack([torch.zeros(16), *(g.flatten() for g in torch.meshgrid(*[torch.arange(4.0)] * 2, indexing="ij"))], 1)

FAMILIES = {
    "unet2d": Family(
        "UNet2DModel",
        partial(network, "unet2d", in_channels=4, out_channels=4, sample_size=8),
        NCHW
        | {"sample_size": 32, "block_out_channels": (128, 256, 256, 256), "attention_head_dim": None}
        | {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")}
        | {"up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")},
        dict,
    ),
    "sd": Family(
        "UNet2DConditionModel",
        partial(network, "sd"),
        {"sample_size": 64, "cross_attention_dim": 768},
        lambda: {"encoder_hidden_states": _text(16)},
    ),
    "sdxl": Family(
        "UNet2DConditionModel",
        partial(network, "sdxl"),
        {"sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048}
        | {"attention_head_dim": (5, 10, 20), "use_linear_projection": True, "transformer_layers_per_block": (1, 2, 10)}
        | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")}
        | {"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}
        | {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        | {"projection_class_embeddings_input_dim": 2816},
        lambda: {
            "encoder_hidden_states": _text(16),
            "added_cond_kwargs": {"text_embeds": torch.randn(ROWS, 32), "time_ids": torch.randn(ROWS, 6)},
        },
    ),
    "dit": Family(
        "DiTTransformer2DModel",
        partial(network, "dit", **THREE),
        {"out_channels": 8},
        lambda: {"class_labels": torch.tensor([1, 10])},
    ),
    "pixart": Family(
        "PixArtTransformer2DModel",
        partial(network, "pixart", **THREE),
        {"sample_size": 64, "caption_channels": 4096, "use_additional_conditions": False},
        lambda: {
            "encoder_hidden_states": _text(12),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "sana": Family(
        "SanaTransformer2DModel",
        partial(network, "sana", **THREE),
        {},
        lambda: {"encoder_hidden_states": _text(12)},
    ),
    "sd3": Family(
        "SD3Transformer2DModel",
        partial(network, "sd3", **THREE),
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
        lambda: {"encoder_hidden_states": _text(12), "pooled_projections": torch.randn(ROWS, 10)},
    ),
    "flux": Family(
        "FluxTransformer2DModel",
        partial(network, "flux"),
        {"guidance_embeds": True},
        lambda: {
            **{"hidden_states": torch.randn(ROWS, 16, 16), "timestep": torch.tensor([0.005, 0.9])},
            **{"encoder_hidden_states": _text(12), "pooled_projections": torch.randn(ROWS, 10)},
            **{"img_ids": IDS, "txt_ids": torch.zeros(TEXT, 3), "guidance": torch.full((ROWS,), 3.5)},
        },
    ),
}
TRANSFORMERS = ("dit", "pixart", "sana", "sd3", "flux")


def authors_dit(depth: int = 28, width: int = 1152, classes: int = 1000) -> DiT:
    """By default DiT-XL/2 for latents of 32x32 (Peebles & Xie 2023)."""
    return DiT(32, 4, classes, model_channels=width, num_blocks=depth, num_heads=width // 8, learn_sigma=True)
