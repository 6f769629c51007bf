"""Distances between images for instance-based losses: squared, LPIPS (Zhang et al. 2018), and a stand-in for it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from gddlab.errors import GddlabError, unknown
from gddlab.pretrained.backbones import Backbone, lite_weights
from gddlab.pretrained.trunks import TRUNKS, LPIPSTrunk, check_trunk, unit

DISTANCES = ("lpips", "l2", "lite0")
LITE0 = "tf_efficientnet_lite0"


class Distance(nn.Module):
    """A frozen distance between images, one number per pair: d(a, b) = d(b, a) >= 0."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Two batches of images in [-1, 1], (B, 1 or 3, H, W) each -> (B,); gradients flow to both.

        Raises:
            GddlabError: Shapes differ.
        """
        if a.shape != b.shape:
            raise GddlabError(f"images of {tuple(a.shape)} and {tuple(b.shape)}: a distance takes equal shapes")
        return self.measure(a, b)

    def measure(self, a: Tensor, b: Tensor) -> Tensor:
        """The distance itself."""
        raise AssertionError("a distance defines its measure")

    def train(self, mode: bool = True) -> Distance:
        return super().train(False)


class _L2(Distance):
    def measure(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().mean((1, 2, 3))


class _LPIPS(Distance):
    """LPIPS v0.1 on VGG16: equal to the package's, and differentiable where all channels of a pixel are zero."""

    def __init__(self, weights: str | Path | None, input_size: int):
        super().__init__()
        self.trunk = LPIPSTrunk("vgg", input_size=input_size, weights=weights)
        for i, w in enumerate(_linear_layers()):
            self.register_buffer(f"lin{i}", w)
        self.eval().requires_grad_(False)

    def measure(self, a: Tensor, b: Tensor) -> Tensor:
        total = torch.zeros((), dtype=a.dtype, device=a.device)
        for i, (x, y) in enumerate(zip(self.trunk(a), self.trunk(b), strict=True)):
            total = total + ((unit(x) - unit(y)).square() * self.get_buffer(f"lin{i}")).sum(1).mean((1, 2))
        return total


class _Lite0(Distance):
    """LPIPS's formula without learned weights on four levels of EfficientNet-lite0 (strides 4, 8, 16, 32)."""

    def __init__(self, input_size: int):
        super().__init__()
        if input_size < 32:
            raise GddlabError(f"input_size={input_size}: {LITE0} takes 32 pixels at least")
        self.levels = Backbone(LITE0, input_size)

    def measure(self, a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(self.levels(a), self.levels(b), strict=True)
        return torch.stack([(unit(x) - unit(y)).square().mean((1, 2, 3)) for x, y in pairs]).mean(0)


def perceptual_distance(name: str, *, weights: str | Path | None = None, input_size: int | None = None) -> Distance:
    """A frozen distance between images.

    - "l2": mean squared difference.
    - "lpips": LPIPS v0.1 on VGG16 (Zhang et al. 2018, equation 1): squared differences of unit-normalised features of
      five levels, times learned weights, summed over channels, mean over pixels, summed over levels.
    - "lite0": not LPIPS, but a stand-in whose weights come with the package: the same differences on four levels of
      EfficientNet-lite0 without learned weights, mean over channels and pixels, then over levels. Its values are
      comparable only with each other.

    Args:
        name: "lpips", "l2" or "lite0".
        weights: Of LPIPS's VGG16: a path, "random", or None to look for them, as `LPIPSTrunk` does.
        input_size: Images are resized to this many pixels, bilinearly (align_corners False); None is 224 for lpips, 64
            for lite0.

    Raises:
        GddlabError: Unknown name, an argument that the distance does not take, or weights that do not fit.
    """
    _check_name(name, weights)
    if name == "l2":
        if input_size is not None:
            raise GddlabError(f"input_size={input_size} with the distance l2, which does not resize: omit it")
        return _L2().eval()
    if name == "lpips":
        return _LPIPS(weights, 224 if input_size is None else input_size)
    return _Lite0(64 if input_size is None else input_size)


def check_distance(name: str, weights: str | Path | None = None) -> None:
    """Refuses before training what `perceptual_distance` could not build; no network is made.

    Raises:
        GddlabError: As `perceptual_distance`.
    """
    _check_name(name, weights)
    if name == "lpips":
        _linear_layers()
        check_trunk("vgg", weights)
    elif name == "lite0":
        lite_weights(LITE0)


def _check_name(name: str, weights: str | Path | None) -> None:
    if name not in DISTANCES:
        raise unknown("distance", name, DISTANCES)
    if weights is not None and name != "lpips":
        raise GddlabError(f"weights={str(weights)!r} with the distance {name}, which takes none: omit them")


def _linear_layers() -> list[Tensor]:
    """LPIPS's learned weights v0.1 for VGG16, (C, 1, 1) per level, without importing the package, which loads SciPy."""
    spec = importlib.util.find_spec("lpips")
    folder = next(iter(spec.submodule_search_locations or ()), None) if spec else None
    path = Path(folder or "") / "weights" / "v0.1" / "vgg.pth"
    if folder is None or not path.is_file():
        raise GddlabError("LPIPS's linear layers are missing: pip install lpips")
    state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{i}.model.1.weight"][0] for i in range(len(TRUNKS["vgg"].stops))]
