"""Feature networks with random weights, saved as their authors save them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn


def save_inception(path: Path) -> Path:
    """torch-fidelity's Inception with weights that keep the scale of what passes, so that features differ between
    images.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Bare(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):
            pass

    torch.manual_seed(0)
    torch.save({}, path)
    net = Bare("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
    net.fc.weight.mul_(20)
    torch.save(net.state_dict(), path)
    return path


def save_clip(path: Path, *, embedding: int = 512) -> Path:
    """A narrow CLIP of one layer as TorchScript, with the text side's tensors that torch-fidelity drops."""
    from torch_fidelity.feature_extractor_clip import CLIPVisual

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = CLIPVisual(embedding, 224, 1, 64, 32).visual
            self.text_projection = nn.Parameter(torch.zeros(8, embedding))
            self.logit_scale = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return x + self.logit_scale

    torch.manual_seed(0)
    torch.jit.trace(Holder(), torch.zeros(1)).save(str(path))
    return path


def save_vgg16(path: Path) -> Path:
    """torchvision's VGG16 with He-scaled weights; the rows of a large matrix are one, which is small in the file."""
    from torchvision import models

    torch.manual_seed(0)
    with torch.device("meta"):
        names = models.vgg16().state_dict()
    state = {}
    for name, v in names.items():
        rows = 1 if v.numel() > 1 << 22 else len(v)
        state[name] = (torch.randn(rows, *v.shape[1:]) * (2 / max(1, v[0].numel())) ** 0.5).expand(v.shape)
    torch.save(state, path)
    return path
