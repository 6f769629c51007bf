"""The projected discriminator: frozen backbone, frozen random projection, trained heads (Sauer et al. 2021; method of GDD)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gddlab.distill.embedding import load_embedding
from gddlab.distill.heads import BatchNorm, Head, last_resolution, nominal_resolutions
from gddlab.errors import GddlabError, unknown
from gddlab.pretrained.backbones import Backbone

__all__ = ["Backbone", "ProjectedDiscriminator", "Projection"]


class _Level(nn.Module):
    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.out_conv = nn.Conv2d(cin, cout, 1)


class Projection(nn.Module):
    """Frozen random cross-channel and cross-scale mixing, CCM and CSM (Sauer et al. 2021, section 3.2)."""

    def __init__(self, channels: Sequence[int], cout: int):
        super().__init__()
        wide = [cout, 2 * cout, 4 * cout, 8 * cout]
        self.channels = [cout, cout, 2 * cout, 4 * cout]
        for i in range(4):
            self.add_module(f"layer{i}_ccm", nn.Conv2d(channels[i], wide[i], 1))
            self.add_module(f"layer{i}_csm", _Level(wide[i], self.channels[i]))
        self.requires_grad_(False)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Four maps, shallow to deep -> four maps of twice the size, `self.channels` wide."""
        out: list[Tensor] = []
        for i in reversed(range(4)):
            h = self.get_submodule(f"layer{i}_ccm")(features[i])
            h = h + out[0] if out else h
            # A 1x1 convolution and a bilinear upsampling commute; this order works on a quarter of the pixels.
            h = self.get_submodule(f"layer{i}_csm.out_conv")(h)
            out.insert(0, F.interpolate(h, scale_factor=2.0, mode="bilinear", align_corners=True))
        return out


class _Heads(nn.Module):
    """The heads of one backbone, one a level."""

    def __init__(self, channels: Sequence[int], input_size: int, *, classes: int, max_width: int, embeddings: int):
        super().__init__()
        end = last_resolution(input_size)
        self.mini_discs = nn.ModuleList(
            Head(c, start, end, classes=classes, max_width=max_width, embeddings=embeddings)
            for c, start in zip(channels, nominal_resolutions(input_size), strict=True)
        )

    def forward(self, features: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        return torch.cat([head(f, labels) for head, f in zip(self.mini_discs, features, strict=True)], dim=1)


class ProjectedDiscriminator(nn.Module):
    """Heads over projected features of one or several frozen backbones.

    The state dict holds heads, projections and a ViT's adapters, all that is random; not the backbones.

    Args:
        backbones: Names, as `gddlab.pretrained.backbones.Backbone` takes them, each once.
        input_size: Size to which images are resized, pixels; 224 counts as 256 where head depths are chosen.
        cout: Base width of the projection.
        classes: Number of classes; 0 for an unconditional discriminator.
        max_width: Bound of the heads' widths.
        embeddings: Rows of the class embedding; `classes` if 0.
        sync_batchnorm: BatchNorm statistics over all ranks.
        fold: Folds the backbones' BatchNorm into their convolutions: equal up to float32 rounding, and faster.
        weights: By backbone "auto", "random" or a path; "auto" for those not named.
        embedding_file: Initial class embedding of every head, (rows or more, 320), see `gddlab.distill.embedding.load_embedding`; it is trained.

    Raises:
        GddlabError: A backbone, its size or its weights are refused, or the embedding does not fit.
    """

    coupled = True
    """BatchNorm: the logits of an image depend on the others of its batch."""

    def __init__(
        self,
        backbones: Sequence[str] = ("tf_efficientnet_lite0",),
        *,
        input_size: int = 224,
        cout: int = 64,
        classes: int = 0,
        max_width: int = 512,
        embeddings: int = 0,
        sync_batchnorm: bool = False,
        fold: bool = True,
        weights: Mapping[str, str] | None = None,
        embedding_file: str | Path | None = None,
    ):
        super().__init__()
        keys = [name.replace(".", "_") for name in backbones]  # a module's name has no dots
        if not keys or len(set(keys)) < len(keys):
            raise GddlabError(f"backbones={tuple(backbones)}: give at least one, each once")
        for name in weights or {}:
            if name not in backbones:
                raise unknown("backbone in weights", name, backbones)
        if embedding_file is not None and not classes:
            raise GddlabError(f"embedding_file={str(embedding_file)!r} without classes: leave it away")
        table = None if embedding_file is None else load_embedding(embedding_file, embeddings or classes)
        nets = {
            key: Backbone(name, input_size, fold=fold, weights=(weights or {}).get(name, "auto"))
            for key, name in zip(keys, backbones, strict=True)
        }
        self._backbones = [nets]  # in a list: not submodules, so not in the state dict
        self.adapters = nn.ModuleDict({key: net.adapter for key, net in nets.items() if net.adapter is not None})
        projections = {key: Projection(net.channels, cout) for key, net in nets.items()}
        self.projections = nn.ModuleDict(projections)
        self.discriminators = nn.ModuleDict(
            {
                key: _Heads(
                    projection.channels, input_size, classes=classes, max_width=max_width, embeddings=embeddings
                )
                for key, projection in projections.items()
            }
        )
        for m in self.modules():
            if isinstance(m, BatchNorm):
                m.sync = sync_batchnorm
            elif isinstance(m, Head) and table is not None:
                with torch.no_grad():
                    m.embed.weight.copy_(table)

    @property
    def backbones(self) -> dict[str, Backbone]:
        return self._backbones[0]

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        for net in self.backbones.values():  # .to() and .double() reach the backbones too
            net._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def features(self, images: Tensor) -> list[Tensor]:
        """Projected features of images in [-1, 1]: four maps a backbone, in one list."""
        out: list[Tensor] = []
        for name, net in self.backbones.items():
            out += self.projections[name](net(images))
        return out

    def logits(self, features: Sequence[Tensor], labels: Tensor | None = None) -> list[Tensor]:
        """Logits of projected features, one tensor (B, L) a backbone."""
        return [heads(features[4 * i : 4 * i + 4], labels) for i, heads in enumerate(self.discriminators.values())]

    def forward(self, images: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        return self.logits(self.features(images), labels)
