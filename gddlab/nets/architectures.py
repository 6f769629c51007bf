"""Named architectures: the networks of EDM's and EDM2's published teachers.

EDM: Karras et al. 2022, table 7 and appendix F. EDM2: Karras et al. 2024, configuration G; widths and dropout are those
of its released training options.
"""

from __future__ import annotations

import copy
from typing import Any

from gddlab.errors import unknown
from gddlab.nets.io import from_edm
from gddlab.nets.precond import Precond

DDPMPP: dict[str, Any] = {
    "model_type": "SongUNet",
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "channel_mult_noise": 1,
    "resample_filter": [1, 1],
}
NCSNPP: dict[str, Any] = {
    "model_type": "SongUNet",
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "decoder_type": "standard",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
ADM: dict[str, Any] = {
    "img_resolution": 64,
    "img_channels": 3,
    "label_dim": 1000,
    "augment_dim": 0,
    "model_type": "DhariwalUNet",
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "num_blocks": 3,
    "attn_resolutions": [32, 16, 8],
    "dropout": 0.1,
}

EDM2 = {"xs": (128, 0.0), "s": (192, 0.0), "m": (256, 0.1), "l": (320, 0.1), "xl": (384, 0.1), "xxl": (448, 0.1)}
"""Base width and dropout by size."""


def _song(family: dict[str, Any], resolution: int, mult: list[int], dropout: float, augment_dim: int) -> dict[str, Any]:
    return {
        "img_resolution": resolution,
        "img_channels": 3,
        "label_dim": 0,
        "augment_dim": augment_dim,
        **family,
        "model_channels": 128,
        "channel_mult": mult,
        "num_blocks": 4,
        "attn_resolutions": [16],
        "dropout": dropout,
    }


def _edm2(data: str, size: str, label_dim: int = 1000) -> tuple[str, dict[str, Any]]:
    width, dropout = EDM2[size]
    return "EDM2Precond", {
        "img_resolution": 64,
        "img_channels": 4 if data == "img512" else 3,  # latents of 512 pixels
        "label_dim": label_dim,
        "model_channels": width,
        "channel_mult": [1, 2, 3, 4],
        "num_blocks": 3,
        "attn_resolutions": [16, 8],
        "dropout": dropout,
    }


def _table() -> dict[str, tuple[str, dict[str, Any]]]:
    out: dict[str, tuple[str, dict[str, Any]]] = {}
    for unet, family in (("ddpmpp", DDPMPP), ("ncsnpp", NCSNPP)):
        cifar = _song(family, 32, [2, 2, 2], 0.13, 9)
        out[f"{unet}-cifar10"] = "EDMPrecond", cifar
        out[f"{unet}-cifar10-cond"] = "EDMPrecond", cifar | {"label_dim": 10}
        out[f"{unet}-ffhq-64"] = "EDMPrecond", _song(family, 64, [1, 2, 2, 2], 0.05, 9)
        out[f"{unet}-afhqv2-64"] = "EDMPrecond", _song(family, 64, [1, 2, 2, 2], 0.25, 9)
    out["adm-imagenet-64"] = "EDMPrecond", ADM
    for unet, family, precond in (("vp-ddpmpp", DDPMPP, "VPPrecond"), ("ve-ncsnpp", NCSNPP, "VEPrecond")):
        cifar = _song(family, 32, [1, 2, 2, 2], 0.1, 0)
        out[f"{unet}-cifar10"] = precond, cifar
        out[f"{unet}-cifar10-cond"] = precond, cifar | {"label_dim": 10}
        out[f"{unet}-64"] = precond, _song(family, 64, [1, 2, 2, 2], 0.1, 0)
    out["iddpm-adm-imagenet-64"] = "iDDPMPrecond", ADM
    for size in EDM2:
        for data in ("img64", "img512"):
            if (data, size) != ("img64", "xxl"):
                out[f"edm2-{data}-{size}"] = _edm2(data, size)
    for size in ("xs", "s"):
        out[f"edm2-img512-{size}-uncond"] = _edm2("img512", size, label_dim=0)
    return out


ARCHITECTURES = _table()
"""Name -> class name and keyword arguments, as in an EDM pickle.

Names that begin with vp, ve or iddpm are EDM's baselines (configuration A), derived from the paper: files may differ.
"""


def architectures() -> list[str]:
    """Names that `build` knows."""
    return list(ARCHITECTURES)


def build(name: str, **changes: Any) -> Precond:
    """A network of a named architecture, with fresh parameters.

    Args:
        name: One of `architectures()`, for example "ncsnpp-cifar10".
        **changes: Arguments that differ from the named ones, for example `label_dim=10`.

    Returns:
        The network; under `torch.device("meta")` it costs no memory.

    Raises:
        GddlabError: Unknown name or argument.
    """
    if name not in ARCHITECTURES:
        raise unknown("architecture", name, ARCHITECTURES)
    precond, kwargs = ARCHITECTURES[name]
    return from_edm(precond, **copy.deepcopy(kwargs) | changes)
