"""The trunks of LPIPS: levels of torchvision's VGG16, AlexNet and SqueezeNet 1.1 (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features")."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gddlab.errors import GddlabError, NotFound, unknown
from gddlab.files import cache_dir
from gddlab.pretrained.files import ask_hub, find_weights, fit_state, load_fitting, read_state

__all__ = ["TRUNKS", "LPIPSTrunk", "check_trunk", "unit"]


@dataclass(frozen=True)
class Trunk:
    """Where torchvision's `features` are cut, after a ReLU each time; the width of each level; the smallest image, pixels."""

    model: str
    weights: str
    stops: tuple[int, ...]
    channels: tuple[int, ...]
    smallest: int

    @property
    def url(self) -> str:
        from torchvision import models

        return str(getattr(models, self.weights).IMAGENET1K_V1.url)

    def build(self) -> nn.Module:
        """`features` on the meta device: the classifier, most of the parameters, is never made."""
        from torchvision import models

        with torch.device("meta"):
            features: nn.Module = getattr(models, self.model)(weights=None).features[: self.stops[-1]]
        return features


TRUNKS = {
    "vgg": Trunk("vgg16", "VGG16_Weights", (4, 9, 16, 23, 30), (64, 128, 256, 512, 512), 16),
    "alex": Trunk("alexnet", "AlexNet_Weights", (2, 5, 8, 10, 12), (64, 192, 384, 256, 256), 31),
    "squeeze": Trunk(
        "squeezenet1_1", "SqueezeNet1_1_Weights", (2, 5, 8, 10, 11, 12, 13), (64, 128, 256, 384, 384, 512, 512), 17
    ),
}


def unit(x: Tensor, eps: float = 1e-20) -> Tensor:
    """Each pixel's channels divided by their norm; `eps` inside the root makes it differentiable where all are zero.  (B, C, H, W)"""
    return x / (x.square().sum(1, keepdim=True) + eps).sqrt()


class LPIPSTrunk(nn.Module):
    """Levels of an LPIPS trunk.

    Args:
        net: "vgg", "alex" or "squeeze".
        input_size: Images are resized to this many pixels, bilinearly (align_corners False).
        weights: Path of a torchvision state dict (.safetensors, .pth, .pt); "random" for He initialisation (He et al. 2015); None looks for
            vgg16, alexnet or squeezenet1_1 in the working folder, `$GDDLAB_HOME`, its `backbones`, the cache's `backbones`, then asks torchvision's hub.

    Raises:
        GddlabError: Unknown net, too small a size, or weights that are missing or do not fit.
    """

    def __init__(self, net: str, *, input_size: int = 224, weights: str | Path | None = None):
        super().__init__()
        trunk = _trunk(net, input_size)
        self.input_size, self.stops, self.channels = input_size, trunk.stops, trunk.channels
        self.features = trunk.build().to_empty(device="cpu")
        for m in self.features.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                assert m.bias is not None
                nn.init.zeros_(m.bias)
        source = _source(trunk, weights)
        if isinstance(source, str):
            load_fitting(self.features, _features(_fetch(trunk)), source)
        elif source is not None:
            load_fitting(self.features, _features(read_state(source)), source)
        # LPIPS's own scaling of [-1, 1], rounded ImageNet statistics.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self.shift: Tensor
        self.scale: Tensor

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images in [-1, 1], (B, 1 or 3, H, W), grey repeated -> maps after the ReLU that ends each level, shallow to deep."""
        x = images
        if x.shape[-2:] != (self.input_size, self.input_size):
            x = F.interpolate(x, size=(self.input_size, self.input_size), mode="bilinear", align_corners=False)
        x = (x - self.shift) / self.scale  # grey becomes three channels here
        out: list[Tensor] = []
        for i, layer in enumerate(self.features.children(), 1):
            x = layer(x)
            if i in self.stops:
                out.append(x)
        return out


def _fetch(trunk: Trunk) -> dict[str, Tensor]:
    """torchvision's own file, into its cache."""
    try:
        state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
            trunk.url, map_location="cpu", check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as e:  # no network; a file with another hash
        raise _missing(trunk, f"{type(e).__name__} at the hub") from None
    return state


def check_trunk(net: str, weights: str | Path | None = None, *, input_size: int = 224) -> None:
    """Finds the weights of a trunk and checks names and shapes, without building it; an address in the hub is only asked whether it is there.

    Raises:
        GddlabError: As `LPIPSTrunk`.
    """
    trunk = _trunk(net, input_size)
    source = _source(trunk, weights)
    if isinstance(source, str):
        if why := ask_hub(source):
            raise _missing(trunk, why)
    elif source is not None:
        fit_state(trunk.build().state_dict(), _features(read_state(source)), source)


def _trunk(net: str, input_size: int) -> Trunk:
    if net not in TRUNKS:
        raise unknown("LPIPS network", net, TRUNKS)
    trunk = TRUNKS[net]
    if input_size < trunk.smallest:
        raise GddlabError(f"input_size={input_size}: {trunk.model} takes {trunk.smallest} pixels at least")
    return trunk


def _features(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a torchvision classifier's state dict has under `features`; the classifier is not needed, and may be left out."""
    return {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}


def _source(trunk: Trunk, weights: str | Path | None) -> Path | str | None:
    """A file, an address, or None for random weights."""
    if weights == "random":
        return None
    if weights is not None:
        if not Path(weights).is_file():
            raise NotFound(f"no weights of {trunk.model} at {weights}: give a path, 'random', or None to look for them")
        return Path(weights)
    url = trunk.url
    name = url.rpartition("/")[2]
    if found := find_weights(trunk.model, name.removesuffix(".pth")):
        return found
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name
    if cached.is_file():
        return cached
    if os.environ.get("GDDLAB_OFFLINE", "") not in ("", "0"):
        raise _missing(trunk, "GDDLAB_OFFLINE is set")
    return url


def _missing(trunk: Trunk, why: str) -> GddlabError:
    target = cache_dir() / "backbones" / f"{trunk.model}.pth"
    return GddlabError(
        f"no weights of {trunk.model} ({why}): put {trunk.url} at {target}, or in $GDDLAB_HOME/backbones, or give its path"
    )
