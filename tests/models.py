"""Tiny random networks and pipelines of diffusers, by the names of `NETWORKS` and `PIPELINES`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

SIDE, CHANNELS, TOKENS, FACTOR = 8, 4, 7, 2
"""Of latents; words of a prompt; pixels per latent."""
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def unet2d(**changes: Any) -> nn.Module:
    config: dict[str, Any] = {"sample_size": 16, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16)}
    config |= {"layers_per_block": 1, "norm_num_groups": 4, "down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
    config |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8}
    return diffusers.UNet2DModel(**(config | changes))


def sd(**changes: Any) -> nn.Module:
    config: dict[str, Any] = {"sample_size": SIDE, "in_channels": CHANNELS, "out_channels": CHANNELS}
    config |= {"layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8, "cross_attention_dim": 16}
    config |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 8}
    config |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    return diffusers.UNet2DConditionModel(**(config | changes))


def sdxl(**changes: Any) -> nn.Module:
    return sd(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        **changes,
    )


def dit(**changes: Any) -> nn.Module:
    config: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": CHANNELS}
    config |= {"out_channels": 2 * CHANNELS, "num_layers": 2, "sample_size": SIDE, "patch_size": 2}
    return diffusers.DiTTransformer2DModel(**(config | {"num_embeds_ada_norm": 10} | changes))


def pixart(**changes: Any) -> nn.Module:
    config: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": CHANNELS}
    config |= {"out_channels": 2 * CHANNELS, "num_layers": 2, "sample_size": SIDE, "patch_size": 2}
    config |= {"cross_attention_dim": 16, "caption_channels": 12, "norm_num_groups": 8}
    return diffusers.PixArtTransformer2DModel(**(config | {"use_additional_conditions": False} | changes))


def sana(**changes: Any) -> nn.Module:
    config: dict[str, Any] = {"in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 2, "sample_size": SIDE}
    config |= {"num_attention_heads": 2, "attention_head_dim": 8, "num_cross_attention_heads": 2, "patch_size": 1}
    config |= {"cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 12}
    return diffusers.SanaTransformer2DModel(**(config | changes))


def sd3(**changes: Any) -> nn.Module:
    config: dict[str, Any] = {"sample_size": SIDE, "patch_size": 2, "in_channels": CHANNELS, "out_channels": CHANNELS}
    config |= {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12}
    config |= {"caption_projection_dim": 16, "pooled_projection_dim": 10, "pos_embed_max_size": SIDE}
    config |= {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}
    return diffusers.SD3Transformer2DModel(**(config | changes))


def flux(**changes: Any) -> nn.Module:
    config: dict[str, Any] = {"patch_size": 1, "in_channels": 4 * CHANNELS, "num_layers": 2, "num_single_layers": 2}
    config |= {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 12}
    config |= {"pooled_projection_dim": 10, "guidance_embeds": True, "axes_dims_rope": (4, 4, 8)}
    return diffusers.FluxTransformer2DModel(**(config | changes))


def auraflow(**changes: Any) -> nn.Module:
    config: dict[str, Any] = {"sample_size": SIDE, "patch_size": 2, "in_channels": CHANNELS, "out_channels": CHANNELS}
    config |= {"num_mmdit_layers": 2, "num_single_dit_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
    config |= {"joint_attention_dim": 12, "caption_projection_dim": 16, "pos_embed_max_size": 64}
    return diffusers.AuraFlowTransformer2DModel(**(config | changes))


def lumina2(**changes: Any) -> nn.Module:
    config: dict[str, Any] = {"sample_size": SIDE, "patch_size": 2, "in_channels": CHANNELS, "hidden_size": 24}
    config |= {"num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8}
    config |= {"axes_dim_rope": (4, 4, 4), "axes_lens": (64, 64, 64), "cap_feat_dim": 12}
    return diffusers.Lumina2Transformer2DModel(**(config | changes))


def qwen(**changes: Any) -> nn.Module:
    config: dict[str, Any] = {"patch_size": 2, "in_channels": 4 * CHANNELS, "out_channels": CHANNELS, "num_layers": 2}
    config |= {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 12}
    return diffusers.QwenImageTransformer2DModel(**(config | {"axes_dims_rope": (4, 4, 8)} | changes))


def zimage(**changes: Any) -> nn.Module:
    config: dict[str, Any] = {"in_channels": CHANNELS, "dim": 24, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2}
    config |= {"n_kv_heads": 2, "cap_feat_dim": 12, "axes_dims": [4, 4, 4], "axes_lens": [64, 64, 64]}
    net = diffusers.ZImageTransformer2DModel(**(config | changes))
    for token in (net.x_pad_token, net.cap_pad_token):
        nn.init.normal_(token)
    return net


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "unet2d": unet2d,
    "sd": sd,
    "sdxl": sdxl,
    "dit": dit,
    "pixart": pixart,
    "sana": sana,
    "sd3": sd3,
    "flux": flux,
}

NEWER: dict[str, Callable[..., nn.Module]] = {"auraflow": auraflow, "lumina2": lumina2, "qwen": qwen}
"""Further ones, whose pipelines are like those of the others."""


def network(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A network of `NETWORKS` or `NEWER`, whose branches all do something, in eval mode."""
    torch.manual_seed(seed)
    return (NETWORKS | NEWER)[name](**changes).eval()


