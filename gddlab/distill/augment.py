"""Augmentation before the discriminator: DiffAugment (Zhao et al. 2020) and ADA (Karras et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gddlab.distill.distributed import World
from gddlab.distill.parts import Settings
from gddlab.errors import GddlabError, unknown

P = float | Tensor
"""A probability: a number, or a 0-d tensor that is never read on the host."""


INTERVAL = 4
"""Iterations between two steps of ADA's probability."""


class Augmentation(nn.Module):
    """Random operations on images, a function of images, uniform numbers and a probability that ADA may move.

    Each image is treated alone, by its own row of numbers: draw those of the global batch once, on the CPU, and give
    every process and micro-batch its rows. Each elementary operation happens with probability `p`, independently; p = 1
    is DiffAugment's paper, a controlled p is ADA's. At p = 0 every operation is the exact identity. All of them are
    affine in the pixels and nothing is clipped, so that gradients reach the images everywhere.

    DiffAugment (Zhao et al. 2020, "Differentiable augmentation for data-efficient GAN training", section 4), with one
    probability each:

    - "color": brightness + U(-0.5, 0.5), saturation * U(0, 2), contrast * U(0.5, 1.5); on grey images saturation is the
      identity.
    - "translation": by whole pixels, up to 1/8 of the size each way, zeros behind.
    - "cutout": a square of half the size is set to zero, its centre anywhere in the image.

    ADA (Karras et al. 2020, "Training generative adversarial networks with limited data", appendix B), with one
    probability per elementary operation:

    - "blit": x-flip, quarter turns, translation by whole pixels up to 1/8 of the size; copies pixels, blends none.
    - "geom": isotropic scale, rotation, anisotropic scale, rotation, fractional translation (normal, 1/8 of the size),
      as one warp. Rotations have 1 - sqrt(1 - p) each.
    - "ada-color": brightness, contrast, luma flip, hue rotation, saturation; on grey images the first three, which is
      what all five do there.
    - "bgc": the three above, the paper's default.

    Two differences from ADA's paper. "blit" and "geom" are two steps with a reflected border each (about the centres of
    the outermost pixels), not one, so that "blit" stays exact. "geom" samples the image bicubically, without the
    paper's doubled resolution and wavelet low-pass: sharpness is kept (98 % of the pixel-to-pixel differences of an
    ideal warp on photographs at 32 pixels; 85 % with bilinear sampling), the finest detail may alias where an image
    shrinks.

    With a target, p is held where the discriminator overfits to that degree (section 3.2). Overfitting is measured by
    r_t = E[sign(D(real))], between 0 (none) and 1. Every `INTERVAL` iterations p takes a step up where the mean of r_t
    is above the target, down where it is below; it stays within [0, 1], and does not change where r_t is not a number.
    The state is then three buffers on the device (`p`, `sum`, `count`: 0-d, float64), changed in place; the host reads
    none of them.

    Args:
        part: Operations, probability or target.
        mean: Mean of a tensor over processes (`World.mean`), for signs of one process.
    """

    p: Tensor | float
    """Probability of each elementary operation now."""
    sum: Tensor
    count: Tensor

    def __init__(self, part: Augment, *, mean: Callable[[Tensor], Tensor] = lambda t: t):
        super().__init__()
        self.ops, self.target, self.speed_kimg, self.mean = _elementary(part.ops), part.ada_target, part.ada_kimg, mean
        self.width = sum(_OPS[n][1] for n in self.ops)
        """Uniform numbers per image."""
        if self.target is None:
            self.p = part.p
            return
        for name in ("p", "sum", "count"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def forward(self, images: Tensor, u: Tensor) -> Tensor:
        """Augmented images.

        Args:
            images: (B, C, R, R) in [-1, 1], C = 1 or 3; the result can leave the range.
            u: (B, width) in [0, 1), of the images' dtype and device.
        """
        assert images.shape[1] in (1, 3) and images.shape[2] == images.shape[3]
        assert u.shape == (len(images), self.width) and u.dtype == images.dtype
        with torch.autocast(images.device.type, enabled=False):
            for name, part in zip(self.ops, u.split([_OPS[n][1] for n in self.ops], dim=1), strict=True):
                images = _OPS[name][0](images, part.unbind(1), self.p)
        return images

    @torch.no_grad()
    def observe(self, signs: Tensor, batch: int) -> dict[str, Tensor]:
        """After each iteration: takes the mean sign of the logits of its real images, and steps p where that is due.

        Args:
            signs: 0-d, in [-1, 1].
            batch: Images per iteration, over all processes.

        Returns:
            The probability of the iteration, by name; nothing without a target.
        """
        if self.target is None:
            return {}
        assert isinstance(self.p, Tensor)
        was = self.p.clone()
        self.sum += self.mean(signs)
        self.count += 1
        due = self.count >= INTERVAL
        step = torch.sign(self.sum / self.count - self.target) * self.count * (batch / (self.speed_kimg * 1000))
        self.p.copy_(torch.where(due, (self.p + step).clamp(0, 1), self.p))
        self.sum.masked_fill_(due, 0)
        self.count.masked_fill_(due, 0)
        return {"ada/p": was}


def _elementary(names: Sequence[str]) -> tuple[str, ...]:
    """Names of operations with "bgc" spelt out, each once."""
    out: list[str] = []
    for name in names:
        if name not in OPS:
            raise unknown("augmentation", name, OPS)
        out += _BGC if name == "bgc" else [name]
    if len(set(out)) < len(out):
        twice = next(n for n in out if out.count(n) > 1)
        raise GddlabError(f"augmentations {tuple(names)}: {twice!r} is there twice; name each operation once")
    return tuple(out)


Uniforms = tuple[Tensor, ...]


def _image(t: Tensor) -> Tensor:
    return t[:, None, None, None]  # (B,) -> (B, 1, 1, 1)


def _normal(u: Tensor) -> Tensor:
    """Standard normal numbers from uniform ones; finite, also for u = 0."""
    return math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-1 + 2e-7, 1 - 2e-7))


