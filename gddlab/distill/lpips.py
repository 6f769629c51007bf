"""The LPIPS network as a discriminator, trained from the first layer: one of the ablations of GDD."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from tyro.conf import Suppress

from gddlab.distill.parts import Discriminator, DiscriminatorPart, FileName
from gddlab.nets import Precond
from gddlab.pretrained.trunks import LPIPSTrunk, check_trunk, unit


class LPIPSDiscriminator(Discriminator):
    """LPIPS's network with logits in place of a distance.

    LPIPS weights squared differences of unit-normalised features by a 1x1 convolution at each level (Zhang et al. 2018,
    equation 1); here a 1x1 convolution turns the unit-normalised features of one image into a map of logits. The trunk
    begins with LPIPS's weights and is trained. With classes, each level's logits gain an inner product of its features
    with a learned class embedding (Miyato & Koyama 2018).

    Each level's logits are a tensor of their own, so that levels count the same in the losses, as they do in LPIPS,
    however large their maps are.

    Args:
        part: Trunk, its weights and size.
        classes: Number of classes; 0 for an unconditional discriminator.

    Raises:
        GddlabError: As `LPIPSTrunk`.
    """

    def __init__(self, part: LPIPS, *, classes: int = 0):
        super().__init__()
        self.trunk = LPIPSTrunk(part.net, input_size=part.input_size, weights=part.weights)
        self.heads = nn.ModuleList(nn.Conv2d(c, 1, 1) for c in self.trunk.channels)
        self.embeds = nn.ModuleList(nn.Embedding(classes, c) for c in self.trunk.channels) if classes else None
        for embed in self.embeds or ():
            assert isinstance(embed, nn.Embedding)
            nn.init.normal_(embed.weight, std=1 / math.sqrt(embed.embedding_dim))  # features have norm 1

    def logits(self, features: Sequence[Tensor], labels: Tensor | None = None) -> list[Tensor]:
        """One tensor (B, L) per level, its map flattened, shallow to deep; labels are one-hot, (B, classes)."""
        out: list[Tensor] = []
        for i, x in enumerate(self.trunk(features[0])):
            x = unit(x, 1e-8)  # bounds what R1 differentiates where a pixel's features are faint
            y = self.heads[i](x)
            if self.embeds is not None:
                assert labels is not None
                y = y + torch.einsum("bchw,bc->bhw", x, self.embeds[i](labels.argmax(1)))[:, None]
            out.append(y.flatten(1))
        return out


class LPIPS(DiscriminatorPart):
    """The LPIPS network with logits in place of a distance, trained from its first layer."""

    kind: Suppress[Literal["lpips"]] = "lpips"
    """Name of this kind."""
    net: Literal["vgg", "alex", "squeeze"] = "vgg"
    """Trunk."""
    weights: FileName | None = None
    """Weights of the trunk: a path, or "random"; None looks for them."""
    input_size: int = Field(default=224, ge=16, le=512)
    """Size to which images are resized, pixels."""

    def build(self, teacher: Precond, *, exact: bool = False) -> LPIPSDiscriminator:
        return LPIPSDiscriminator(self, classes=teacher.label_dim)

    def find(self) -> str:
        check_trunk(self.net, self.weights, input_size=self.input_size)
        return f"lpips discriminator ({self.net})"

    def describe(self) -> str:
        return f"lpips ({self.net}), images resized to {self.input_size} pixels"

    def stand_in(self) -> LPIPS:
        return self.model_copy(update={"weights": "random"})
