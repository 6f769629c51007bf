"""The purely distributional objective: non-saturating GAN loss and R1 (method of GDD; Mescheder et al. 2018).

Losses are means over the logits of an image and over images, summed over backbones: the authors' sum over the images of a device
is the caller's `adversarial_weight`, so that a result does not depend on the number of devices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["d_loss_fake", "d_loss_real", "g_loss", "r1_penalty"]


def g_loss(logits: Sequence[Tensor], kind: str = "ns") -> Tensor:
    """softplus(-logits), or -logits for "hinge".  [(B, L)] -> ()"""
    return torch.stack([(F.softplus(-x) if kind == "ns" else -x).mean() for x in logits]).sum()


def d_loss_fake(logits: Sequence[Tensor], kind: str = "ns") -> Tensor:
    """softplus(logits), or relu(1 + logits) for "hinge".  [(B, L)] -> ()"""
    return torch.stack([(F.softplus(x) if kind == "ns" else F.relu(1 + x)).mean() for x in logits]).sum()


def d_loss_real(logits: Sequence[Tensor], kind: str = "ns") -> Tensor:
    """softplus(-logits), or relu(1 - logits) for "hinge".  [(B, L)] -> ()"""
    return torch.stack([(F.softplus(-x) if kind == "ns" else F.relu(1 - x)).mean() for x in logits]).sum()


def r1_penalty(logits: Sequence[Tensor], images: Tensor) -> Tensor:
    """Squared norm of d sum(logits) / d image, mean over images; differentiable.  [(B, L)], (B, C, H, W) -> ()"""
    total = torch.stack([x.sum() for x in logits]).sum()
    (grad,) = torch.autograd.grad(total, images, create_graph=True)
    return grad.square().sum((1, 2, 3)).mean()
