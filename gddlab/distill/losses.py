"""The GAN loss (non-saturating or hinge) and the R1 penalty (method of GDD; Mescheder et al. 2018).

Losses are means over the logits of an image and over images, summed over backbones. The authors' sum over the images of
a device is the caller's `adversarial_weight`, so that a result does not depend on the number of devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor, nn

from gddlab.distill.parts import Discriminator


def g_loss(logits: Sequence[Tensor], kind: str = "ns") -> Tensor:
    """softplus(-logits), or -logits for "hinge".  [(B, L)] -> ()"""
    return torch.stack([(F.softplus(-x) if kind == "ns" else -x).mean() for x in logits]).sum()


def d_loss_fake(logits: Sequence[Tensor], kind: str = "ns") -> Tensor:
    """softplus(logits), or relu(1 + logits) for "hinge".  [(B, L)] -> ()"""
    return torch.stack([(F.softplus(x) if kind == "ns" else F.relu(1 + x)).mean() for x in logits]).sum()


def d_loss_real(logits: Sequence[Tensor], kind: str = "ns") -> Tensor:
    """softplus(-logits), or relu(1 - logits) for "hinge".  [(B, L)] -> ()"""
    return torch.stack([(F.softplus(-x) if kind == "ns" else F.relu(1 - x)).mean() for x in logits]).sum()


def r1_penalty(
    d: Discriminator, images: Tensor, labels: Tensor | None, *, parts: Sequence[slice] = (slice(None),)
) -> tuple[Tensor, Tensor]:
    """Squared norm of d sum(logits) / d image, mean over images; through resize, backbone and projection.

    The penalty P depends on the heads' parameters p only through f = d sum(logits) / d features, since everything
    before the features is frozen. With J the Jacobian of the features, the image gradient is J^T f, so
    dP / dp = <J (2/B) J^T f, df / dp>. One forward-mode product replaces the second derivative of the backbone, by far
    the most expensive part (grouped convolutions have no fast one): exact, not an approximation.

    Args:
        d: Discriminator.
        images: (B, C, H, W) in [-1, 1].
        labels: One-hot, (B, classes), or None.
        parts: Slices that divide the batch; the graph of the features is held for one slice at a time, and is made
            again for each if there are several.

    Returns:
        The penalty, (), without a graph; and a surrogate, (), whose gradient by the heads' parameters is the penalty's.
    """
    x = [images.detach()[s].requires_grad_(True) for s in parts]
    once = len(x) == 1  # then the graph of the first pass serves
    with torch.set_grad_enabled(once):
        made = [d.features(p) for p in x]
    leaves = [torch.cat([f.detach() for f in level]).requires_grad_(True) for level in zip(*made, strict=True)]
    grads, tangents = [], []
    with torch.enable_grad():
        total = torch.stack([y.sum() for y in d.logits(leaves, labels)]).sum()
        slopes = torch.autograd.grad(total, leaves, create_graph=True)
        split = zip(*(s.detach().split([len(p) for p in x]) for s in slopes), strict=True)
        for p, f, slope in zip(x, made, split, strict=True):
            (grad,) = torch.autograd.grad(f if once else d.features(p), p, slope)
            with torch.no_grad(), fwAD.dual_level():
                moved = d.features(fwAD.make_dual(p.detach(), 2 / len(images) * grad))
                tangents.append([fwAD.unpack_dual(m).tangent for m in moved])
            grads.append(grad)
    pushed = [torch.cat(level) for level in zip(*tangents, strict=True)]
    surrogate = torch.stack([(t * s).sum() for t, s in zip(pushed, slopes, strict=True)]).sum()
    return torch.cat(grads).square().sum((1, 2, 3)).mean(), surrogate


@contextlib.contextmanager
def constant(params: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gradients pass through a network to its input; none reaches these parameters."""
    trained = [p for p in params if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