def _lognormal(u: Tensor, octaves: float) -> Tensor:
    return torch.exp2(octaves * _normal(u))


def _integer(u: Tensor, low: int, high: int) -> Tensor:
    """Uniform over low .. high, both included; also where u was rounded to 1."""
    return ((u * (high - low + 1)).floor() + low).clamp(max=high)


def _pixels(x: Tensor, h: Tensor, v: Tensor) -> Tensor:
    """Whole pixels to the right and down, up to 1/8 of the size each way.  -> (B, 2)"""
    far = round(x.shape[-1] / 8)
    return torch.stack([_integer(h, -far, far), _integer(v, -far, far)], 1)


def _color(x: Tensor, u: Uniforms, p: P) -> Tensor:
    on, brightness, saturation, contrast = (_image(t) for t in u)
    y = x + (brightness - 0.5)
    grey = y.mean(1, keepdim=True)
    y = grey + 2 * saturation * (y - grey)
    mean = y.mean((1, 2, 3), keepdim=True)
    y = mean + (0.5 + contrast) * (y - mean)
    return torch.where(on < p, y, x)


def _translation(x: Tensor, u: Uniforms, p: P) -> Tensor:
    on, h, v = u
    eye = torch.eye(2, dtype=x.dtype, device=x.device).expand(len(x), 2, 2)
    return _warp(x, eye, _pixels(x, h, v), on < p, mode="nearest", padding="zeros")


def _cutout(x: Tensor, u: Uniforms, p: P) -> Tensor:
    on, *corner = u
    size = x.shape[-1]
    side = round(size / 2)
    at = torch.arange(size, dtype=x.dtype, device=x.device)
    inside = []
    for c in corner:
        # The centre lies on a pixel, or with an even side between two of them or at the border.
        start = _integer(c, 0, size - side % 2) - side // 2
        inside.append((at >= start[:, None]) & (at < start[:, None] + side))  # (B, R)
    hole = (on < p)[:, None, None] & inside[0][:, None, :] & inside[1][:, :, None]  # (B, R, R)
    return x.masked_fill(hole[:, None], 0.0)


def _blit(x: Tensor, u: Uniforms, p: P) -> Tensor:
    on_flip, flip, on_turn, turn, on_shift, h, v = u
    mirrored = (on_flip < p) & (flip < 0.5)
    quarters = torch.where(on_turn < p, _integer(turn, 0, 3), 0.0)
    shift = torch.where((on_shift < p)[:, None], _pixels(x, h, v), 0.0)
    sign = torch.where(mirrored, -1.0, 1.0).to(x.dtype)
    linear = _rotation(quarters * (math.pi / 2)) @ torch.diag_embed(torch.stack([sign, torch.ones_like(sign)], 1))
    moved = mirrored | (quarters > 0) | (shift != 0).any(1)
    return _warp(x, linear, shift, moved, mode="nearest", padding="reflection")


def _geom(x: Tensor, u: Uniforms, p: P) -> Tensor:
    on_scale, scale, on_pre, pre, on_aniso, aniso, on_post, post, on_shift, h, v = u
    p_rot = 1 - (1 - p) ** 0.5
    on = [on_scale < p, on_pre < p_rot, on_aniso < p, on_post < p_rot, on_shift < p]
    s = torch.where(on[0], _lognormal(scale, 0.2), 1.0)
    a = torch.where(on[2], _lognormal(aniso, 0.2), 1.0)
    turns = [torch.where(on[i], (2 * t - 1) * math.pi, 0.0) for i, t in ((1, pre), (3, post))]
    shift = torch.stack([_normal(h), _normal(v)], 1) * (x.shape[-1] / 8)  # (B, 2)
    shift = torch.where(on[4][:, None], shift, 0.0)
    stretch = torch.diag_embed(torch.stack([a, 1 / a], 1))
    linear = _rotation(turns[1]) @ stretch @ _rotation(turns[0]) * s[:, None, None]
    return _warp(x, linear, shift, torch.stack(on).any(0), mode="bicubic", padding="reflection")