def vae(scale: float = 0.18215, shift: float | None = None, **changes: Any) -> nn.Module:
    config: dict[str, Any] = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": CHANNELS}
    config |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    config |= {"sample_size": FACTOR * SIDE, "scaling_factor": scale, "shift_factor": shift}
    return diffusers.AutoencoderKL(**(config | changes)).eval()


def deep_vae() -> nn.Module:
    """Of Sana's kind."""
    config: dict[str, Any] = {"in_channels": 3, "latent_channels": CHANNELS, "attention_head_dim": 4}
    for part in ("encoder", "decoder"):
        config |= {f"{part}_block_types": ("ResBlock", "ResBlock"), f"{part}_block_out_channels": (8, 8)}
        config |= {f"{part}_qkv_multiscales": ((), ()), f"{part}_layers_per_block": (1, 1)}
    config |= {"downsample_block_type": "conv", "upsample_block_type": "interpolate", "scaling_factor": 0.41407}
    config |= {"decoder_norm_types": "rms_norm", "decoder_act_fns": "silu"}
    return diffusers.AutoencoderDC(**config).eval()


def video_vae() -> nn.Module:
    """Of Qwen-Image's kind."""
    latents = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [2.0, 1.5, 0.8, 1.0]}
    config: dict[str, Any] = {"base_dim": 8, "z_dim": CHANNELS, "dim_mult": [1, 1], "num_res_blocks": 1}
    return diffusers.AutoencoderKLQwenImage(**config, temperal_downsample=[False], **latents).eval()


def words(n: int, size: int, seed: int) -> dict[str, torch.Tensor]:
    """Embeddings of n prompts and n negative ones."""
    g = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(n, TOKENS, size, generator=g),
        "negative_prompt_embeds": torch.randn(n, TOKENS, size, generator=g),
    }


def pooled(n: int, size: int, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "pooled_prompt_embeds": torch.randn(n, size, generator=g),
        "negative_pooled_prompt_embeds": torch.randn(n, size, generator=g),
    }


