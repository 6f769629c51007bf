"""The purely distributional objective: non-saturating GAN loss and R1 (method of GDD; Mescheder et al. 2018).

Losses are means over the logits of an image and over images, summed over backbones: the authors' sum over the images of a device
is the caller's `adversarial_weight`, so that a result does not depend on the number of devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from gddlab.distill.discriminators import ProjectedDiscriminator

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


def r1_penalty(d: ProjectedDiscriminator, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Squared norm of d sum(logits) / d image, mean over images: the image gradient, through resize, backbone and projection.

    The penalty P depends on the heads' parameters p only through f = d sum(logits) / d features, since everything before the features is frozen. With J the
    Jacobian of the features, d image gradient = J^T df, so dP / dp = <J (2/B) J^T f, df / dp>. The second derivative of the backbone, by far the
    dearest part (grouped convolutions have no fast one), is replaced by one forward-mode product: exact, not an approximation.

    Args:
        d: Discriminator.
        images: (B, C, H, W) in [-1, 1].
        labels: One-hot, (B, classes), or None.

    Returns:
        The penalty, (), without a graph; and a surrogate, (), whose gradient with respect to the heads' parameters is the penalty's.
    """
    with torch.enable_grad():
        x = images.detach().requires_grad_(True)
        features = d.features(x)
        leaves = [f.detach().requires_grad_(True) for f in features]
        total = torch.stack([y.sum() for y in d.logits(leaves, labels)]).sum()
        slopes = torch.autograd.grad(total, leaves, create_graph=True)
        (grad,) = torch.autograd.grad(features, x, [s.detach() for s in slopes])
    with torch.no_grad(), fwAD.dual_level():
        moved = d.features(fwAD.make_dual(images.detach(), 2 / len(images) * grad))
        tangents = [fwAD.unpack_dual(f).tangent for f in moved]
    surrogate = torch.stack([(t * s).sum() for t, s in zip(tangents, slopes, strict=True)]).sum()
    return grad.square().sum((1, 2, 3)).mean(), surrogate