def _ada_color(x: Tensor, u: Uniforms, p: P) -> Tensor:
    # The paper's 4x4 matrices act separately on luma (the channels' mean, along the grey axis) and on chroma (the
    # rest), so their product is written by those two: luma -> c f (luma + b), chroma -> c s (chroma turned by the hue).
    on_b, b, on_c, c, on_f, f, on_h, h, on_s, s = (_image(t) for t in u)
    brightness = torch.where(on_b < p, 0.2 * _normal(b), 0.0)
    contrast = torch.where(on_c < p, _lognormal(c, 0.5), 1.0)
    flip = torch.where((on_f < p) & (f < 0.5), -1.0, 1.0).to(x.dtype)
    hue = torch.where(on_h < p, (2 * h - 1) * math.pi, 0.0)
    saturation = torch.where(on_s < p, _lognormal(s, 1.0), 1.0)
    luma = x.mean(1, keepdim=True)
    across = (x.roll(1, 1) - x.roll(-1, 1)) / math.sqrt(3)  # cross product with the grey axis; none on grey images
    chroma = hue.cos() * (x - luma) + hue.sin() * across
    y = contrast * (flip * (luma + brightness) + saturation * chroma)
    changed = (on_b < p) | (on_c < p) | (on_f < p) | (on_h < p) | (on_s < p)
    return torch.where(changed, y, x)


def _rotation(radians: Tensor) -> Tensor:
    c, s = radians.cos(), radians.sin()
    return torch.stack([torch.stack([c, -s], 1), torch.stack([s, c], 1)], 1)  # (B,) -> (B, 2, 2)


def _warp(x: Tensor, linear: Tensor, shift: Tensor, where: Tensor, *, mode: str, padding: str) -> Tensor:
    """Moves content by `linear` (B, 2, 2) about the centre, then by `shift` (B, 2) pixels (x right, y down).

    Images for which `where` (B,) does not hold stay.
    """
    from kornia.geometry.transform import warp_affine

    size = x.shape[-1]
    centre = (size - 1) / 2
    offset = centre * (1 - linear.sum(2)) + shift  # (B, 2)
    matrix = torch.cat([linear, offset[:, :, None]], 2)
    # align_corners: coordinates are pixels either way; with it reflection is about the centres of the border's pixels.
    y = warp_affine(x, matrix, (size, size), mode=mode, padding_mode=padding, align_corners=True)
    return torch.where(_image(where), y, x)


_OPS: dict[str, tuple[Callable[[Tensor, Uniforms, P], Tensor], int]] = {
    "color": (_color, 4),
    "translation": (_translation, 3),
    "cutout": (_cutout, 3),
    "blit": (_blit, 7),
    "geom": (_geom, 11),
    "ada-color": (_ada_color, 10),
}
_BGC = ["blit", "geom", "ada-color"]
OPS = (*_OPS, "bgc")
"""Names of the operations."""


class Augment(Settings):
    """Augments what the discriminator sees, real and generated; R1 sees plain images."""

    ops: tuple[str, ...] = ("bgc",)
    """Differentiable operations in their order: color, translation, cutout (DiffAugment); blit, geom, ada-color, and
    bgc for these three (ADA)."""
    p: float = Field(default=1.0, gt=0, le=1)
    """Probability of each operation where no `ada_target` moves it."""
    ada_target: float | None = Field(default=None, gt=0, lt=1)
    """ADA's target for the mean sign of the logits of real images; the probability starts at 0. None keeps it fixed."""
    ada_kimg: float = Field(default=500, gt=0)
    """Images in which ADA's probability can go from 0 to 1, thousands."""

    @model_validator(mode="after")
    def _fields_fit(self) -> Augment:
        if not _elementary(self.ops):
            raise GddlabError("augment.ops=(): give at least one operation, or augment=None")
        if self.ada_target is not None and self.p != 1.0:
            raise GddlabError(
                f"augment.ada_target={self.ada_target} with augment.p={self.p}: the target moves the probability"
            )
        return self

    def build(self, world: World) -> Augmentation:
        return Augmentation(self, mean=world.mean).to(world.device)

    def describe(self) -> str:
        """A few words for a report."""
        ada = f", ADA with target {self.ada_target:g}" if self.ada_target else ""
        return ", ".join(self.ops) + (f", probability {self.p:g}" if self.p < 1 else "") + ada
