"""EfficientNet-lite as feature extractors of torch-fidelity; imported only when features are wanted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from gddlab.pretrained.lite import LITE_MEAN, LITE_STD, lite_backbone

__all__ = ["LITE_LAYER", "LITE_SIZE", "FeatureExtractorLite0", "FeatureExtractorLite2"]

LITE_SIZE = 96
"""Side that images are resized to, pixels: the digits take 11 s on one core, 23 s at 128."""
LITE_LAYER = "1280"


class FeatureExtractorLite(FeatureExtractorBase):
    """Pooled 1280 features behind `conv_head` of a timm EfficientNet-lite (Tan & Le 2019) with ImageNet weights."""

    backbone: str

    def __init__(self, name: str, features_list: list[str], **kwargs: Any):
        super().__init__(name, features_list)
        self.net: Any = lite_backbone(self.backbone).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features of images.

        Args:
            x: uint8, (B, 3, H, W).

        Returns:
            float32, (B, 1280), in a tuple.
        """
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"images are {x.dtype} {tuple(x.shape)}: give uint8 (B, 3, H, W)")
        y = (x.float() / 255 - LITE_MEAN) / LITE_STD
        shrinks = (
            max(x.shape[2:]) > LITE_SIZE
        )  # without antialiasing a large image would be sampled at every k-th pixel
        y = torch.nn.functional.interpolate(
            y, size=(LITE_SIZE, LITE_SIZE), mode="bilinear", align_corners=False, antialias=shrinks
        )
        y = self.net.forward_features(y.contiguous(memory_format=torch.channels_last))  # (B, 1280, 3, 3)
        out = {LITE_LAYER: y.mean((2, 3)).float()}
        return tuple(out[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return (LITE_LAYER,)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return {"fid": LITE_LAYER, "kid": LITE_LAYER, "prc": LITE_LAYER}[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        return True

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(1, 3, 16, 16, dtype=torch.uint8)


class FeatureExtractorLite0(FeatureExtractorLite):
    backbone = "tf_efficientnet_lite0"


class FeatureExtractorLite2(FeatureExtractorLite):
    backbone = "tf_efficientnet_lite2"
