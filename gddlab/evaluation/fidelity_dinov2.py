"""DINOv2 as a feature extractor of torch-fidelity with weights from a file; imported only when features are wanted."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

from gddlab.pretrained.files import load_fitting, read_state

__all__ = ["FeatureExtractorTimmDinoV2"]

GRID = 16
"""Patches a side: 224 / 14."""
OFFSET = 0.1
"""Added to the grid by the authors when they resize the position embedding."""


class FeatureExtractorTimmDinoV2(FeatureExtractorDinoV2):
    """torch-fidelity's DINOv2 ViT-L/14 with the authors' file, in timm's implementation.

    torch-fidelity itself runs code that torch.hub fetches, and takes no file. The position embedding, made for 37x37 patches, is resized
    to 16x16 as that code does (bicubic, with an offset of 0.1), so that features are the same up to rounding.
    """

    architecture = "vit_large_patch14_dinov2"

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **kwargs: Any
    ):
        FeatureExtractorBase.__init__(self, name, features_list)
        assert feature_extractor_weights_path is not None, "give the path of the weights"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import timm

        with torch.device("meta"):
            net = timm.create_model(self.architecture, pretrained=False, num_classes=0, img_size=14 * GRID)
        state = read_state(feature_extractor_weights_path)
        state = {k: v for k, v in state.items() if k != "mask_token"}  # of training alone
        if "pos_embed" in state:
            state["pos_embed"] = _resized(state["pos_embed"])
        self.feature_extractor_internal_dtype = torch.float32
        self.model = net.to_empty(device="cpu")
        load_fitting(self.model, state, feature_extractor_weights_path)
        self.requires_grad_(False)
        self.eval()

    @staticmethod
    def can_be_compiled() -> bool:
        return False


def _resized(embedding: Tensor) -> Tensor:
    """Position embedding for GRID x GRID patches.  (1, 1 + m * m, d) -> (1, 1 + GRID * GRID, d)"""
    m = int((embedding.shape[1] - 1) ** 0.5)
    if embedding.ndim != 3 or m in (0, GRID) or m * m != embedding.shape[1] - 1:
        return embedding
    grid = embedding[:, 1:].float().reshape(1, m, m, -1).permute(0, 3, 1, 2)
    scale = (GRID + OFFSET) / m
    grid = torch.nn.functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    return torch.cat([embedding[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)
