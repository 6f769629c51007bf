"""The trunks of LPIPS: levels of torchvision's VGG16, AlexNet and SqueezeNet 1.1.

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gddlab.errors import GddlabError, unknown
from gddlab.pretrained.backbones import init_he
from gddlab.pretrained.files import Published, fit_state, load_fitting, read_state


@dataclass(frozen=True)
class Trunk:
    """torchvision's `features`, cut after a ReLU each time; width of each level; side of the smallest image, pixels."""

    model: str
    weights: str
    stops: tuple[int, ...]
    channels: tuple[int, ...]
    smallest: int

    @property
    def file(self) -> Published:
        """Its published weights, under the model's name or torchvision's, such as vgg16-397923af."""
        from torchvision import models

        url = str(getattr(models, self.weights).IMAGENET1K_V1.url)
        published = url.rpartition("/")[2].removesuffix(".pth")
        return Published(self.model, None, url, name=self.model, aliases=(published,))

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
    """Divides each pixel's channels by their norm; `eps` in the root makes it differentiable at zero.  (B, C, H, W)"""
    return x / (x.square().sum(1, keepdim=True) + eps).sqrt()


class LPIPSTrunk(nn.Module):
    """Levels of an LPIPS trunk.

    Args:
        net: "vgg", "alex" or "squeeze".
        input_size: Images are resized to this many pixels, bilinearly (align_corners False).
        weights: Path of a torchvision state dict (.safetensors, .pth, .pt); "random" for He initialisation (He et al.
            2015); None to search for it, and to download it if it is not found.

    Raises:
        GddlabError: Unknown net, too small a size, or weights that are missing or do not fit.
    """

    def __init__(self, net: str, *, input_size: int = 224, weights: str | Path | None = None):
        super().__init__()
        trunk = _trunk(net, input_size)
        self.input_size, self.stops, self.channels = input_size, trunk.stops, trunk.channels
        self.features = trunk.build().to_empty(device="cpu")
        init_he(self.features)
        path = trunk.file.fetch(weights)
        if path is not None:
            load_fitting(self.features, _features(read_state(path)), path)
        # LPIPS's own scaling of [-1, 1], rounded ImageNet statistics.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self.shift: Tensor
        self.scale: Tensor

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps after the ReLU that ends each level, shallow to deep.

        Args:
            images: In [-1, 1], (B, 1 or 3, H, W); grey is repeated.
        """
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


def check_trunk(net: str, weights: str | Path | None = None, *, input_size: int = 224) -> None:
    """Finds the weights of a trunk and checks names and shapes, without building it; nothing is downloaded.

    Raises:
        GddlabError: As `LPIPSTrunk`.
    """
    trunk = _trunk(net, input_size)
    path = trunk.file.ask(weights)
    if path is not None:
        fit_state(trunk.build().state_dict(), _features(read_state(path)), path)


def _trunk(net: str, input_size: int) -> Trunk:
    if net not in TRUNKS:
        raise unknown("LPIPS network", net, TRUNKS)
    trunk = TRUNKS[net]
    if input_size < trunk.smallest:
        raise GddlabError(f"input_size={input_size}: {trunk.model} takes {trunk.smallest} pixels at least")
    return trunk


def _features(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a torchvision classifier's state dict has under `features`; the classifier may be absent."""
    return {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
