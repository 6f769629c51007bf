"""The best denoiser that there is of a finite set of images: the mean of those that a noisy image may stem from."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gddlab.errors import GddlabError
from gddlab.nets.precond import Coefficients, Precond

CHUNK = 1 << 21
"""Numbers held at once, of each of a few tensors."""


class PosteriorMean(nn.Module):
    """E[y | x] for x = y + sigma * noise, where y is one of `images`, all equally likely, or all of a class.

    Karras et al. 2022, equation 57 (appendix B.3): the mean of the images with weights softmax(-|x - y|^2 / 2 sigma^2).
    Sums are in float64, whatever the precision of the caller (float32 where a device has none): at sigma 0.002 the
    exponents are of the order of 10^7. Images are read in parts, so that memory holds no matrix of all distances.

    Args:
        images: (N, C, H, W).
        class_ids: Class of each image, (N,), below `label_dim`; None for an unconditional denoiser.
        label_dim: Number of classes.
    """

    def __init__(
        self, images: Float[Tensor, "n c h w"], class_ids: Int[Tensor, " n"] | None = None, label_dim: int = 0
    ):
        super().__init__()
        self.images = nn.Parameter(images.detach().clone(), requires_grad=False)  # follows .to(), as weights do
        self.class_ids: Tensor | None
        self.register_buffer("class_ids", None if class_ids is None else class_ids.detach().clone())
        used = set() if class_ids is None else set(class_ids.tolist())
        self.absent = [k for k in range(label_dim) if k not in used] if class_ids is not None else []

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, " b"],
        class_labels: Float[Tensor, "b k"] | None = None,
        augment_labels: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Posterior means. Rows of zeros in `class_labels` are of no class: all images; the last two are not used.

        Raises:
            GddlabError: A class without images.
        """
        kind = torch.float32 if x.device.type == "mps" else torch.float64
        flat, inverse = x.flatten(1).to(kind), sigma.to(kind).square().reciprocal()[:, None]  # (B, D), (B, 1)
        labels = self._labels(class_labels, len(x), kind)
        top = flat.new_full((len(x), 1), -math.inf)
        total, mean = torch.zeros_like(top), torch.zeros_like(flat)
        size = max(1, CHUNK // max(flat.shape))
        with torch.autocast(x.device.type, enabled=False):
            for i in range(0, len(self.images), size):
                y = self.images[i : i + size].flatten(1).to(kind)  # (n, D)
                # -|x - y|^2 / 2 sigma^2 without |x|^2, which is the same for all y
                exponent = (flat @ y.T - y.square().sum(1) / 2) * inverse  # (B, n)
                if labels is not None and self.class_ids is not None:
                    exponent = exponent + labels[:, self.class_ids[i : i + size]].log()
                before, top = top, torch.maximum(top, exponent.amax(1, keepdim=True))
                finite = top.masked_fill(top == -math.inf, 0.0)  # no image of the class so far
                weight, shrunk = (exponent - finite).exp(), (before - finite).exp()
                total = total * shrunk + weight.sum(1, keepdim=True)
                mean = mean * shrunk + weight @ y
        return (mean / total).reshape(x.shape).to(x.dtype)

    def _labels(self, class_labels: Tensor | None, n: int, kind: torch.dtype) -> Float[Tensor, "b k"] | None:
        """Weight of each class, (B, K): labels, or ones where there is none."""
        if class_labels is None or self.class_ids is None:
            return None
        labels = class_labels.to(kind).expand(n, -1)
        if self.absent and bool((labels[:, self.absent] > 0).any()):
            wrong = int((labels[:, self.absent] > 0).any(0).nonzero()[0])
            raise GddlabError(f"class {self.absent[wrong]}: these data have no image of it, give another class")
        return torch.where((labels == 0).all(1, keepdim=True), 1.0, labels)


class IdealPrecond(Precond):
    """`PosteriorMean` as a denoiser D(x; sigma) of any sigma above 0; arguments as there."""

    def __init__(
        self, images: Float[Tensor, "n c h w"], class_ids: Int[Tensor, " n"] | None = None, label_dim: int = 0
    ):
        nn.Module.__init__(self)  # there is no U-Net to build
        self.img_channels, self.img_resolution, self.label_dim = images.shape[1], images.shape[2], label_dim
        self.sigma_min, self.sigma_max = 0.0, math.inf
        self.model = PosteriorMean(images, class_ids, label_dim)  # type: ignore[assignment]
        self.init_kwargs, self.card = {}, None

    def coefficients(self, sigma: Tensor) -> Coefficients:
        one = torch.ones_like(sigma)
        return Coefficients(torch.zeros_like(sigma), one, one, sigma.flatten())
