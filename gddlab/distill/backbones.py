"""Frozen feature networks of the projected discriminator: four levels each, checked before the first step."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gddlab.distill.backbone_networks import VGG_STOPS, create, fitted, make_timm, make_vgg, vgg_state
from gddlab.distill.backbone_weights import VGG, Source, check_name, find_weights, missing, reason, timm_module
from gddlab.distill.heads import logit_sizes
from gddlab.distill.weight_files import ask_hub, read_state
from gddlab.errors import GddlabError
from gddlab.nets.folding import fold_batchnorm, probe_image
from gddlab.nets.lite import LITES

__all__ = ["Backbone", "TokenMaps", "check_backbone"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Plan:
    """What is known of a backbone without its weights: its four levels' channels and sides, pixels; its normalisation; for timm's networks, the layers taken; the
    width of a ViT's tokens, 0 for others."""

    channels: tuple[int, ...]
    sizes: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    take: tuple[int, ...] = ()
    tokens: int = 0


class TokenMaps(nn.Module):
    """A ViT's four maps of tokens as a pyramid: frozen random 1x1 convolutions, then x4, x2, x1 and x1/2 (Ranftl et al. 2021, section 3; random in GDD)."""

    channels = (96, 192, 384, 768)

    def __init__(self, width: int):
        super().__init__()
        a, b, _, d = self.channels
        self.project = nn.ModuleList(nn.Conv2d(width, c, 1) for c in self.channels)
        self.resize = nn.ModuleList(
            [
                nn.ConvTranspose2d(a, a, 4, stride=4),
                nn.ConvTranspose2d(b, b, 2, stride=2),
                nn.Identity(),
                nn.Conv2d(d, d, 3, stride=2, padding=1),
            ]
        )
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> TokenMaps:
        return super().train(False)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Four (B, width, G, G) -> sides 4G, 2G, G, G/2."""
        return [r(p(x)) for p, r, x in zip(self.project, self.resize, maps, strict=True)]


class Backbone(nn.Module):
    """Four feature levels of a frozen pretrained network, in eval mode always.

    Args:
        name: "tf_efficientnet_lite0", "vgg16_bn" (torchvision's), "deit_base_distilled_patch16_224", or any timm model: of a convolutional or hierarchical
            one the last four levels, of a plain ViT four blocks chosen evenly.
        input_size: Images are resized to this many pixels, bilinearly (align_corners False).
        fold: Folds BatchNorm into convolutions: equal up to float32 rounding, and faster.
        weights: "auto" looks for them, see `find_weights`; "random" draws them from torch's global generator; else a path.

    Attributes:
        channels: Of the four levels.
        mean, std: Normalisation of images in [0, 1].
        adapter: A ViT's random frozen adapter, which a checkpoint must keep; None for others.
        source: Where the weights came from.

    Raises:
        GddlabError: Unknown name, a size that does not fit, or weights that are missing or do not fit.
    """

    def __init__(self, name: str, input_size: int, *, fold: bool = True, weights: str | Path = "auto"):
        super().__init__()
        plan = _plan(name, input_size)
        self.name, self.input_size, self.source = name, input_size, find_weights(name, weights)
        self.channels, self.mean, self.std, self.take = plan.channels, plan.mean, plan.std, plan.take
        self.net = make_vgg(self.source) if name == VGG else make_timm(name, input_size, plan.take, self.source)
        self.adapter = TokenMaps(plan.tokens) if plan.tokens else None
        self.eval().requires_grad_(False)
        if fold:
            size = input_size if name not in (VGG, *LITES) else min(input_size, 64)
            fold_batchnorm(self.net, probe_image(size, like=next(self.net.parameters())), run=self._levels)

    def train(self, mode: bool = True) -> Backbone:
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images in [-1, 1], (B, 1 or 3, H, W), grey repeated -> four maps, shallow to deep."""
        # Normalised by Python numbers: exact in every dtype, and nothing is copied to the device.
        if len(set(self.mean)) == len(set(self.std)) == 1:
            x = ((images + 1) / 2 - self.mean[0]) / self.std[0]
        else:
            split = images.split(1, dim=1) * (3 // images.shape[1])
            x = torch.cat([((c + 1) / 2 - m) / s for c, m, s in zip(split, self.mean, self.std, strict=True)], 1)
        if x.shape[-2:] != (self.input_size, self.input_size):
            x = F.interpolate(x, size=(self.input_size, self.input_size), mode="bilinear", align_corners=False)
        x = x.expand(-1, 3, -1, -1)
        if not torch.compiler.is_compiling() and fwAD.unpack_dual(x).tangent is not None:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward-mode derivative
                maps = self._levels(x)
        else:
            maps = self._levels(x)
        return maps if self.adapter is None else self.adapter(maps)

    def _levels(self, x: Tensor) -> list[Tensor]:
        net: Any = self.net
        if self.name == VGG:
            out = []
            for start, stop in zip((0, *VGG_STOPS), VGG_STOPS, strict=False):
                x = net[start:stop](x)
                out.append(x)
            return out
        return list(
            net.forward_intermediates(
                x, indices=list(self.take), stop_early=True, output_fmt="NCHW", intermediates_only=True
            )
        )


def check_backbone(name: str, *, input_size: int, weights: str | Path = "auto") -> None:
    """Everything that can be refused without building the network: the name, the size, the file and what it holds; a hub is only asked whether the file is there.

    Raises:
        GddlabError: As `Backbone`.
    """
    _plan(name, input_size)
    source = find_weights(name, weights)
    if source.path is not None:
        if name == VGG:
            with torch.device("meta"):
                net = make_vgg(Source("random"))
            vgg_state(net, read_state(source.path), source.path)
        else:
            given = {k: v.to("meta") for k, v in read_state(source.path).items()}
            with torch.device("meta"):
                fitted(name, input_size, given, source.path)
    elif source.address is not None and (why := ask_hub(source.address)):
        raise missing(name, why)


@functools.lru_cache(maxsize=32)
def _plan(name: str, input_size: int) -> Plan:
    """Structure by the meta device: nothing is drawn, computed or allocated."""
    check_name(name)
    refused = f"{name} at input_size={input_size}"
    if name == VGG:
        _multiple(name, input_size, 32)
        sizes = tuple(input_size // s for s in (2, 4, 8, 16))
        plan = Plan((128, 256, 512, 512), sizes, IMAGENET_MEAN, IMAGENET_STD)
    else:
        try:
            with torch.device("meta"):
                net = create(name, timm_module().get_pretrained_cfg(name).input_size[-1])
            reductions = [info["reduction"] for info in net.feature_info]
        except Exception as e:  # whatever a network of another shape raises
            raise GddlabError(f"{name} cannot be a backbone ({reason(e)}): give another") from None
        n = len(reductions)
        if n < 4:
            raise GddlabError(f"{name} gives {n} levels of features: give a backbone with four")
        plain = hasattr(net, "blocks") and hasattr(net, "patch_embed") and len(set(reductions)) == 1
        _multiple(name, input_size, 2 * int(reductions[0]) if plain else 32)
        take = tuple((n * i + 3) // 4 - 1 for i in (1, 2, 3, 4)) if plain else tuple(range(n - 4, n))
        try:
            with torch.device("meta"), torch.no_grad():
                net = create(name, input_size).eval()
                x = torch.zeros(1, 3, input_size, input_size)
                maps = net.forward_intermediates(x, indices=list(take), output_fmt="NCHW", intermediates_only=True)
            shapes = [tuple(m.shape) for m in maps]
        except Exception as e:
            raise GddlabError(f"{refused} cannot be a backbone ({reason(e)}): give another size or network") from None
        cfg = net.pretrained_cfg
        mean, std = tuple(cfg["mean"]), tuple(cfg["std"])
        channels, sizes = tuple(s[1] for s in shapes), tuple(s[2] for s in shapes)
        if plain:
            grid = sizes[0]
            plan = Plan(TokenMaps.channels, (4 * grid, 2 * grid, grid, grid // 2), mean, std, take, channels[0])
        else:
            plan = Plan(channels, sizes, mean, std, take)
    if any(a != 2 * b for a, b in zip(plan.sizes, plan.sizes[1:], strict=False)):
        raise GddlabError(f"{refused} gives maps of {plan.sizes} pixels: give a backbone whose levels halve")
    if min(logit_sizes(plan.sizes, input_size)) < 1:
        raise GddlabError(f"{refused} gives maps of {plan.sizes} pixels, too small for the heads: give a larger size")
    return plan


def _multiple(name: str, input_size: int, unit: int) -> None:
    if input_size < unit or input_size % unit:
        raise GddlabError(f"input_size={input_size}: {name} takes multiples of {unit}")
