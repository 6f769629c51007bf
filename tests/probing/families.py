"""Networks of other families: tiny ones of diffusers with what they are called with, and DiT by its authors' names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

ROWS, TEXT = 2, 7


class Family(NamedTuple):
    """A class of diffusers: arguments of a tiny one and of a published one, and what a call needs beside x and t."""

    kind: str
    tiny: dict[str, Any]
    published: dict[str, Any]
    call: Callable[[], dict[str, Tensor | Any]]

    def make(self, published: bool = False) -> nn.Module:
        torch.manual_seed(0)
        made: nn.Module = getattr(diffusers, self.kind)(**(self.published if published else self.tiny))
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


UNET = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "norm_num_groups": 8}
CROSS = UNET | {"block_out_channels": (32, 64), "cross_attention_dim": 16}
TOKENS = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 3, "sample_size": 8}
NCHW = {"in_channels": 3, "out_channels": 3}
IDS = torch.stack([torch.zeros(16), *(g.flatten() for g in torch.meshgrid(*[torch.arange(4.0)] * 2, indexing="ij"))], 1)

FAMILIES = {
    "unet2d": Family(
        "UNet2DModel",
        UNET
        | {"block_out_channels": (32, 64), "attention_head_dim": 8}
        | {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        NCHW
        | {"sample_size": 32, "block_out_channels": (128, 256, 256, 256), "attention_head_dim": None}
        | {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")}
        | {"up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")},
        dict,
    ),
    "sd": Family(
        "UNet2DConditionModel",
        CROSS
        | {"attention_head_dim": 8}
        | {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
        | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
        {"sample_size": 64, "cross_attention_dim": 768},
        lambda: {"encoder_hidden_states": _text(16)},
    ),
    "sdxl": Family(
        "UNet2DConditionModel",
        CROSS
        | {"attention_head_dim": (2, 4), "use_linear_projection": True, "transformer_layers_per_block": (1, 2)}
        | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
        | {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "addition_embed_type": "text_time"}
        | {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80},
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
        TOKENS | {"out_channels": 8, "patch_size": 2, "num_embeds_ada_norm": 10},
        {"out_channels": 8},
        lambda: {"class_labels": torch.tensor([1, 10])},
    ),
    "pixart": Family(
        "PixArtTransformer2DModel",
        TOKENS
        | {"out_channels": 8, "patch_size": 2, "cross_attention_dim": 16, "caption_channels": 12}
        | {"norm_num_groups": 8, "use_additional_conditions": False},
        {"sample_size": 64, "caption_channels": 4096, "use_additional_conditions": False},
        lambda: {
            "encoder_hidden_states": _text(12),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "sana": Family(
        "SanaTransformer2DModel",
        TOKENS
        | {"out_channels": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "patch_size": 1}
        | {"cross_attention_dim": 16, "caption_channels": 12},
        {},
        lambda: {"encoder_hidden_states": _text(12)},
    ),
    "sd3": Family(
        "SD3Transformer2DModel",
        TOKENS
        | {"out_channels": 4, "patch_size": 2, "joint_attention_dim": 12, "caption_projection_dim": 16}
        | {"pooled_projection_dim": 10, "pos_embed_max_size": 8, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
        lambda: {"encoder_hidden_states": _text(12), "pooled_projections": torch.randn(ROWS, 10)},
    ),
    "flux": Family(
        "FluxTransformer2DModel",
        {"patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16}
        | {"num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 10, "guidance_embeds": True}
        | {"axes_dims_rope": (4, 4, 8)},
        {"guidance_embeds": True},
        lambda: {
            **{"hidden_states": torch.randn(ROWS, 16, 16), "timestep": torch.tensor([0.005, 0.9])},
            **{"encoder_hidden_states": _text(12), "pooled_projections": torch.randn(ROWS, 10)},
            **{"img_ids": IDS, "txt_ids": torch.zeros(TEXT, 3), "guidance": torch.full((ROWS,), 3.5)},
        },
    ),
}
TRANSFORMERS = ("dit", "pixart", "sana", "sd3", "flux")


def attention(width: int) -> nn.ModuleDict:
    return nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})


class DiTBlock(nn.Module):
    """Names and sizes of the authors' block."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attn = attention(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))


class AuthorsDiT(nn.Module):
    """Names and sizes of the authors' DiT for latents of 32x32 (Peebles & Xie 2023); it is not run."""

    def __init__(self, depth: int = 28, width: int = 1152, classes: int = 1000, block: type[nn.Module] = DiTBlock):
        super().__init__()
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(4, width, 2, 2)})
        embed = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": embed})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
        self.pos_embed = nn.Parameter(torch.zeros(1, 256, width))
        self.blocks = nn.ModuleList(block(width) for _ in range(depth))
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.final_layer = nn.ModuleDict({"linear": nn.Linear(width, 32), "adaLN_modulation": modulation})
