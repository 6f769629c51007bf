"""Levels of torchvision's networks: the trunks of LPIPS (VGG16, AlexNet, SqueezeNet 1.1), and VGG16 with BatchNorm.

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gddlab.errors import GddlabError, unknown
from gddlab.pretrained.published import Published, fit_state, load_fitting, read_state

_COUNTERS = ("num_batches_tracked",)
"""Of BatchNorm; files may have them, and networks in eval mode do not need them."""


@dataclass(frozen=True)
class Trunk:
    """torchvision's `features`, cut after a ReLU at each level; width of each level; smallest image side, pixels."""

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

    def load(self, weights: str | Path | None) -> tuple[nn.Module, Path | None]:
        """`features` and the path of its weights; "random" ones are torchvision's (He et al. 2015), without a path."""
        features = self._build().to_empty(device="cpu")
        path = self.file.fetch(weights)
        for m in features.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.reset_parameters()
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                assert m.bias is not None
                nn.init.zeros_(m.bias)
        if path is not None:
            load_fitting(features, _state(path), path, optional=_COUNTERS)
        return features, path

    def check(self, weights: str | Path | None) -> None:
        """Refuses weights as `load` does, without building the network; nothing is downloaded."""
        path = self.file.ask(weights)
        if path is not None:
            fit_state(self._build().state_dict(), _state(path), path, optional=_COUNTERS)

    def levels(self, features: nn.Module, x: Tensor) -> list[Tensor]:
        """Maps after the ReLU that ends each level, shallow to deep."""
        out: list[Tensor] = []
        for i, layer in enumerate(features.children(), 1):
            x = layer(x)
            if i in self.stops:
                out.append(x)
        return out

    def _build(self) -> nn.Module:
        """`features` on the meta device: the classifier, most of the parameters, is never made."""
        from torchvision import models

        with torch.device("meta"):
            features: nn.Module = getattr(models, self.model)(weights=None).features[: self.stops[-1]]
        return features


def _state(path: Path) -> dict[str, Tensor]:
    """What a torchvision classifier's state dict has under `features`; the classifier may be absent."""
    state = read_state(path)
    kept = [k for k in state if k.startswith("features.") and not k.endswith(_COUNTERS)]
    return {k.removeprefix("features."): state[k] for k in kept}


TRUNKS = {
    "vgg": Trunk("vgg16", "VGG16_Weights", (4, 9, 16, 23, 30), (64, 128, 256, 512, 512), 16),
    "alex": Trunk("alexnet", "AlexNet_Weights", (2, 5, 8, 10, 12), (64, 192, 384, 256, 256), 31),
    "squeeze": Trunk(
        "squeezenet1_1", "SqueezeNet1_1_Weights", (2, 5, 8, 10, 11, 12, 13), (64, 128, 256, 384, 384, 512, 512), 17
    ),
}
"""Of LPIPS."""
LPIPS_LAYERS = Published("LPIPS's linear layers", None, None, wheel=("lpips", "weights/v0.1/vgg.pth"))
VGG16_BN = Trunk("vgg16_bn", "VGG16_BN_Weights", (13, 23, 33, 43), (128, 256, 512, 512), 32)
"""Its levels are the ends of blocks 2 to 5, before the pooling."""


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
        self.trunk, self.input_size = _trunk(net, input_size), input_size
        self.channels = self.trunk.channels
        self.features, _ = self.trunk.load(weights)
        # LPIPS's own scaling of [-1, 1], rounded ImageNet statistics.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self.shift: Tensor
        self.scale: Tensor

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images in [-1, 1], (B, 1 or 3, H, W), grey repeated -> maps after the ReLU that ends each level."""
        x = images
        if x.shape[-2:] != (self.input_size, self.input_size):
            x = F.interpolate(x, size=(self.input_size, self.input_size), mode="bilinear", align_corners=False)
        return self.trunk.levels(self.features, (x - self.shift) / self.scale)  # grey becomes three channels here


def check_trunk(net: str, weights: str | Path | None = None, *, input_size: int = 224) -> None:
    """Refuses what `LPIPSTrunk` refuses, without building it; nothing is downloaded."""
    _trunk(net, input_size).check(weights)


def _trunk(net: str, input_size: int) -> Trunk:
    if net not in TRUNKS:
        raise unknown("LPIPS network", net, TRUNKS)
    trunk = TRUNKS[net]
    if input_size < trunk.smallest:
        raise GddlabError(f"input_size={input_size}: {trunk.model} takes {trunk.smallest} pixels at least")
    return trunk