def pipeline(name: str, n: int = 1, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """A pipeline of `PIPELINES` without text encoders, and the arguments of a call for n images; guidance is 4.

    `changes` are of its network.
    """
    torch.manual_seed(1)
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    without = {"text_encoder": None, "tokenizer": None}
    size = {"height": FACTOR * SIDE, "width": FACTOR * SIDE}
    masks = {f"{prefix}prompt_attention_mask": torch.ones(n, TOKENS) for prefix in ("", "negative_")}
    guided: dict[str, Any] = {"guidance_scale": 4.0, "num_inference_steps": 4}
    net = (NETWORKS | NEWER)[name](**({"num_embeds_ada_norm": 1000} if name == "dit" else {}) | changes).eval()
    if name == "dit":  # its pipeline takes 1000 for no class
        ddim = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
        pipe: Any = diffusers.DiTPipeline(transformer=net, vae=vae(), scheduler=ddim)
        call: dict[str, Any] = {"class_labels": list(range(n))}
    elif name == "sd":
        ddim = diffusers.DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False, set_alpha_to_one=True, steps_offset=1)
        pipe = diffusers.StableDiffusionPipeline(
            vae=vae(),
            unet=net,
            scheduler=ddim,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **without,
        )
        call = words(n, 16, 0) | size
    elif name == "sdxl":
        euler = diffusers.EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing="leading", steps_offset=1)
        more = {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
        pipe = diffusers.StableDiffusionXLPipeline(vae=vae(0.13025), unet=net, scheduler=euler, **without, **more)
        call = words(n, 16, 0) | pooled(n, 32, 1) | size
    elif name == "pixart":
        ddim = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
        pipe = diffusers.PixArtSigmaPipeline(transformer=net, vae=vae(), scheduler=ddim, **without)
        call = words(n, 12, 0) | masks | size | {"use_resolution_binning": False, "negative_prompt": None}
    elif name == "sana":
        pipe = diffusers.SanaPipeline(transformer=net, vae=deep_vae(), scheduler=flow, **without)
        # its pipeline takes multiples of 32 pixels
        call = words(n, 12, 0) | masks | {"height": 32, "width": 32, "use_resolution_binning": False}
        call |= {"negative_prompt": None}
    elif name == "sd3":
        more = {f"{kind}_{k}": None for k in (2, 3) for kind in ("text_encoder", "tokenizer")}
        pipe = diffusers.StableDiffusion3Pipeline(
            transformer=net, vae=vae(1.5305, 0.0609), scheduler=flow, **without, **more
        )
        call = words(n, 12, 0) | pooled(n, 10, 1) | size
    elif name in NEWER:
        kind, mask = {
            "auraflow": (diffusers.AuraFlowPipeline, "prompt_attention_mask"),
            "lumina2": (diffusers.Lumina2Pipeline, "prompt_attention_mask"),
            "qwen": (diffusers.QwenImagePipeline, "prompt_embeds_mask"),
        }[name]
        own = video_vae() if name == "qwen" else vae(1.5305, 0.0609)
        pipe = kind(transformer=net, vae=own, scheduler=flow, **without)
        call = words(n, 12, 0) | {"height": 8 * FACTOR, "width": 8 * FACTOR}
        if name == "lumina2":  # its pipeline divides by 8 whatever its autoencoder does
            call |= {"height": 8 * SIDE, "width": 8 * SIDE, "negative_prompt": None}
        masked = torch.ones(n, TOKENS, dtype=torch.long)
        masked[:, -2:] = 0
        call |= {mask: masked, f"negative_{mask}": torch.ones_like(masked)}
        if name == "qwen":
            guided = {"true_cfg_scale": 4.0, "num_inference_steps": 4}
    else:
        dynamic = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        more = {"text_encoder_2": None, "tokenizer_2": None}
        pipe = diffusers.FluxPipeline(transformer=net, vae=vae(0.3611, 0.1159), scheduler=dynamic, **without, **more)
        call = {k: v for k, v in (words(n, 12, 0) | pooled(n, 10, 1)).items() if "negative" not in k} | size
    pipe.set_progress_bar_config(disable=True)
    return pipe, call | guided


PIPELINES = ("sd", "sdxl", "sd3", "flux", "pixart", "sana", "dit")


def with_text(folder: Path) -> Any:
    """Stable Diffusion's pipeline with a text encoder, of words of one letter."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [f"{c}</w>" for c in "abcdefgh"]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *"abcdefgh"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)
    pipe, _ = pipeline("sd")
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return type(pipe)(
        vae=pipe.vae,
        text_encoder=CLIPTextModel(config).eval(),
        tokenizer=tokenizer,
        unet=pipe.unet,
        scheduler=pipe.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
