"""Distances between images for instance-based losses: squared error, LPIPS (Zhang et al. 2018), and EfficientNet-lite0.

Each takes two batches of images in [-1, 1], (B, 1 or 3, H, W), to one number per pair, (B,); gradients flow to both.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from gddlab.errors import GddlabError
from gddlab.pretrained.backbones import Backbone
from gddlab.pretrained.trunks import LPIPS_LAYERS, TRUNKS, LPIPSTrunk, unit

LITE0 = "tf_efficientnet_lite0"


class SquaredDistance(nn.Module):
    """Mean squared difference."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean((1, 2, 3))


class LPIPSDistance(nn.Module):
    """LPIPS v0.1 on VGG16, equal to the package's, and differentiable where all channels of a pixel are zero.

    Squared differences of unit-normalised features of five levels, times learned weights, summed over channels, mean
    over pixels, summed over levels (Zhang et al. 2018, equation 1).

    Args:
        weights: Of VGG16: a path, "random", or None to look for them, as `LPIPSTrunk` does.
        input_size: Images are resized to this many pixels, bilinearly (align_corners False).

    Raises:
        GddlabError: Weights that are missing or do not fit.
    """

    def __init__(self, weights: str | Path | None = None, *, input_size: int = 224):
        super().__init__()
        self.trunk = LPIPSTrunk("vgg", input_size=input_size, weights=weights)
        for i, w in enumerate(linear_layers()):
            self.register_buffer(f"lin{i}", w)
        self.eval().requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        total = torch.zeros((), dtype=a.dtype, device=a.device)
        for i, (x, y) in enumerate(zip(self.trunk(a), self.trunk(b), strict=True)):
            total = total + ((unit(x) - unit(y)).square() * self.get_buffer(f"lin{i}")).sum(1).mean((1, 2))
        return total


class Lite0Distance(nn.Module):
    """Not LPIPS, but a stand-in whose weights come with the package; its values are comparable only with each other.

    LPIPS's differences without learned weights on four levels of EfficientNet-lite0 (strides 4, 8, 16, 32) of images
    resized to 64 pixels, mean over channels and pixels, then over levels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.levels = Backbone(LITE0, 64)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(self.levels(a), self.levels(b), strict=True)
        return torch.stack([(unit(x) - unit(y)).square().mean((1, 2, 3)) for x, y in pairs]).mean(0)


def linear_layers() -> list[Tensor]:
    """LPIPS's learned weights v0.1 for VGG16, (C, 1, 1) per level, without importing the package, which loads SciPy."""
    path = LPIPS_LAYERS.in_wheel()
    if path is None:
        raise GddlabError("LPIPS's linear layers are missing: pip install lpips")
    state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{i}.model.1.weight"][0] for i in range(len(TRUNKS["vgg"].stops))]
