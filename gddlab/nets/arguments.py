"""Limits of constructor arguments that a file gives: a small file must not ask for a huge network, or for endless work."""

from __future__ import annotations

from typing import Any

__all__ = ["refusal"]

COUNTS = {
    "img_resolution": (1, 4096),
    "img_channels": (1, 256),
    "out_channels": (1, 512),
    "label_dim": (0, 100_000),
    "augment_dim": (0, 4096),
    "model_channels": (1, 8192),
    "channel_mult_emb": (1, 64),
    "channel_mult_noise": (1, 64),
    "num_blocks": (1, 64),
    "M": (1, 100_000),
}
NUMBERS = {"sigma_min", "sigma_max", "sigma_data", "beta_d", "beta_min", "epsilon_t", "C_1", "C_2", "eps", "sigma_g"}
NUMBERS |= {"dropout", "label_dropout"}
LISTS = {"channel_mult": (1, 64), "attn_resolutions": (1, 4096), "resample_filter": (0, 4096), "mid_sigmas": (0, 4096)}
FLAGS = {"target_time"}
NAMES = {"model_type", "embedding_type", "encoder_type", "decoder_type"}


def refusal(kwargs: dict[Any, Any], tensors: int) -> str | None:
    """What is wrong with the constructor arguments of a network of so many tensors; None if nothing is."""
    for name, value in kwargs.items():
        if (accepted := _accepted(name, value)) is not None:
            shown = repr(value[:40]) if isinstance(value, str) else value
            shown = shown if isinstance(shown, (int, float, str)) else f"<{type(value).__name__}>"
            return f"{str(name)[:40]}={str(shown)[:42]}: {accepted}"
    blocks, levels = kwargs.get("num_blocks", 1), len(kwargs.get("channel_mult", [1]))
    if 20 * blocks * levels > tensors:  # ten tensors a block, at least, up and down
        return f"{blocks} blocks in {levels} levels, but only {tensors} tensors"
    return None


def _accepted(name: Any, value: Any) -> str | None:
    """What an argument may be, if `value` is not."""
    if name in COUNTS:
        low, high = COUNTS[name]
        return None if type(value) is int and low <= value <= high else f"accepted are whole numbers, {low} to {high:,}"
    if name in NUMBERS:
        return None if type(value) in (int, float) and abs(value) <= 1e6 else "accepted are numbers, up to 1e6"
    if name in LISTS:
        low, high = LISTS[name]
        short = isinstance(value, (list, tuple)) and len(value) <= 16 and (value or name == "attn_resolutions")
        if short and all(type(v) in (int, float) and low <= v <= high for v in value):
            return None
        return f"accepted are lists of 1 to 16 numbers, {low} to {high:,}"
    if name in FLAGS:
        return None if type(value) is bool else "accepted are true and false"
    if name in NAMES:
        return None if isinstance(value, str) and len(value) < 100 else "accepted is a short text"
    return "no network of EDM has this argument"
